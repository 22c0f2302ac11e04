"""`tokenize --workers`: the shards of one process, whatever the number of workers, and whoever is killed."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_tokens import WORDS

from cratelm.corpus.sources import open_corpus
from cratelm.errors import InputError, StorageError
from cratelm.tokens import tokenize as verb
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.parts import Work
from cratelm.tokens.tokenize import TokenizeResult, tokenize
from cratelm.tokens.tokenizer import load_tokenizer, train_tokenizer
from cratelm.tokens.workers import WorkerKilledError, limit_threads, write_parts

MANY = int(os.environ.get("CRATELM_KILLS", "0"))
"""kills of each kind; the long form is described in tests/test_kills.py"""
N_FILES = 7


def sentences(n: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(5, 40))) for _ in range(n)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t, "meta": {"pile_set_name": "P"}}) + "\n" for t in texts).encode()  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files of all kinds, with documents that are empty, long, or cannot be read."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_bytes(lines(["", *sentences(60, 1), "", ""]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines(sentences(90, 2))))
    broken = b'{"text": \n' * 15
    (folder / "c.jsonl").write_bytes(broken + lines(sentences(9, 3)) + broken + lines([""]))
    pq.write_table(pa.table({"text": sentences(40, 4)}), folder / "d.parquet")
    (folder / "e.txt").write_text(" ".join(sentences(900, 5)))  # above 100,000 characters
    (folder / "f.jsonl").write_bytes(lines([*sentences(50, 6), ""]) + b"{}\n")
    (folder / "g.txt").write_text("")
    assert len(open_corpus(str(folder)).groups(1)) == N_FILES  # pyright: ignore
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(sentences(50, 0), 300).save(str(path))
    return path


@pytest.fixture
def parts_of_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "GROUP_BYTES", 1)


def make(folder: Path, corpus: Path, **fields: Any) -> TokenizeResult:
    fields = {"vocab_size": 300, "sequence_length": 16, "quiet": True, "fit": 0.2, "held_out": 0.2, "on_error": "skip", **fields}  # fmt: skip
    return tokenize(TokenizeConfig(run=folder / "run", corpus=str(corpus), **fields))


def files(run: Path) -> dict[str, bytes]:
    """Everything that a run holds, without times."""
    found = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    record = json.loads(found.pop("tokens/completed.json"))
    found.pop("manifest.json")
    for name in ("seconds", "finished_at", "checksum"):
        del record[name]
    return {**found, "record": json.dumps(record).encode()}


def left_over(run: Path) -> list[str]:
    return [str(p) for p in run.rglob(".*")]


# The shards of one process


def test_any_number_of_workers_gives_the_same_files(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    one = make(tmp_path / "one", corpus, quiet=False)
    messages = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    assert len(messages) == 21  # 20 names, and that the others are counted
    assert (one.empty, one.skipped, sum(one.documents.values())) == (6, 31, 250)
    monkeypatch.setattr(verb, "GROUP_BYTES", 1)
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        result = make(folder, corpus, workers=workers, quiet=False)
        assert files(folder / "run") == files(tmp_path / "one" / "run")
        assert not left_over(folder / "run")
        assert result == one.__class__(**{**vars(one), "path": result.path})
        shown = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
        assert shown == messages
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("parts_of_one_file")
@pytest.mark.parametrize("limit", ["max_documents", "max_tokens"])
def test_limits_stop_at_the_same_document(
    tmp_path: Path, corpus: Path, tokenizer: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cratelm.tokens.parts._BLOCK_TOKENS", 500)
    monkeypatch.setattr("cratelm.tokens.shards._ROWS_PER_GROUP", 16)
    monkeypatch.setattr("cratelm.tokens.parts._ROWS_PER_GROUP", 20)
    fields: dict[str, Any] = {"tokenizer": str(tokenizer), "sequence_length": 1, "force": True}
    values = (60, 61, 150, 158, 160, 200, 249, 1000) if limit == "max_documents" else (1500, 3000, 7000, 9001, 10**6)  # fmt: skip
    for value in values:
        fields[limit] = value
        parts = make(tmp_path / "parts", corpus, **fields)
        with monkeypatch.context() as patch:
            patch.setattr(verb, "GROUP_BYTES", 10**9)
            one = make(tmp_path / "one", corpus, **fields)
        assert {**vars(parts), "path": 0} == {**vars(one), "path": 0}
        assert files(tmp_path / "parts" / "run") == files(tmp_path / "one" / "run")


@pytest.mark.usefixtures("parts_of_one_file")
def test_what_follows_the_limit_is_neither_counted_nor_an_error(
    tmp_path: Path, corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 documents of a.jsonl: two empty ones at its end, then 90 of b.jsonl.zst, then lines that cannot be read."""
    fields: dict[str, Any] = {"tokenizer": str(tokenizer), "on_error": "stop"}
    whole = make(tmp_path / "w", corpus, **fields, max_documents=150)
    n = sum(whole.tokens.values())
    for group in (1, 10**9):
        monkeypatch.setattr(verb, "GROUP_BYTES", group)
        result = make(tmp_path / f"{group}", corpus, **fields, max_tokens=n)
        assert (sum(result.documents.values()), result.empty, result.skipped) == (150, 3, 0)
        first = make(tmp_path / f"{group}-60", corpus, **fields, max_documents=60)
        assert first.empty == 1
        with pytest.raises(InputError, match=r"c\.jsonl, line 1: "):
            make(tmp_path / f"{group}+1", corpus, **fields, max_tokens=n + 1)


@pytest.mark.usefixtures("parts_of_one_file")
def test_documents_that_cannot_be_encoded_are_counted_in_parts(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cratelm.tokens.pieces.LONGEST_STRETCH", 100)
    monkeypatch.setattr("cratelm.tokens.pieces._PIECE", 50)
    monkeypatch.setattr("cratelm.tokens.encoding._LONG", 300)
    folder = tmp_path / "corpus"
    folder.mkdir()
    long = "\u0c05" * 500  # Telugu, about which the rules say nothing
    for name in "abc":
        (folder / f"{name}.jsonl").write_bytes(lines([*sentences(40, ord(name)), long, "x y"]))
    for fields in ({}, {"max_documents": 83}, {"max_documents": 84}):
        fields = {**fields, "tokenizer": str(tokenizer), "force": True}
        parts = make(tmp_path / "parts", folder, **fields)
        with monkeypatch.context() as patch:
            patch.setattr(verb, "GROUP_BYTES", 10**9)
            one = make(tmp_path / "one", folder, **fields)
        assert {**vars(parts), "path": 0} == {**vars(one), "path": 0}
        assert parts.skipped == (2 if "max_documents" in fields else 3)
        assert files(tmp_path / "parts" / "run") == files(tmp_path / "one" / "run")
    with pytest.raises(InputError, match=r"a\.jsonl, line 41: .*--on-error skip"):
        make(tmp_path / "stop", folder, **{**fields, "on_error": "stop"})
    assert not list(tmp_path.glob("stop/*"))


@pytest.mark.usefixtures("parts_of_one_file")
@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_of_the_corpus_stops_all_workers(
    tmp_path: Path, corpus: Path, tokenizer: Path, workers: int
) -> None:
    """Not that of f.jsonl, which comes sooner to a worker: c.jsonl comes first in the corpus."""
    with pytest.raises(InputError, match=r"c\.jsonl, line 1: .*--on-error skip") as caught:
        make(tmp_path, corpus, workers=workers, tokenizer=str(tokenizer), on_error="stop")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("parts_of_one_file")
def test_a_corpus_that_will_not_do_leaves_nothing(tmp_path: Path, corpus: Path) -> None:
    for fields, expected in (
        ({"sequence_length": 10**6}, "the train split has"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json is not a file"),
        ({"corpus": str(corpus / "g.txt")}, "has no text"),
    ):
        given = fields.pop("corpus", corpus)
        with pytest.raises(InputError, match=expected):
            make(tmp_path, Path(str(given)), **fields)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"workers": 0}, "--workers must be at least 1, not 0"),
        ({"workers": 10**9}, "the worker processes would take at least"),
        ({"workers": 2, "executor": "e.toml"}, "--workers and --executor cannot be combined"),
    ],
)
def test_options_that_cannot_be_are_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        TokenizeConfig(**fields)


def test_a_stream_has_no_use_for_workers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--workers: corpus hub:a/b is read as one stream"):
        make(tmp_path, Path("hub:a/b"), workers=2)


def test_threads_are_divided_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    limit_threads(0)
    assert os.environ["RAYON_NUM_THREADS"] == "1"  # more workers than cores
    limit_threads(8)
    assert os.environ["RAYON_NUM_THREADS"] == "1"  # a number that is set stays


# Interruptions


def work(folder: Path, corpus: Path, tokenizer: Path) -> Work:
    config = TokenizeConfig(
        corpus=str(corpus), fit=0.2, held_out=0.2, on_error="skip", tokenizer=str(tokenizer)
    )
    groups = open_corpus(str(corpus)).groups(1)  # pyright: ignore
    return Work.begin(folder / "parts", groups, config, {}, lambda: load_tokenizer(tokenizer))


@pytest.mark.fault(
    "a worker of `tokenize` is killed, as by the system when memory is exhausted",
    "one line that names the file; no process is left; the same command continues after the files that are finished",
)
def test_a_killed_worker_is_reported_with_its_file(
    tmp_path: Path, corpus: Path, tokenizer: Path
) -> None:
    def kill(_: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()
            process.join()

    parts = work(tmp_path, corpus, tokenizer)
    # one worker: of two, the other may not have a file yet
    with pytest.raises(WorkerKilledError, match=r"signal 9.*, at .*/[ab]\.\S+: type") as caught:
        list(write_parts(parts, range(N_FILES), 1, kill))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()
    written = list(write_parts(parts, parts.unwritten(), 2, lambda _: None))
    assert len(written) >= N_FILES - 2
    assert not parts.unwritten()


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: Path
) -> dict[str, bytes]:
    """The files of a command that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder, corpus, tokenizer=str(tokenizer))
    return files(folder / "run")


@pytest.mark.usefixtures("parts_of_one_file")
@pytest.mark.parametrize(
    "interruption",
    [KeyboardInterrupt(), WorkerKilledError("killed"), StorageError(28, "full"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_finished_parts_are_used_and_a_damaged_one_is_written_again(
    tmp_path: Path,
    corpus: Path,
    tokenizer: Path,
    whole: dict[str, bytes],
    interruption: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    written: list[int] = []
    real = Work.write

    def write(self: Work, index: int, *arguments: Any) -> None:
        if index == 4 and len(written) == 4:
            raise interruption
        written.append(index)
        real(self, index, *arguments)

    monkeypatch.setattr(Work, "write", write)
    with pytest.raises(type(interruption)):
        make(tmp_path, corpus, tokenizer=str(tokenizer))
    parts = tmp_path / "run" / ".tokens.partial" / "parts"
    content = bytearray((parts / "00001" / "tokens.bin").read_bytes())
    content[0] ^= 1
    (parts / "00001" / "tokens.bin").write_bytes(content)
    (parts / "00002" / "part.json").write_text("{}")
    capsys.readouterr()
    make(tmp_path, corpus, tokenizer=str(tokenizer))
    assert written == [0, 1, 2, 3, 1, 2, 4, 5, 6]
    printed = capsys.readouterr()
    assert "3 of 7 parts are already there" in printed.out
    assert "00001/tokens.bin is not what was written: it is written again" in printed.err
    assert files(tmp_path / "run") == whole
    assert not left_over(tmp_path / "run")


SCRIPT = """
import os, signal, sys, threading
kill_at, kill_after, words = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
import cratelm.tokens.tokenize
from cratelm.cli import main
cratelm.tokens.tokenize.GROUP_BYTES = 1
operations = 0
def hook(event, arguments):
    global operations
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    changes = writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
    if changes and str(arguments[0]).startswith(words[2]):  # below the run: not Python's own caches
        operations += 1
        if operations == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
if kill_after:
    threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
status = main(words)
print(operations, flush=True)
os._exit(status)
"""


class Command:
    """`cratelm tokenize` in processes of their own, in a session of their own."""

    def __init__(self, folder: Path, corpus: Path, tokenizer: Path):
        options = "--vocab-size 300 --sequence-length 16 --fit 0.2 --held-out 0.2 --on-error skip"
        self.words = ["tokenize", "--run", str(folder / "run"), "--corpus", str(corpus), "--tokenizer", str(tokenizer), *options.split(), "--quiet"]  # fmt: skip

    def start(self, workers: int, kill_at: int = 0, kill_after: float = 0) -> subprocess.Popen[str]:
        numbers = [str(kill_at), str(kill_after)]
        command = [sys.executable, "-c", SCRIPT, *numbers, *self.words, "--workers", str(workers)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, workers: int, **kill: Any) -> tuple[int, str, str]:
        process = self.start(workers, **kill)
        out, err = process.communicate(timeout=120)  # ends only when no worker holds the pipes
        return process.returncode, out, err


def session(process: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == process and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.fault(
    "`tokenize` is killed at a file operation or at any other moment while parts are written or merged",
    "the same command ends with the files of one that was not killed",
)
def test_a_killed_command_ends_with_the_same_files(
    tmp_path: Path, corpus: Path, tokenizer: Path, whole: dict[str, bytes]
) -> None:
    command = Command(tmp_path / "whole", corpus, tokenizer)
    status, out, err = command.run(1)
    assert status == 0, err
    operations = int(out.splitlines()[-1])
    assert files(tmp_path / "whole" / "run") == whole
    draw = random.Random()
    kills: list[dict[str, Any]] = [{"kill_at": n} for n in sorted(draw.sample(range(1, operations - 5), MANY or 1))]  # fmt: skip
    kills += [{"kill_after": draw.uniform(0.05, 1.5)} for _ in range(MANY or 1)]
    for number, kill in enumerate(kills):
        folder = tmp_path / str(number)
        command = Command(folder, corpus, tokenizer)
        status, _, err = command.run(2 if "kill_after" in kill else 1, **kill)
        assert status == -signal.SIGKILL or ("kill_after" in kill and status == 0), err
        status, _, err = command.run(1 if "kill_at" in kill else 2)
        assert status == 0, err
        assert files(folder / "run") == whole, kill
        assert not left_over(folder / "run"), kill


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs the list of processes")
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGKILL"])
@pytest.mark.fault(
    "`tokenize --workers` is interrupted by Ctrl-C, or its first process is killed",
    "all workers end at once; Ctrl-C gives one line",
)
def test_no_worker_outlives_the_command(
    tmp_path: Path, corpus: Path, tokenizer: Path, how: str
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    # one document each, so many seconds of work that a busy machine sends the signal in time
    for name in "ab":
        (folder / f"{name}.txt").write_text(" ".join(sentences(400, 0) * 1000))
    process = Command(tmp_path, folder, tokenizer).start(2)
    deadline = time.monotonic() + 100
    parts = tmp_path / "run" / ".tokens.partial" / "parts"
    while len(list(parts.glob(".*.tmp"))) < 2:  # both workers are at work
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    assert len(session(process.pid)) >= 3
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == "Ctrl-C" else -signal.SIGKILL), err
    if how == "Ctrl-C":
        assert err == "cratelm tokenize: interrupted; the same command resumes the work\n"
    deadline = time.monotonic() + 5
    while session(process.pid):
        assert time.monotonic() < deadline, "a worker goes on with its document"
        time.sleep(0.02)
    assert not list(parts.glob("0*"))
