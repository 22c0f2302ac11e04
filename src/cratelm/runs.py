"""Run directory: where each stage puts its files, and what is finished.

```
runs/NAME/
  manifest.json                     every finished stage, gathered from the records below
  tokens/                           shards, tokenizer, documents
  model/MODEL/  activations/MODEL/  explanations/MODEL/  scores/MODEL/   one folder a model
  steer/MODEL/  analysis/MODEL/  sae/MODEL@NAME/                         likewise
  report/
```
A stage's folder is complete when it holds `completed.json`, written last. The record carries the
configuration, the identity of every input and a hash of every output file, so that a finished stage
is skipped, one whose inputs changed says so, and a folder without a record is never taken for done.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from cratelm.errors import InputError

StageName = Literal[
    "tokens",
    "model",
    "sae",
    "activations",
    "explanations",
    "scores",
    "steer",
    "analysis",
    "report",
]
STAGES: tuple[StageName, ...] = get_args(StageName)
RECORD = "completed.json"
PLAN = ".plan.json"
_VERSIONED = ("cratelm", "torch", "transformers", "tokenizers", "numpy", "pyarrow")


@dataclass(frozen=True)
class Completion:
    """What is written when a stage has finished."""

    stage: StageName
    name: str
    """model the stage is about; empty for stages of the whole run"""
    config: dict[str, Any]
    inputs: dict[str, str]
    """identity of each stage it read"""
    outputs: dict[str, str]
    """sha256 of each file it wrote, by path in the stage's folder"""
    identity: str
    """sha256 over configuration, inputs and outputs: changes when any of them does"""
    seconds: float
    """of the attempt that finished it; interrupted ones before are not counted"""
    finished_at: str
    """UTC, ISO 8601"""
    versions: dict[str, str]
    git_commit: str
    """commit of the source tree that ran, empty where cratelm was installed without one"""
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    """figures worth showing without opening the files (loss, tokens, counts)"""


class Run:
    """A run directory. Creating the object writes nothing.

    Raises `InputError` when the path exists and is not a directory.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(
                f"{self.path} is a file, a run directory was expected: name a folder with --run"
            )

    def stage(self, stage: StageName, name: str = "") -> "Stage":
        return Stage(self, stage, name)

    def models(self, stage: StageName = "model") -> list[str]:
        """Names of the models for which `stage` is finished, sorted."""
        root = self.path / stage
        if not root.is_dir():
            return []
        return sorted(p.parent.name for p in root.glob(f"[!.]*/{RECORD}"))

    def completions(self) -> list[Completion]:
        """Records of all finished stages, in the order of the line."""
        found = []
        for stage in STAGES:
            root = self.path / stage
            for record in [root / RECORD, *sorted(root.glob(f"[!.]*/{RECORD}"))]:
                if record.is_file():
                    found.append(_read_record(record))
        return found

    def write_manifest(self) -> None:
        write_json(
            self.path / "manifest.json",
            {"cratelm": 1, "stages": [dataclasses.asdict(c) for c in self.completions()]},
        )


class Stage:
    """One stage of a run, for one model where it is about one."""

    def __init__(self, run: Run, stage: StageName, name: str = ""):
        if name and (name != Path(name).name or name.startswith(".")):
            raise InputError(
                f"model name {name!r} cannot name a folder: use letters, digits, '-', '_' or '.'"
            )
        self.run, self.name = run, name
        self.stage: StageName = stage
        self.path = run.path / stage / name if name else run.path / stage

    @property
    def label(self) -> str:
        return f"{self.stage}/{self.name}" if self.name else self.stage

    def completion(self) -> Completion | None:
        """The record of the finished stage, or None where it has not finished."""
        record = self.path / RECORD
        return _read_record(record) if record.is_file() else None

    def require(self, verb: str) -> Completion:
        """The record of the finished stage; `InputError` naming `verb` where it has not finished."""
        done = self.completion()
        if done is None:
            model = f" --model {self.name}" if self.name else ""
            raise InputError(
                f"{self.path} is not there or not finished:"
                f" type `cratelm {verb} --run {self.run.path}{model}` first"
            )
        return done

    def is_finished(self, config: Any, inputs: Mapping[str, str], *, force: bool = False) -> bool:
        """True, and said so, where the stage was finished with this very configuration and these inputs.

        Raises `InputError` where it was finished with others: redoing would replace results, so
        that is asked for by `--force`. With `force`, always False.
        """
        done = self.completion()
        if done is None or force:
            return False
        changed = _differences(done.config, config_dict(config), "")
        changed += _differences(done.inputs, dict(inputs), "input ")
        if changed:
            raise InputError(
                f"{self.path} was finished with {'; '.join(changed[:3])}:"
                " add --force to redo it, or name another --run"
            )
        print(f"{self.label} is finished, skipped (--force redoes it)", flush=True)
        return True

    @contextlib.contextmanager
    def write(self, config: Any, inputs: Mapping[str, str], *, resume: bool = False):
        """Yields a `Draft` in a temporary folder; on leaving without an error the folder becomes the stage.

        On an error nothing of the stage changes, and the draft is removed. With `resume` the draft
        survives errors and kills, and the next `write` with `resume` finds it as it was left: the
        caller says what in it can be used (see `Draft.fresh`).
        """
        work = self.path.parent / f".{self.path.name}.partial"
        plan = {"config": config_dict(config), "inputs": dict(inputs)}
        fresh = not (resume and _read_plan(work) == plan)
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            write_json(work / PLAN, plan)
        draft = Draft(work, fresh)
        try:
            yield draft
        except BaseException:
            if not resume:
                shutil.rmtree(work, ignore_errors=True)
            raise
        self._finish(draft, plan)

    def _finish(self, draft: "Draft", plan: dict[str, Any]) -> None:
        left_out = {PLAN, RECORD, *draft.scratch, *draft.unhashed}
        outputs = {
            str(p.relative_to(draft.path)): hash_file(p)
            for p in sorted(draft.path.rglob("*"))
            if p.is_file() and left_out.isdisjoint(p.relative_to(draft.path).parts)
        }
        identity = hash_json({**plan, "outputs": outputs})
        record = Completion(
            stage=self.stage,
            name=self.name,
            config=plan["config"],
            inputs=plan["inputs"],
            outputs=outputs,
            identity=identity,
            seconds=round(time.monotonic() - draft.started, 3),
            finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            versions=versions(),
            git_commit=git_commit(),
            results=draft.results,
        )
        write_json(draft.path / RECORD, dataclasses.asdict(record))
        old = self.path.parent / f".{self.path.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            self.path.rename(old)
        draft.path.rename(self.path)
        # only now: killed before, the next attempt still finds plan and checkpoints
        (self.path / PLAN).unlink()
        for scratch in draft.scratch:
            shutil.rmtree(self.path / scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        self.run.write_manifest()


class Draft:
    """A stage in the making: write files under `path`, figures into `results`."""

    def __init__(self, path: Path, fresh: bool):
        self.path = path
        self.fresh = fresh
        """False where an interrupted attempt with the same configuration and inputs was found"""
        self.results: dict[str, Any] = {}
        self.scratch: set[str] = set()
        """names of folders directly in `path` that are removed when the stage finishes"""
        self.unhashed: set[str] = set()
        """names of files or folders whose content carries times and is left out of the identity"""
        self.started = time.monotonic()


def config_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as JSON values, less what does not change results.

    Fields whose metadata has `{"identity": False}` (`--run`, `--force`, device, workers ...) are left out.
    """
    if isinstance(config, Mapping):
        return json.loads(json.dumps(dict(config), default=str))
    kept = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.metadata.get("identity", True)
    }
    plain = {
        k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) and not isinstance(v, type) else v
        for k, v in kept.items()
    }
    return json.loads(json.dumps(plain, default=str))


def aside(default: Any) -> Any:
    """A dataclass field that does not enter the identity of a stage (where to run, how to show)."""
    return dataclasses.field(default=default, metadata={"identity": False})


def write_json(path: str | Path, value: Any) -> None:
    """Atomic: the file is either the old or the new one, whenever the process is killed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    temporary.replace(path)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, renamed to it on success, removed on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_commit() -> str:
    """Commit of the source tree this module lies in; empty where it is not in one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read_record(path: Path) -> Completion:
    try:
        return Completion(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read as a completion record ({error}):"
            f" delete the folder {path.parent} and run its stage again"
        ) from None


def _read_plan(work: Path) -> dict[str, Any] | None:
    try:
        return json.loads((work / PLAN).read_text())
    except (OSError, ValueError):
        return None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> list[str]:
    named = []
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key):
            before, now = str(old.get(key))[:40], str(new.get(key))[:40]
            if prefix:
                named.append(f"{prefix}{key} that has changed since")
            else:
                named.append(f"{key}={before}, now {now}")
    return named
