"""EleutherAI's lm-eval on our models, on a task that needs no download; its figures are ours."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cratelm.evaluate.config import EvaluateConfig
from cratelm.evaluate.evaluate import evaluate
from cratelm.evaluate.measurements import Measurement
from cratelm.interop import lm_eval as ours
from cratelm.models import build, load
from cratelm.tokens.tokenizer import hf_tokenizer, train_tokenizer

needed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed (extra lm-eval)",
)
TEXTS = [
    "The white box shows what the black box hides",
    "She opened the box and the box was white",
    "He said that the stone is a stone",
    "Größer als der Stein ist der Stein",
]
LAST_WORD = """
task: last_word
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CRATE with a tokenizer, a set, and a task for each way of measuring it."""
    path = tmp_path_factory.mktemp("harness")
    tokenizer = train_tokenizer(TEXTS * 3, 300)
    model = build(
        "crate-1l",
        vocab_size=320,
        max_position_embeddings=64,
        hidden_size=32,
        num_attention_heads=2,
    )
    model.save_pretrained(path / "model")
    hf_tokenizer(tokenizer).save_pretrained(path / "model")
    texts = [*TEXTS, "box the the", "is stone stone", "white white white"]
    (path / "set.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (path / "tasks").mkdir()
    for name, task in (("last_word", LAST_WORD), ("rolling", ROLLING)):
        (path / "tasks" / f"{name}.yaml").write_text(task.format(path=path / "set.jsonl"))
    return path


def measured(folder: Path, kind: str) -> Measurement:
    config = EvaluateConfig(
        run=folder, path=str(folder / "model"), on=(f"{kind}={folder / 'set.jsonl'}",), quiet=True
    )
    (found,) = evaluate(config).measurements
    return found


@needed
def test_the_figures_of_a_model_object_are_ours(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    model = HFLM(pretrained=load(folder / "model"), tokenizer=tokenizer, batch_size=4)
    assert model.max_length == 64
    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = simple_evaluate(
        model=model, tasks=["last_word", "rolling"], task_manager=tasks, bootstrap_iters=0
    )
    assert found is not None
    last, words = found["results"]["last_word"], measured(folder, "lambada")
    assert words.word_perplexity is not None
    assert words.last_word is not None
    assert last["perplexity,none"] == pytest.approx(words.word_perplexity.value, rel=1e-4)
    assert last["acc,none"] == pytest.approx(words.last_word.value)
    assert 0 < words.last_word.value < 1  # else it could not be told from a constant
    texts = measured(folder, "mine")
    assert texts.bits_per_byte is not None
    bits = found["results"]["rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(texts.bits_per_byte.value, rel=1e-4)


@needed
def test_the_command_line_knows_crate_by_its_folder(folder: Path) -> None:
    out = folder / "out"
    command = [sys.executable, "-m", "cratelm.interop.lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={folder / 'model'}", "--device", "cpu"]
    command += ["--tasks", "last_word", "--include_path", str(folder / "tasks")]
    done = subprocess.run(
        [*command, "--output_path", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = out.rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["last_word"]
    ours = measured(folder, "lambada")
    assert ours.word_perplexity is not None
    assert found["perplexity,none"] == pytest.approx(ours.word_perplexity.value, rel=1e-4)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\.\[lm-eval\]"):
        ours.main()
