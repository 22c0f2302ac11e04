"""Commands that are killed, and typed again: every file ends as if they had not been killed.

What is compared was written by a process with another hash seed, so that a set that is written in its order is
found, too. `make test` kills each command at a few of its file operations. The long form kills it at up to N operations,
evenly spread, and N times at a random moment, both for a new result and, with --force, over an old one; it also
continues with the next command instead of the same one, and draws all figures:

    CRATELM_KILLS=20 pytest -o addopts= tests/test_kills.py -s      # about half an hour on 2 cores
    CRATELM_KILLS=1000000 ...                                       # at every operation in turn
    CRATELM_KILLS=20 CRATELM_KILLED="train,sae train" ...           # these commands alone
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from kill_server import KillServer, Outcome
from tiny_run import MODEL, SOURCE

from cratelm.runs import RECORD, Run

MANY = int(os.environ.get("CRATELM_KILLS", "0"))
pytestmark = pytest.mark.timeout(0 if MANY else 300)


@dataclass(frozen=True)
class Command:
    """A command of the pipeline."""

    name: str
    words: str
    label: str = ""
    """label of the stage that it makes"""

    @property
    def arguments(self) -> list[str]:
        return self.words.split()

    @property
    def has_force(self) -> bool:
        return not self.name.startswith(("sae evaluate", "predict", "evaluate"))


OF_MODEL = f"--run run --model {MODEL}"
SMALL = (
    "--sequence-length 32 --batch-size 4 --validation-sequences 4 --device cpu --quiet"
    " --model-overrides hidden_size=8 num_attention_heads=2"
)
HARVEST = (
    "--tokens 1000 --top 4 --random 4 --per-bin 1 --context 8 --short-context 2 --pilot-tokens 128"
    " --device cpu --quiet"
)
SAE = "--architecture topk --k 2 --expansion 2 --name s --device cpu --quiet"
COMMANDS = (
    Command("tokenize", "tokenize --run run --corpus corpus.jsonl --vocab-size 320 --fit 0.3 --held-out 0.3 --sequence-length 16 --quiet", "tokens"),
    Command("train", f"train {OF_MODEL} --steps 5 --checkpoint-every 2 --log-every 1 --validate-every 2 {SMALL}", f"model/{MODEL}"),
    Command("harvest", f"harvest {OF_MODEL} {HARVEST}", f"activations/{MODEL}"),
    Command("explain", f"explain {OF_MODEL} --neurons 8 --quiet", f"explanations/{MODEL}"),
    Command("score", f"score {OF_MODEL} --resamples 100 --quiet", f"scores/{MODEL}"),
    Command("analyze", f"analyze {OF_MODEL} --tokens 200 --resamples 100 --device cpu --quiet", f"analysis/{MODEL}"),
    Command("effects", f"effects {OF_MODEL} --neurons 4 --tokens 100 --device cpu --quiet", f"steer/{MODEL}"),
    Command("sae train", f"sae train {OF_MODEL} --tokens 320 --batch-size 64 --checkpoint-minutes 0 --log-every 1 {SAE}", f"sae/{MODEL}@s"),
    Command("sae evaluate", f"sae evaluate {OF_MODEL} --sae s --tokens 200 --steered 2 --steered-tokens 64 --device cpu --quiet"),
    Command("report", "report --run run --resamples 100 --quiet", "report"),
    Command("evaluate", f"evaluate {OF_MODEL} --device cpu --quiet --output figures.json"),
    Command("predict", f"predict --run run --models {MODEL} --text abc --device cpu --quiet --out page.html"),
    Command("export records", f"export records {OF_MODEL} --out records --quiet"),
    Command("export model", f"export model {OF_MODEL} --out exported"),
    Command("export neuronpedia", f"export neuronpedia {OF_MODEL} --out neuronpedia --quiet"),
    Command("import records", "import records --files records --model other --run imported --quiet", "activations/other"),
    Command("view", "view run --static pages --neurons 4 --quiet"),
)  # fmt: skip
QUICK = ("tokenize", "train", "harvest", "explain", "score", "analyze", "effects", "sae train", "report", "predict", "export records")  # fmt: skip
if not MANY:
    COMMANDS = tuple(c for c in COMMANDS if c.name in QUICK)
CHOSEN = os.environ.get("CRATELM_KILLED", "")
NAMES = [c.name for c in COMMANDS if not CHOSEN or c.name in CHOSEN.split(",")]
COMMANDS = COMMANDS[: [c.name for c in COMMANDS].index(NAMES[-1]) + 2]  # and the one that follows


# ---- the run that was not killed ------------------------------------------------------------------


class Pipeline:
    """All commands one after another, with a copy of all files before each, and the outcome of each."""

    def __init__(self, server: KillServer, folder: Path):
        self.server, self.folder = server, folder
        self.work = folder / "work"
        """every command runs in this one folder, so that no path differs"""
        self.outcomes: dict[str, Outcome] = {}
        self.work.mkdir()
        shutil.copy(SOURCE / "corpus.jsonl", self.work)
        for command in COMMANDS:
            shutil.copytree(self.work, self._copy(command.name))
            outcome = server.run(command.arguments, self.work)
            assert outcome.status == 0, f"{command.name}: {outcome.output}"
            self.outcomes[command.name] = outcome
        shutil.copytree(self.work, self._copy("the end"))
        self._contents: dict[str, dict[str, object]] = {}

    def restore(self, name: str) -> None:
        """Put the working folder back to where it was before a command."""
        self.copy(name, self.work)

    def copy(self, name: str, target: Path) -> None:
        """Make a folder what the working folder was before a command."""
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self._copy(name), target)

    def contents_before(self, name: str) -> dict[str, object]:
        """Return the contents of the working folder before a command."""
        if name not in self._contents:
            self._contents[name] = contents(self._copy(name))
        return self._contents[name]

    def after(self, name: str) -> str:
        """Return the name of the next command."""
        names = [c.name for c in COMMANDS]
        return [*names, "the end"][names.index(name) + 1]

    def _copy(self, name: str) -> Path:
        return self.folder / f"before {name}"


def contents(folder: Path) -> dict[str, object]:
    """Return every file and folder below a folder with its content, except the times that are recorded."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = None if path.is_dir() else without_times(path)
    return found


def without_times(path: Path) -> object:
    data = path.read_bytes()
    if path.name in (RECORD, "manifest.json"):
        value = json.loads(data)
        for record in value.get("stages", [value]):
            # the checksum covers the times
            for name in ("seconds", "finished_at", "checksum"):
                record.pop(name, None)
        return json.dumps(value, sort_keys=True)
    if path.name == "timing.jsonl":
        return [json.loads(line)["step"] for line in data.splitlines()]
    return hashlib.sha256(data).hexdigest(), len(data)


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """Return the names of what is missing, left over or different."""
    lines = [f"left over: {name}" for name in sorted(found.keys() - expected.keys())]
    lines += [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    both = sorted(found.keys() & expected.keys())
    return lines + [f"different: {name}" for name in both if found[name] != expected[name]]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The run that was not killed; what is killed runs in a server with another hash seed."""
    verbs = [c.name for c in COMMANDS]
    first = KillServer(verbs, hash_seed=0, draw=bool(MANY))
    try:
        pipeline = Pipeline(first, tmp_path_factory.mktemp("kills"))
    finally:
        first.close()
    pipeline.server = KillServer(verbs, hash_seed=1, draw=bool(MANY))
    yield pipeline
    pipeline.server.close()


def stands(run: Path, label: str) -> bool:
    """Return whether a stage is finished and all its files are those of its record."""
    stage = Run(run).labelled(label)
    done = stage.completion()
    return done is not None and all(
        hashlib.sha256((stage.path / name).read_bytes()).hexdigest() == sha256
        for name, sha256 in done.outputs.items()
    )


# ---- kills ----------------------------------------------------------------------------------------


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers 1 to `count`, evenly spread."""
    if count <= most:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (most - 1)) for i in range(most)})


def chosen_operations(command: Command, outcome: Outcome) -> list[int]:
    """Return the operations at which a command is killed."""
    if MANY:
        return spread(outcome.operations, MANY)
    after = min(moved_into_place(command, outcome) + 1, outcome.operations)
    # before the first checkpoint, when the curves have lines already
    first = [
        n for n, label in enumerate(outcome.labels, 1) if label.endswith("checkpoints/partial")
    ]
    return sorted({*first[:1], outcome.operations // 2, after})


def moved_into_place(command: Command, outcome: Outcome) -> int:
    """Return the number of the operation that moves the result of a stage into place; else of the last rename."""
    folder, _, name = f"{run_of(command)}/{command.label}".rpartition("/")
    draft = rf"os\.rename {re.escape(folder)}/\.([0-9a-f]{{8}}\.)?{re.escape(name)}\.(tmp|partial)"
    pattern = draft if command.label else r"os\.rename .*"
    return max(n for n, label in enumerate(outcome.labels, 1) if re.fullmatch(pattern, label))


def run_of(command: Command) -> str:
    return "imported" if command.name == "import records" else "run"


def kill_and_repeat(
    pipeline: Pipeline, command: Command, *, force: bool, kill_at: int = 0, kill_after: float = 0.0
) -> list[str]:
    """Kill a command, type it again, and return what differs from a run that was not killed."""
    pipeline.restore(pipeline.after(command.name) if force else command.name)
    arguments = command.arguments + ["--force"] * force
    killed = pipeline.server.run(arguments, pipeline.work, kill_at=kill_at, kill_after=kill_after)
    if kill_at and killed.operations >= kill_at:  # with --force there can be fewer
        assert killed.status == -signal.SIGKILL, f"{command.name}: {killed.output}"
    if force and command.label and not stands(pipeline.work / run_of(command), command.label):
        return ["the old result is gone, and there is no new one"]
    # an export that stands is not written again without --force
    out = command.name.startswith(("export", "view")) and not force
    again = pipeline.server.run(arguments, pipeline.work)
    if out and again.status == 2 and "already" in again.output:
        again = pipeline.server.run([*arguments, "--force"], pipeline.work)
    if again.status:
        return [f"exit status {again.status}: {again.output}"]
    expected = pipeline.contents_before(pipeline.after(command.name))
    return differences(contents(pipeline.work), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.fault(
    "a command is killed at a file operation or at any other moment, with and without `--force`",
    "the same command ends with the files of one that was not killed; with `--force` the old result stays until then",
)
def test_a_killed_command_ends_with_the_same_files(pipeline, name):
    command = next(c for c in COMMANDS if c.name == name)
    outcome, failures, kills = pipeline.outcomes[name], [], 0
    draw, began = random.Random(), time.monotonic()
    for force in (False, True) if MANY and command.has_force else (False,):
        for number in chosen_operations(command, outcome):
            kills += 1
            if found := kill_and_repeat(pipeline, command, force=force, kill_at=number):
                label = outcome.labels[number - 1]
                failures.append(f"{force=}, operation {number} ({label}): {'; '.join(found[:6])}")
        for _ in range(MANY if MANY < 1000 else 20):
            kills += 1
            after = draw.uniform(0.001, outcome.seconds)
            if found := kill_and_repeat(pipeline, command, force=force, kill_after=after):
                failures.append(f"{force=}, after {after:.4f} s: {'; '.join(found[:6])}")
    if MANY:
        print(f"\n{name}: {kills} kills, {len(failures)} failures, {outcome.operations} operations,"
              f" {time.monotonic() - began:.0f} s")  # fmt: skip
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", NAMES if MANY else ["harvest"])
@pytest.mark.fault(
    "a command is killed after its result is in place",
    "the next command on the run completes the manifest and removes what was left",
)
def test_the_next_command_completes_what_a_killed_one_left(pipeline, name):
    """Killed after its result was moved into place: another command finds it, and removes the leftovers."""
    command = next(c for c in COMMANDS if c.name == name)
    following = next((c for c in COMMANDS if c.name == pipeline.after(name)), None)
    if not command.label or following is None or not following.label or name == "import records":
        pytest.skip("no stage, or no stage follows")
    outcome, failures = pipeline.outcomes[name], []
    moved = moved_into_place(command, outcome)
    for number in spread(outcome.operations - moved, MANY or 2):
        pipeline.restore(name)
        pipeline.server.run(command.arguments, pipeline.work, kill_at=moved + number)
        assert (pipeline.work / "run" / command.label / RECORD).is_file()
        again = pipeline.server.run(following.arguments, pipeline.work)
        found = [again.output] if again.status else []
        expected = pipeline.contents_before(pipeline.after(following.name))
        found += differences(contents(pipeline.work), expected)
        if found:
            label = outcome.labels[moved + number - 1]
            failures.append(f"operation {moved + number} ({label}): {'; '.join(found[:6])}")
    assert not failures, "\n".join(failures)


# ---- full disks -----------------------------------------------------------------------------------

FULL = NAMES if MANY else ["train", "harvest", "predict"]


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A disk of 20 MB; only root can mount one."""
    path = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(path)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def leave_free(disk: Path, n_bytes: int) -> None:
    """Fill a disk up to so many bytes."""
    available = shutil.disk_usage(disk).free
    with (disk / "filler").open("wb") as file:
        if available > n_bytes:
            os.posix_fallocate(file.fileno(), 0, available - n_bytes)


def used(disk: Path) -> int:
    return shutil.disk_usage(disk).used


@pytest.mark.parametrize("name", FULL)
@pytest.mark.fault(
    "the disk is full, also while a checkpoint is written",
    "one line with the path and the free bytes; nothing half-written; the same command continues once there is space",
)
def test_a_full_disk_is_said_in_one_line_and_nothing_is_lost(pipeline, small_disk, name):
    command = next(c for c in COMMANDS if c.name == name)
    work, filler = small_disk / "work", small_disk / "filler"
    expected = pipeline.contents_before(pipeline.after(name))
    before = pipeline.contents_before(name)
    pipeline.copy(pipeline.after(name), work)
    needed = used(small_disk)
    pipeline.copy(name, work)
    needed -= used(small_disk)
    shares = [i / MANY for i in range(MANY)] if MANY else [0, 0.5]
    failures = []
    for share in shares:
        pipeline.copy(name, work)
        leave_free(small_disk, int(share * needed))
        full = pipeline.server.run(command.arguments, work)
        found = differences(contents(work), before) if full.status else []
        found = [f for f in found if ".partial" not in f or "checkpoints" not in full_names(work)]
        lines = full.output.strip().splitlines()
        if full.status and not (
            full.status == 2
            and re.fullmatch(
                rf"cratelm {name}: \S+ cannot be written: the disk is full \(.* free, .*",
                lines[-1],
            )
            and "Traceback" not in full.output
            and "Exception ignored" not in full.output
        ):
            found.append(f"status {full.status}: {full.output}")
        filler.unlink()
        again = pipeline.server.run(command.arguments, work)
        found += [again.output] if again.status else differences(contents(work), expected)
        if found:
            failures.append(f"{share:.2f} of {needed:,} bytes free: {'; '.join(found[:6])}")
    if MANY:
        print(f"\n{name}: {len(shares)} full disks, {len(failures)} failures")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", ["train", "sae train"])
@pytest.mark.fault("a file may not grow beyond a limit of the system", "one line, no draft is left")
def test_a_file_that_may_not_be_written_to_its_end(pipeline, name):
    """By `ulimit -f`, which needs no root: in a checkpoint, and in the result."""
    command = next(c for c in COMMANDS if c.name == name)
    pipeline.restore(name)
    before = pipeline.contents_before(name)
    stopped = pipeline.server.run(command.arguments, pipeline.work, largest_file=3000)
    assert stopped.status == 2, stopped.output
    line = stopped.output.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"cratelm {name}: \S+ cannot be written: the file would be larger .*", line
    )
    assert "Traceback" not in stopped.output
    assert differences(contents(pipeline.work), before) == []
    again = pipeline.server.run(command.arguments, pipeline.work)
    assert again.status == 0, again.output
    expected = pipeline.contents_before(pipeline.after(name))
    assert differences(contents(pipeline.work), expected) == []


def full_names(folder: Path) -> set[str]:
    """Return the names of all files and folders below a folder."""
    return {path.name for path in folder.rglob("*")}
