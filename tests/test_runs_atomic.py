"""Writing without loss: kills at any moment, two writers at once, what a killed one leaves, strict JSON."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cratelm.errors import InputError
from cratelm.runs import RECORD, Run, atomic, atomic_folder, atomic_path, lock, write_json

SOURCE = Path(__file__).parents[1] / "src"


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def write(path: Path, text: str) -> None:
    with atomic_folder(path) as draft:
        (draft / "a.txt").write_text(text, encoding="utf-8")
        (draft / "b.txt").write_text(text, encoding="utf-8")


def content(path: Path) -> set[str]:
    return {p.read_text(encoding="utf-8") for p in path.iterdir() if p.suffix == ".txt"}


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def python(code: str, *arguments: object, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# ---- folders and files ----------------------------------------------------------------------------


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "out"
    write(path, "old")
    with contextlib.suppress(ValueError), atomic_folder(path) as draft:
        (draft / "a.txt").write_text("new", encoding="utf-8")
        raise ValueError
    assert content(path) == {"old"}
    write(path, "new")
    assert content(path) == {"new"}
    assert names(tmp_path) == ["out"]


def test_the_working_directory_and_links_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "disk") == {"x"}
    monkeypatch.chdir(tmp_path / "disk")
    write(Path("."), "y")
    assert content(tmp_path / "disk") == {"y"}


def kill_at(monkeypatch, number: int) -> None:
    """The process dies in place of its renaming or removing of a file or folder number `number`."""
    left = [number]

    def counted(real):
        def step(*given, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*given, **options)

        return step

    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(atomic.shutil, "rmtree", counted(atomic.shutil.rmtree))


@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 3


def finish(run: Run, size: int, *, resume: bool) -> None:
    with run.stage("model", "m").write(Config(size), {"tokens": "t"}, resume=resume) as draft:
        (draft.path / "weights.txt").write_text(str(size), encoding="utf-8")
        (draft.path / "checkpoints").mkdir(exist_ok=True)
        draft.scratch.add("checkpoints")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("number", range(16))
def test_a_kill_at_any_step_leaves_the_old_or_the_new_stage(number, resume, tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    finish(run, 1, resume=resume)
    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        kill_at(patched, number)
        finish(run, 2, resume=resume)
    # Whoever comes next finds one of the two, whole, by its name and in the list.
    assert run.models() == ["m"]
    done = run.stage("model", "m").require("train")
    weights = (run.stage("model", "m").path / "weights.txt").read_text(encoding="utf-8")
    assert str(done.config["size"]) == weights
    assert weights in ("1", "2")
    # And the next writer leaves nothing of the killed one.
    finish(run, 3, resume=resume)
    assert names(run.path / "model") == ["m"]
    assert names(run.path / "model" / "m") == [RECORD, "weights.txt"]
    assert names(run.path) == ["manifest.json", "model"]


def test_a_kill_between_the_two_renames_keeps_the_new_result(tmp_path, monkeypatch):
    """Where 0.1.0 lost both: the old one was aside, the finished draft was removed by the next attempt."""
    run, seen = Run(tmp_path / "run"), []
    finish(run, 1, resume=False)
    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        real = Path.rename

        def rename(self, target):
            if Path(target).name == "m":
                seen.extend(names(run.path / "model"))
                raise Killed
            return real(self, target)

        patched.setattr(Path, "rename", rename)
        finish(run, 2, resume=False)
    assert seen == [".m.lock", ".m.new", ".m.old"]
    assert run.stage("model", "m").require("train").config == {"size": 2}
    assert names(run.path / "model") == ["m"]


def test_what_version_0_1_0_left_between_its_renames_comes_back(tmp_path):
    run = Run(tmp_path / "run")
    finish(run, 1, resume=False)
    (run.path / "model" / "m").rename(run.path / "model" / ".m.old")
    assert run.models() == ["m"]
    assert run.stage("model", "m").require("train").config == {"size": 1}


def test_drafts_have_names_of_their_own(tmp_path):
    """Of `a`, of `a.deadbeef` and of `deadbeef.a`: the next writer of one removes its leftovers alone."""
    for name in ("a", "a.deadbeef", "deadbeef.a"):
        draft = atomic.new_draft(tmp_path / name)
        atomic.resumable_draft(tmp_path / name).mkdir()
        assert draft != atomic.new_draft(tmp_path / name)
    before = names(tmp_path)
    write(tmp_path / "a", "x")
    removed = sorted(set(before) - set(names(tmp_path)))
    assert len(removed) == 3
    assert ".a.partial" in removed
    assert all(name == ".a.partial" or name[9:] == ".a.tmp" for name in removed)


def test_a_file_is_whole_and_its_leftovers_are_removed(tmp_path):
    path = tmp_path / "f.json"
    write_json(path, 1)
    for left in (".0123abcd.f.json.tmp", ".f.json.4711.tmp"):  # of today, of 0.1.0
        (tmp_path / left).write_text("half", encoding="utf-8")
    with contextlib.suppress(ValueError), atomic_path(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise ValueError
    assert json.loads(path.read_text(encoding="utf-8")) == 1
    assert names(tmp_path) == ["f.json"]


def test_files_and_folders_are_on_the_disk_before_they_stand(tmp_path, monkeypatch):
    order: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(number):
        order.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", lambda a, b: (order.append("rename"), rename(a, b))[1])
    write(tmp_path / "out", "x")
    first = order.index("rename")
    assert {"a.txt", "b.txt"} <= set(order[:first])
    assert order[first + 1] == tmp_path.name  # the rename itself


# ---- strict JSON ----------------------------------------------------------------------------------


def test_json_has_no_nan_and_is_utf8(tmp_path):
    path = tmp_path / "x.json"
    name = os.fsdecode(b"b\xff.jsonl")
    write_json(path, {"nan": math.nan, "deep": [{"inf": -math.inf}], name: name, "half": "\ud83d"})

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse)
    assert found == {"nan": None, "deep": [{"inf": None}], "b\\xff.jsonl": "b\\xff.jsonl", "half": "\\ud83d"}  # fmt: skip


def test_a_stage_with_a_name_that_is_not_utf8_is_finished_and_skipped(tmp_path):
    stage = Run(tmp_path).stage("tokens")
    config = {"corpus": os.fsdecode(b"b\xff.jsonl")}
    with stage.write(config, {}):
        pass
    assert stage.is_finished(config, {})


# ---- locks ----------------------------------------------------------------------------------------

HOLD = (
    "import sys, time; from cratelm.runs import Run\n"
    "with Run(sys.argv[1]).stage('model', 'm').write({}, {}, resume=True) as draft:\n"
    "    (draft.path / 'checkpoint').write_text('10'); print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that writes `model/m`."""
    process = python(HOLD, tmp_path / "run")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_writer_is_told_who_the_first_is(holder, tmp_path):
    run = Run(tmp_path / "run")
    who = rf"is being written by process {holder.pid} on \S+ since 20\d\d-\S+Z: wait"
    with pytest.raises(InputError, match=who), run.stage("model", "m").write({}, {}):
        pass
    for force in (False, True):  # at once, before any work
        with pytest.raises(InputError, match=who):
            run.stage("model", "m").is_finished({}, {}, force=force)
    # readers, and writers of other stages, are not held up
    assert run.stage("model", "m").completion() is None
    with run.stage("model", "other").write({}, {}):
        pass
    assert run.models() == ["other"]


def test_the_lock_of_a_dead_process_is_taken_over_and_its_draft_resumed(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    run = Run(tmp_path / "run")
    assert ".m.lock" in names(run.path / "model")
    assert not run.stage("model", "m").is_finished({}, {})
    with run.stage("model", "m").write({}, {}, resume=True) as draft:
        assert not draft.fresh
        assert (draft.path / "checkpoint").read_text(encoding="utf-8") == "10"
    assert names(run.path / "model") == ["m"]


def test_the_command_line_says_it_in_one_line_with_status_2(tmp_path):
    from tiny_run import MODEL, copied

    run = copied(tmp_path)
    with Run(run).stage("explanations", MODEL).lock():
        process = python(
            "from cratelm.cli import main; import sys; sys.exit(main(sys.argv[1:]))",
            *("explain", "--run", run, "--model", MODEL, "--neurons", "8", "--force"),
        )
        error = process.communicate(timeout=120)[1]
    assert process.returncode == 2, error
    assert error.count("\n") == 1
    assert f"explanations/{MODEL} is being written by process {os.getpid()} on " in error


def test_two_writers_at_once_do_not_mix(tmp_path):
    """One of them writes; the other is refused. In 0.1.0 both wrote into one draft."""
    run, told = Run(tmp_path / "run"), []
    start = threading.Barrier(2)

    def writer(text: str) -> None:
        start.wait()
        try:
            with run.stage("model", "m").write({}, {}) as draft:
                for name in ("a.txt", "b.txt"):
                    (draft.path / name).write_text(text, encoding="utf-8")
                    time.sleep(0.1)
        except InputError as error:
            told.append(str(error))

    threads = [threading.Thread(target=writer, args=(t,)) for t in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 1
    assert "is being written by" in told[0]
    assert len(content(run.path / "model" / "m")) == 1


def test_writers_of_a_file_wait_for_each_other(tmp_path):
    path = tmp_path / "f.json"
    threads = [threading.Thread(target=write_json, args=(path, n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(path.read_text(encoding="utf-8")) in range(8)
    assert names(tmp_path) == ["f.json"]


def test_a_lock_of_another_machine_counts_until_it_is_not_touched_any_more(tmp_path, monkeypatch):
    """On shared storage that does not pass locks on between machines."""
    path = tmp_path / "m"
    file = tmp_path / ".m.lock"
    holder = {"process": 7, "host": "node-3", "machine": "another boot", "since": "2030-01-01T00:00:00Z"}  # fmt: skip
    file.write_text(json.dumps(holder), encoding="utf-8")
    with pytest.raises(InputError, match=r"process 7 on node-3 since .* after 150 seconds"), lock(path):  # fmt: skip
        pass
    assert json.loads(file.read_text(encoding="utf-8")) == holder
    late = time.time() - atomic.EXPIRES - 1
    os.utime(file, (late, late))
    with lock(path):
        assert json.loads(file.read_text(encoding="utf-8"))["process"] == os.getpid()
    assert not file.exists()


def test_a_living_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "HEARTBEAT", 0.01)
    file = tmp_path / ".m.lock"
    with lock(tmp_path / "m"):
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime > 0


def test_a_lock_leaves_no_empty_folder(tmp_path):
    with lock(tmp_path / "steer" / "m"):
        assert (tmp_path / "steer").is_dir()
    assert names(tmp_path) == []


def test_who_holds_a_lock_may_take_it_again(tmp_path):
    with lock(tmp_path / "m"), lock(tmp_path / "m"):
        write(tmp_path / "m", "x")
    assert names(tmp_path) == ["m"]


def test_the_manifest_has_all_of_two_stages_that_finish_at_once(tmp_path):
    run = Run(tmp_path / "run")

    def writer(number: int) -> None:
        with run.stage("model", f"m{number}").write({}, {}):
            pass

    threads = [threading.Thread(target=writer, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    assert [s["name"] for s in manifest["stages"]] == [f"m{n}" for n in range(6)]
