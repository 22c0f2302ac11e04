"""Faults of the disk and of paths are one line that names the path and what is missing."""

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_runs_atomic import Killed, kill_at
from tiny_run import MODEL, copied

from cratelm.cli import main
from cratelm.errors import InputError, StorageError
from cratelm.runs import Run, atomic, atomic_folder, atomic_path, write_json
from cratelm.runs.storage import check_target, storage_error

IS_ROOT = os.geteuid() == 0


def error_of(capsys, *arguments: object) -> str:
    """The one line of a command that fails, whose status is 2."""
    assert main([*map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ---- paths ----------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a corpus, a file, a loop of links and a name that is too long."""
    monkeypatch.chdir(tmp_path)
    copied(tmp_path)
    Path("file").write_text("x", encoding="utf-8")
    Path("loop").symlink_to("loop")
    Path("a").symlink_to("b")
    Path("b").symlink_to("a")
    return tmp_path


PATHS = {
    "file/below": r"file is a file, not a folder",
    "file/deep/below": r"file is a file, not a folder",
    "loop": r"the symbolic link \S*loop, which points to loop, leads back to itself",
    "a/below": r"the symbolic link \S*a, which points to b, leads back to itself",
    "n" * 300: r"has a name of 300 bytes, and at most 255 are possible",
    "ü" * 140: r"has a name of 280 bytes, and at most 255 are possible",
    "/".join(
        ["d" * 200] * 25
    ): r"has 5,000 bytes, and at most 255 are possible in a name and 4,095 in a path",
}


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p[:15])
@pytest.mark.parametrize(
    "words",
    [
        "tokenize --corpus corpus.jsonl --run",
        "train --run",
        "explain --run",
        "report --run",
        "evaluate --run",
        "import records --files x.json --model m --run",
        f"export records --run run --model {MODEL} --out",
        f"export model --run run --model {MODEL} --out",
        f"export neuronpedia --run run --model {MODEL} --out",
        "view run --static",
        f"evaluate --run run --model {MODEL} --output",
        f"steer --run run --model {MODEL} --neurons 0:1 --zero --output",
    ],
)
@pytest.mark.fault(
    "a path below a file, in a loop of links, or too long", "one line before the work begins"
)
def test_paths_that_cannot_be(place, capsys, words, path):
    before = names(place)
    line = error_of(capsys, *words.split(), path)
    assert re.search(PATHS[path], line), line
    assert path[:40] in line
    assert re.search(r": (name|remove) (another|a shorter|a shorter one|or correct)", line)
    assert names(place) == before


@pytest.mark.parametrize("length", [235, 241, 242, 255])
def test_names_near_the_longest(tmp_path, length):
    path = tmp_path / ("n" * length)
    if length > 241:
        with pytest.raises(StorageError, match=rf"has {length} bytes, and at most 241"):
            write_json(path, 1)
        with pytest.raises(StorageError, match=rf"has {length} bytes, and at most 241"):
            check_target(path, "--out", "file")
        assert names(tmp_path) == []
    else:
        check_target(path, "--out", "file")
        write_json(path, 1)
        assert names(tmp_path) == [path.name]


def test_a_folder_where_a_file_is_expected(place, capsys):
    for words in (f"evaluate --run run --model {MODEL} --output run",):
        assert "--output run cannot be written: run is a folder, and a file is expected" in error_of(capsys, *words.split())  # fmt: skip
    with pytest.raises(StorageError, match="run is a folder, and a file is expected"):
        write_json(place / "run", {})


# ---- permissions, read-only disks, quotas ---------------------------------------------------------


@pytest.fixture(scope="module")
def read_only(tmp_path_factory):
    """The tiny run on a disk that is mounted read-only; only root can mount one."""
    disk = tmp_path_factory.mktemp("read_only")
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk cannot be mounted: {mounted.stderr.strip()}")
    copied(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize(
    "words",
    [
        "tokenize --corpus corpus.jsonl --run new",
        "train --run run --model crate-1l --steps 2",
        f"score --run run --model {MODEL} --force",
        "report --run run --force",
        f"export model --run run --model {MODEL} --out exported",
        f"predict --run run --models {MODEL} --text abc --device cpu",
        "view run --static pages",
    ],
)
@pytest.mark.fault(
    "a run on a disk that is mounted read-only",
    "verbs that only read work; verbs that write say so in one line before the work begins",
)
def test_a_read_only_disk(read_only, monkeypatch, capsys, words):
    monkeypatch.chdir(read_only)
    line = error_of(capsys, *words.split())
    assert f"cannot be written: {read_only} is mounted read-only" in line
    if words.startswith("tokenize"):  # once
        assert main(["check", "run"]) == 0
        assert main(["evaluate", "--run", "run", "--model", MODEL, "--device", "cpu"]) == 0
        assert Run("run").labelled(f"scores/{MODEL}").freshness().state == "fresh"


AS_NOBODY = (
    "import os, sys\n"
    "from cratelm.cli import main\n"
    "options = sys.argv[2:]\n"
    "if os.geteuid() == 0:\n"
    "    # `nobody` may be unable to read the packages: everything is imported before\n"
    "    assert main(['tokenize', '--run', sys.argv[1] + '/first', *options]) == 0\n"
    "    assert main(['tokenize', '--run', 'corpus.jsonl/x', *options]) == 2\n"
    "    os.setuid(65534)\n"
    "print('now', file=sys.stderr)\n"
    "sys.exit(main(['tokenize', '--run', sys.argv[1], *options]))\n"
)


@pytest.mark.fault("permission denied", "one line with the owner, the mode and who runs")
def test_permission_denied_names_the_owner(place):
    """Root may do everything, so that the command becomes `nobody`."""
    folder = place / "folder"
    folder.mkdir()
    for path in (place, *place.parents):
        if IS_ROOT and not path.stat().st_mode & 0o001:
            path.chmod(0o755)
    if not IS_ROOT:
        folder.chmod(0o555)
    process = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, "folder", "--corpus", "corpus.jsonl", "--quiet",
         *("--vocab-size", "320", "--fit", "0.3", "--held-out", "0.3", "--sequence-length", "16")],
        capture_output=True, text=True, cwd=place, timeout=100,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )  # fmt: skip
    folder.chmod(0o755)
    assert process.returncode == 2, process.stderr
    line = process.stderr.partition("now\n")[2].strip()
    assert re.fullmatch(
        r"cratelm tokenize: \S*folder/\S+ cannot be written: permission denied \(\S+ belongs to \w+, d\S+;"
        r" this process runs as \w+\): change the permissions, or name another path",
        line,
    ), line
    assert set(names(folder)) <= {p for p in names(folder) if p.startswith("first")}


def failing(monkeypatch, number: int, name: str = "mkdir") -> None:
    """A function of the system fails with an error number."""

    def fail(path, *arguments, **options):
        raise OSError(number, os.strerror(number), os.fspath(path))

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, r"the disk is full \(\S+ has [\d,.]+ [MG]B free, and more is needed\): free some"),
        (errno.EDQUOT, r"the quota of this disk is used up \(.* free, and more is needed\)"),
        (errno.EROFS, r"\S+ is mounted read-only: name a folder on a disk that can be written"),
        (errno.EACCES, r"permission denied \(\S+ belongs to \w+, d\S+; this process runs as \w+\)"),
        (errno.EPERM, r"permission denied \(\S+ belongs to"),
        (errno.EIO, r"the disk reports an error"),
        (errno.EFBIG, r"the file would be larger than this process may write"),
        (errno.EMFILE, r"this process has too many open files"),
    ],
)  # fmt: skip
@pytest.mark.fault("a read-only or failing disk, a quota", "one line that says which")
def test_each_fault_of_a_disk(tmp_path, monkeypatch, number, said):
    with monkeypatch.context() as patched:
        failing(patched, number)
        for write in (
            lambda: write_json(tmp_path / "new" / "x.json", 1),
            lambda: atomic_folder(tmp_path / "new" / "x").__enter__(),
            lambda: Run(tmp_path / "new").stage("tokens").write({}, {}).__enter__(),
        ):
            with pytest.raises(StorageError, match=said) as raised:
                write()
            assert raised.value.errno == number
            assert isinstance(raised.value, InputError)
            assert str(tmp_path / "new") in str(raised.value)
            assert ".tmp" not in str(raised.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", "disk is full"),
        ("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left", "disk is full"),
        ("Disk quota exceeded (os error 122)", "quota of this disk is used up"),
        ("Permission denied (os error 13)", "permission denied"),
        ("[enforce fail] . PytorchStreamWriter failed writing file data/3: file write failed", "error"),
        ("basic_ios::clear: iostream error", "error"),
    ],
)  # fmt: skip
def test_faults_that_libraries_report_in_their_text(tmp_path, text, said):
    """safetensors, pyarrow, tokenizers, torch: whatever class of exception they use."""
    with pytest.raises(StorageError, match=said) as raised, atomic_folder(tmp_path / "x"):
        raise RuntimeError(text)
    assert str(tmp_path / "x") in str(raised.value)
    assert names(tmp_path) == []


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("x"), KeyError("x"), FileNotFoundError(2, "no", "x"), ConnectionError("x")):  # fmt: skip
        with pytest.raises(type(error)), atomic_path(tmp_path / "x"):
            raise error
    assert storage_error(InputError("[Errno 28]")) is None
    assert names(tmp_path) == []


@pytest.mark.fault("a failing fsync", "an error; the old file stays")
def test_a_failing_fsync_is_an_error(tmp_path, monkeypatch):
    """Network file systems report a full disk only then."""
    write_json(tmp_path / "x.json", "old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match=r"x\.json cannot be written: the disk is full"):
            write_json(tmp_path / "x.json", "new")
        with pytest.raises(StorageError, match="the disk is full"), atomic_folder(tmp_path / "y"):
            pass
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '"old"\n'
    assert names(tmp_path) == ["x.json"]


def test_a_file_system_without_fsync_is_none(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EINVAL, "invalid")

    monkeypatch.setattr(os, "fsync", fail)
    write_json(tmp_path / "x.json", 1)
    assert names(tmp_path) == ["x.json"]


def test_a_failure_leaves_no_new_folders(tmp_path):
    with pytest.raises(ValueError, match="x"), atomic_folder(tmp_path / "a" / "b" / "c"):
        raise ValueError("x")
    assert names(tmp_path) == []


# ---- what killed commands left --------------------------------------------------------------------


def finish(run: Run, name: str = "m", size: int = 1, **options) -> None:
    with run.stage("model", name).write({"size": size}, {}, **options) as draft:
        (draft.path / "weights.txt").write_text("x", encoding="utf-8")
        (draft.path / "checkpoints").mkdir(exist_ok=True)
        draft.scratch.add("checkpoints")


HOLDER = json.dumps({"process": 1, "host": "h", "machine": atomic._machine(), "since": "2030"})
LEFTOVERS = [
    ".0123abcd.manifest.json.tmp",
    ".manifest.json.lock",
    "model/.m.lock",
    "model/.other.lock",
    "model/.0123abcd.m.tmp/half",
    "model/.m.old/half",
    "model/m/.evaluation.json.lock",
    "model/m/.0123abcd.evaluation.json.tmp",
    "model/m/.plan.json",
]


@pytest.mark.parametrize("by", ["is_finished", "force", "require"])
def test_the_next_command_removes_what_killed_ones_left(tmp_path, by):
    run = Run(tmp_path / "run")
    finish(run)
    before = names(tmp_path)
    for name in LEFTOVERS:
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HOLDER if path.suffix == ".lock" else "{}", encoding="utf-8")
    resumable = run.path / "model" / ".slow.partial"
    resumable.mkdir()
    stage = Run(run.path).stage("model", "m")
    if by == "require":
        stage.require()
    else:
        stage.is_finished({"size": 1}, {}, force=by == "force")
    assert resumable.is_dir()
    resumable.rmdir()
    assert names(tmp_path) == before


def test_what_is_not_ours_stays(tmp_path):
    """A run directory may be anybody's folder."""
    run = Run(tmp_path)
    finish(run)
    for name in (".config.old/x", ".config.new/x", "model/.config.old/x", ".vim.lock", "model/.x.lock", ".x.tmp"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine", encoding="utf-8")
    before = names(tmp_path)
    Run(tmp_path).stage("model", "m").require()
    assert names(tmp_path) == before


def test_a_new_result_that_was_not_moved_into_place_counts(tmp_path):
    run = Run(tmp_path / "run")
    finish(run, size=1)
    finish(run, name="new", size=2)
    (run.path / "model" / "new").rename(run.path / "model" / ".m.new")
    assert Run(run.path).stage("model", "m").is_finished({"size": 2}, {})
    assert names(run.path / "model") == ["m", "m/completed.json", "m/weights.txt"]


@pytest.mark.fault("the manifest lacks a finished stage", "the next command adds it")
def test_the_manifest_is_completed(tmp_path):
    run = Run(tmp_path / "run")
    finish(run, name="a")
    old = (run.path / "manifest.json").read_bytes()
    finish(run, name="b")
    new = (run.path / "manifest.json").read_bytes()
    for left in (old, b"{", None):
        (run.path / "manifest.json").unlink()
        if left is not None:
            (run.path / "manifest.json").write_bytes(left)
            os.utime(run.path / "manifest.json", (0, 0))
        Run(run.path).stage("model", "a").require()
        assert (run.path / "manifest.json").read_bytes() == new


def test_what_is_being_written_is_left_alone(tmp_path):
    run = Run(tmp_path / "run")
    finish(run)
    code = (
        "import sys, time; from cratelm.runs import Run\n"
        "with Run(sys.argv[1]).stage('model', 'other').write({}, {}) as draft:\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = names(run.path)
        Run(run.path).stage("model", "m").require()
        assert names(run.path) == before
    finally:
        process.kill()
        process.communicate()
    Run(run.path).stage("model", "m").require()
    assert names(run.path / "model") == ["m", "m/completed.json", "m/weights.txt"]


def test_locks_and_drafts_in_a_resumed_draft_are_none_of_its_files(tmp_path):
    """A kill while the record was written left both, and they were hashed with the result."""
    run = Run(tmp_path / "run")
    finish(run, resume=True)
    expected = run.stage("model", "m").require().outputs
    with contextlib.suppress(InputError), run.stage("model", "n").write({"size": 1}, {}, resume=True) as draft:  # fmt: skip
        with atomic_path(draft.path / "weights.txt") as temporary:
            temporary.write_text("x", encoding="utf-8")
            assert set(names(draft.path)) == {temporary.name, ".plan.json"}
        raise InputError("stop")
    finish(run, name="n", resume=True)
    assert run.stage("model", "n").require().outputs == expected


def test_a_draft_removed_in_part_is_not_resumed(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    with contextlib.suppress(InputError), run.stage("model", "m").write({"size": 1}, {}, resume=True) as draft:  # fmt: skip
        (draft.path / "checkpoint").write_text("x", encoding="utf-8")
        raise InputError("stop")

    def remove_half(path, **options):
        if path.exists():
            (path / "checkpoint").unlink()
            raise Killed

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        patched.setattr(atomic.shutil, "rmtree", remove_half)
        with run.stage("model", "m").write({"size": 2}, {}, resume=True):
            pass
    with run.stage("model", "m").write({"size": 1}, {}, resume=True) as draft:
        assert draft.fresh


@pytest.mark.parametrize("number", range(14))
@pytest.mark.fault(
    "a writer of the working directory is killed", "the whole old or the whole new folder is there"
)
def test_the_working_directory_is_not_lost_to_a_kill(tmp_path, monkeypatch, number):
    """It cannot be renamed, and is emptied and filled instead."""
    target = tmp_path / "here"
    target.mkdir()
    monkeypatch.chdir(target)
    for text in ("old", "new"):
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            kill_at(patched, number if text == "new" else 1000)
            with atomic_folder(target) as draft:
                (draft / "folder").mkdir()
                for name in ("a.txt", "b.txt", "folder/c.txt"):
                    (draft / name).write_text(text, encoding="utf-8")
    atomic.settle(Path("."))
    assert set(names(target)) == {"folder", "a.txt", "b.txt", "folder/c.txt"}
    assert len({p.read_text(encoding="utf-8") for p in target.rglob("*.txt")}) == 1
    atomic.clear(target)
    assert names(tmp_path) == ["here", *sorted(f"here/{name}" for name in names(target))]


LONG = "n" * 5000


@pytest.mark.parametrize(
    "words",
    [
        f"tokenize --run new --corpus corpus.jsonl --tokenizer {LONG}",
        f"tokenize --run new --corpus {LONG}",
        f"import authors {LONG} --out out",
        f"import authors x.pt --tokenizer {LONG} --out out",
        f"import sae {LONG} --out out",
        f"import records --files {LONG} --model m --run new",
        f"evaluate --run run --model {LONG}/x --device cpu",
        f"evaluate --run run --model {MODEL} --on mine={LONG} --device cpu",
        f"explain --run run --model {MODEL} --explainer hf:{LONG}",
        f"harvest --run run --model {MODEL} --sae {LONG}/x",
        f"view {LONG}",
        f"check {LONG}",
        f"demo --no-run {LONG}",
        "tokenize --run new --corpus corpus.jsonl --tokenizer ~nobody/x",
        "import authors ~nobody/x.pt --out out",
    ],
)
@pytest.mark.fault(
    "a path to read that no file system can have, or in the home of nobody",
    "one line of bounded length",
)
def test_paths_to_read_that_cannot_be(place, capsys, words):
    line = error_of(capsys, *words.split())
    assert len(line) < 3000
    assert "CRATELM_TRACEBACK" not in line, line


@pytest.mark.parametrize("reference", [LONG, f"{LONG}/x", f"x/{LONG}.pt", "~nobody/x.pt"])
def test_calls_with_paths_to_read_that_cannot_be(place, reference):
    import cratelm

    for call in (
        lambda: cratelm.api.import_authors(checkpoint=reference, out="out"),
        lambda: cratelm.api.tokenize(run="new", corpus="corpus.jsonl", tokenizer=reference),
        lambda: cratelm.api.evaluate(run="run", model=MODEL, on=(f"mine={reference}",)),
    ):
        with pytest.raises(InputError) as refused:
            call()
        assert "\n" not in str(refused.value)
