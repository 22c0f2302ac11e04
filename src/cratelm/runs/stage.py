"""Stages of a run: their configurations and inputs, whether they are finished, and whether they are stale.

A stage's folder is complete when it contains `completed.json`, which is written last. This record has
the configuration, the identity of every input and a hash of every output file, so that a finished stage
is skipped, changed inputs are reported, and a folder without a record never counts as finished.

A stage may be used only if its whole chain of inputs is current. The record names the stage behind each
input; `Stage.freshness` follows these names up to the tokens and compares identities:

- an upstream stage that was redone with another result makes everything downstream of it stale;
- an upstream stage that was deleted (to save space) was not redone: what was made from it stays usable,
  unless a verb needs the missing files themselves;
- models and autoencoders from a folder or from the Hub are not stages. They are compared when they are
  opened, because hashing gigabytes in every verb would take minutes.
"""

import contextlib
import dataclasses
import json
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import cratelm.runs.atomic as atomic
import cratelm.runs.names as names
import cratelm.runs.skew as skew
from cratelm.errors import InputError
from cratelm.runs.arguments import checked_path
from cratelm.runs.config import Settings, known_fields, settings_of
from cratelm.runs.identity import git_commit, hash_file, hash_json, versions
from cratelm.runs.storage import check_opens
from cratelm.runs.verified import RECORD, VERIFIED, first_problem, note_large_files

_Result = TypeVar("_Result")
StageName = Literal[
    "tokens",
    "tuning",
    "model",
    "sae",
    "parts",
    "activations",
    "explanations",
    "scores",
    "steer",
    "analysis",
    "seeds",
    "replacement",
    "probes",
    "report",
    "study",
]
STAGES: tuple[StageName, ...] = get_args(StageName)
MANIFEST = "manifest.json"
PLAN = ".plan.json"
"""configuration and inputs of a draft, by which an interrupted draft is recognised, and the versions that
began it"""
FORMAT = 2
"""format of the records and files of a run. Version 0.1.0 wrote format 1, without a number; format 2
adds the stages behind the inputs, and the options, to each record. Every change gets a new number, and a
test that continues a run of the previous format."""
OLDEST_READ: dict[StageName, int] = dict.fromkeys(STAGES, 1)
"""oldest format of each stage that the current code reads; an older stage is redone. Tokens and models
are too expensive to redo: a change of their format must convert the old ones."""
RENAMED: dict[StageName, dict[str, str]] = {}
"""options that had another name in older records, by stage: from the old name to the current one"""
IMPORTED_CORPUS = "activation records"
"""name of the corpus in the record of tokens that `import records` made"""
_VERBS: dict[StageName, str] = {
    "tokens": "tokenize",
    "tuning": "tune",
    "model": "train",
    "sae": "sae train",
    "parts": "harvest",
    "activations": "harvest",
    "explanations": "explain",
    "scores": "score",
    "steer": "effects",
    "analysis": "analyze",
    "seeds": "seeds",
    "replacement": "replace",
    "probes": "probe",
    "report": "report",
    "study": "study",
}


@dataclass(frozen=True)
class Completion:
    """Record of a finished stage."""

    stage: StageName
    name: str
    """model that the stage is about; empty for stages of the whole run"""
    config: dict[str, Any]
    inputs: dict[str, str]
    """identity of everything that it read, by role: `tokens`, `model`, `activations` ..."""
    outputs: dict[str, str]
    """sha256 of each file it wrote, by path in the stage's folder"""
    identity: str
    """sha256 over configuration, inputs and outputs: changes when any of them does"""
    seconds: float
    """duration of the attempt that finished it; interrupted attempts before it are not counted"""
    finished_at: str
    """UTC, ISO 8601"""
    versions: dict[str, str]
    git_commit: str
    """commit of cratelm's own repository, with `+dirty` if it was changed; empty if there is none"""
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    """figures worth showing without opening the files (loss, tokens, counts)"""
    input_stages: dict[str, str] = dataclasses.field(default_factory=dict)
    """label of the stage behind an input, such as `model/crate-2l`, by role; other inputs are no stages"""
    options: list[str] = dataclasses.field(default_factory=list)
    """words of the command line that redo it, without `--run`"""
    format: int = 1
    """format in which the stage was written: see `FORMAT`"""
    checksum: str = ""
    """sha256 of all of the above, so that a changed record is noticed; earlier versions wrote none"""

    @property
    def label(self) -> str:
        """Return the stage and its name as one word, such as `tokens` or `model/crate-2l`."""
        return f"{self.stage}/{self.name}" if self.name else self.stage

    @property
    def is_untrained(self) -> bool:
        """Return whether the stage is a model without training: with its initial weights, or a null of another."""
        return self.stage == "model" and self.results.get("steps") == 0

    @property
    def verb(self) -> str:
        """Return the verb that made the stage, as it is typed after `cratelm`."""
        imported = self.config.get("import") == "records"
        if imported or self.config.get("corpus") == IMPORTED_CORPUS:
            return "import records"
        return verb_of(self.stage, self.name)


Inputs = Mapping[str, Completion | str]
"""what a stage reads, by role: the records of stages, and the identities of other inputs"""


def identity_of(value: Completion | str) -> str:
    """Return the identity of an input."""
    return value if isinstance(value, str) else value.identity


def verb_of(stage: StageName, name: str = "") -> str:
    """Return the verb that makes a stage, as it is typed after `cratelm`."""
    return "intervene" if stage == "steer" and names.split_set(name)[1] else _VERBS[stage]


@dataclass(frozen=True)
class Freshness:
    """Whether the inputs of a stage are still those that it was made from."""

    state: Literal["fresh", "stale", "missing"]
    """`missing`: the stage itself has not finished"""
    reason: str = ""
    """of a stale stage: what was redone since, as a clause"""
    commands: tuple[str, ...] = ()
    """of a stale stage: the commands that make it fresh, in order; none if its own record cannot be read"""

    @property
    def is_stale(self) -> bool:
        """Return whether an input was redone since."""
        return self.state == "stale"

    @property
    def to_type(self) -> str:
        """Return the commands, in words."""
        return ", then ".join(f"`{command}`" for command in self.commands)

    def __str__(self) -> str:
        if not self.is_stale:
            return self.state
        return f"{self.reason}: type {self.to_type}" if self.commands else self.reason


def stale_lines(stale: Mapping[str, Freshness]) -> list[str]:
    """Return a line per stale stage: why it is stale, and the commands that no earlier line names."""
    lines, typed = [], set()
    for label, freshness in stale.items():
        new = [command for command in freshness.commands if command not in typed]
        typed.update(new)
        lines.append(f"{label} is stale, {dataclasses.replace(freshness, commands=tuple(new))}")
    return lines


class Run:
    """A run directory. Creating the object writes nothing.

    Raises `InputError` if the path exists and is not a directory, or cannot be opened, or if a later version
    wrote the run.
    """

    def __init__(self, path: str | Path):
        self.path, self._is_tidy = checked_path("the path of the run", path), False
        check_opens(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(
                f"{self.path} is a file and not a run directory: name a folder with --run"
            )
        manifest = self.path / MANIFEST
        _check_format(manifest, (_json(manifest) or {}).get("format"))

    def is_begun(self) -> bool:
        """Return whether the directory has a manifest or the folder of a stage, finished or not."""
        return (self.path / MANIFEST).exists() or any((self.path / s).is_dir() for s in STAGES)

    def stage(self, stage: StageName, name: str = "") -> "Stage":
        """Return a stage of the run. Raises `InputError` for a name that cannot name a folder."""
        return Stage(self, stage, name)

    def models(self, stage: StageName = "model") -> list[str]:
        """Return the names of the models for which `stage` is finished, sorted."""
        root = self.path / stage
        if not root.is_dir():
            return []
        for kind in ("new", "old"):  # the process was killed while moving the folder into place
            for record in root.glob(f".?*.{kind}/{RECORD}"):
                atomic.recover_missing(root / record.parent.name[1 : -len(kind) - 1])
        return sorted(p.parent.name for p in root.glob(f"[!.]*/{RECORD}"))

    def labels(self) -> list[str]:
        """Return the labels of all finished stages, in the order of the pipeline."""
        single = [s for s in STAGES if (self.path / s / RECORD).is_file()]
        several = {s: [f"{s}/{name}" for name in self.models(s)] for s in STAGES}
        return [label for s in STAGES for label in ([s] if s in single else []) + several[s]]

    def labelled(self, label: str) -> "Stage":
        """Return the stage with a label such as `tokens` or `model/crate-2l`.

        Raises `InputError` if the label names no stage.
        """
        stage, _, name = label.partition("/")
        if stage not in STAGES:
            raise InputError(f"{label} names no stage: the stages are {', '.join(STAGES)}")
        return Stage(self, stage, name)

    def completions(self) -> list[Completion]:
        """Return the readable records of all finished stages, in the order of the pipeline."""
        records = []
        for label in self.labels():
            with contextlib.suppress(InputError):
                records.append(self.labelled(label).completion())
        return [done for done in records if done is not None]

    def stale(self, model: str) -> dict[str, Freshness]:
        """Return the stale stages of a model, its sets and its autoencoders, by label, in pipeline order."""
        labels = [label for label in self.labels() if _model_of(label) == model]
        by_label = {label: self.labelled(label).freshness() for label in labels}
        return {label: freshness for label, freshness in by_label.items() if freshness.is_stale}

    def stale_lines(self, model: str) -> list[str]:
        """Return a line per stale stage of a model, with what to type; each command appears once."""
        return stale_lines(self.stale(model))

    def null_controls(self, models: list[str] | set[str]) -> dict[str, str]:
        """Return the null controls among `models`, each with the trained model that it belongs to."""
        return names.null_controls(models, self.is_untrained)

    def is_untrained(self, model: str) -> bool:
        """Return whether `model` was saved without training, or is a harvest of such a model, by the records."""
        with contextlib.suppress(InputError):
            harvest = self.stage("activations", model).completion()
            of = model if harvest is None else str(harvest.config.get("model", ""))
            trained = self.stage("model", of).completion() if of else None
            return trained is not None and trained.is_untrained
        return False

    def tidy(self) -> None:
        """Complete what killed commands left: moves into place, drafts, locks, and the manifest.

        Drafts that resume stay. What another process is writing, or what cannot be written, is skipped.
        Once per object, which is once per command, because a run on a network file system may be large.
        """
        if self._is_tidy:
            return
        self._is_tidy = True
        _clear(self.path, *(self.path / stage for stage in STAGES))
        finished = [self.labelled(label) for label in self.labels()]
        _clear(*(stage.path for stage in finished))
        for stage in finished:
            if (stage.path / PLAN).exists():
                with contextlib.suppress(InputError, OSError), stage.lock():
                    _tidy(stage.path)
        if not self._is_in_manifest(finished):
            with contextlib.suppress(InputError, OSError):
                self.write_manifest()

    def _is_in_manifest(self, finished: list["Stage"]) -> bool:
        """Return whether the manifest has the current record of each finished stage."""
        manifest = self.path / MANIFEST
        written = manifest.stat().st_mtime_ns if manifest.is_file() else 0
        # The usual case is decided by times alone. A copied or restored run may have others.
        later = [s.path / RECORD for s in finished if _modified(s.path / RECORD) >= written]
        if not later:
            return True
        listed = (_json(manifest) or {}).get("stages", [])
        return all(_json(record) in listed for record in later)

    def write_manifest(self) -> None:
        """Write `manifest.json`: the records as they are, whichever version wrote them."""
        path = self.path / MANIFEST
        with atomic.lock(path, wait=10.0):  # so that the last one to finish has seen all records
            records, unreadable = [], {}
            for label in self.labels():
                record = self.labelled(label).path / RECORD
                try:
                    _read_record(record)
                    records.append(json.loads(record.read_text(encoding="utf-8")))
                except (InputError, OSError) as error:
                    unreadable[label] = str(error)
            manifest = {"format": FORMAT, "cratelm": versions().get("cratelm"), "stages": records}
            atomic.write_json(path, manifest | ({"unreadable": unreadable} if unreadable else {}))


class _CircularInputsError(InputError):
    """Completion records that name one another as inputs."""


class Stage:
    """One stage of a run: of one model, or of the whole run."""

    def __init__(self, run: Run, stage: StageName, name: str = ""):
        if name and (problem := names.problem_of(name)) and not _is_old_name(run, stage, name):
            shown = repr(name) if len(name) <= 60 else f"{name[:59]!r}…"
            raise InputError(
                f"the name {shown} cannot name a folder: it {problem}; use {names.USABLE}"
            )
        self.run, self.name = run, name
        self.stage: StageName = stage
        self.path = run.path / stage / name if name else run.path / stage

    @property
    def label(self) -> str:
        """Return the stage and its name as one word, such as `tokens` or `model/crate-2l`."""
        return f"{self.stage}/{self.name}" if self.name else self.stage

    # ---- reading ----------------------------------------------------------------------------------

    def completion(self) -> Completion | None:
        """Return the record of the stage, or None if it has not finished.

        Raises `InputError` if the record is damaged, or of a later format.
        """
        record = self.path / RECORD
        if not record.is_file():
            atomic.recover_missing(self.path)
        done = _read_record(record) if record.is_file() else None
        if done is not None and done.stage != self.stage:
            raise InputError(
                f"{record} is the record of {done.label}, not of {self.label}: copy it again from"
                f" elsewhere, or move the folder {self.path} away, which keeps its files, and run its"
                " stage again"
            )
        return done

    def require(self, verb: str = "") -> Completion:
        """Return the record of the stage, which is finished and whose whole chain of inputs is current.

        Raises `InputError`, which says what to type, if the stage has not finished (`verb` is the verb
        that makes it), was written in a format that is no longer read, or is stale.
        """
        self.run.tidy()
        done = self.completion()
        if done is None:
            verb = verb or verb_of(self.stage, self.name)
            raise InputError(
                f"{self.path} is missing or not finished:"
                f" type `{_first_command(self, verb, self.name)}` first"
            )
        freshness = self.freshness()
        if freshness.is_stale:
            raise InputError(f"{self.path} is out of date, {freshness}")
        return done

    def result(self, kind: type[_Result], **values: Any) -> _Result:
        """Return the figures of the finished stage as the dataclass `kind`, with its other fields in `values`.

        Figures that `kind` has no field for, which a later version may have recorded, are left out. A
        field that is added to `kind` needs a default: the records of earlier versions lack it. Raises
        `InputError` as `require` does, and where a figure without a default is missing.
        """
        figures = known_fields(kind, self.require().results)
        try:
            return kind(**{**figures, **values})
        except TypeError as error:
            raise InputError(
                f"{self.path / RECORD} lacks figures ({error}): type `{self.command()}` to make it again"
            ) from None

    def freshness(self) -> Freshness:
        """Return whether everything that the stage was made from, up to the tokens, is unchanged."""
        try:
            if self.completion() is None:
                return Freshness("missing")
            stale = self._stale()
        except InputError as error:
            # No command: to make it again over its files would lose them, such as trained weights.
            return Freshness("stale", f"because {error}")
        if not stale:
            return Freshness("fresh")
        return Freshness("stale", next(iter(stale.values())), tuple(_commands(self.run, stale)))

    def command(self, *, force: bool = True, model: str = "") -> str:
        """Return the command that redoes the stage with the options that it was made with.

        `model` names another model to do the same with.
        """
        with contextlib.suppress(InputError):
            done = self.completion()
            if done is not None:
                return _command(self, done, force=force, model=model)
        model = model or names.split_set(self.name)[0]
        command = _first_command(self, verb_of(self.stage, self.name), model)
        return f"{command}{' --force' if force else ''}"

    def _stale(self, downstream: tuple[str, ...] = ()) -> dict[str, str]:
        """Return the labels of the stale stages, upstream first and this one last, each with its reason.

        `downstream` are the stages from which the chain of inputs has led here. Raises `InputError` if
        records that were edited or mixed up lead in a circle.
        """
        chain = (*downstream, self.label)
        if self.label in downstream:
            raise _CircularInputsError(
                f"its records name one another as inputs ({' <- '.join(chain)}): copy"
                f" {self.path / RECORD} again from elsewhere"
            )
        done = self.completion()
        if done is None:
            return {}
        if done.format < OLDEST_READ[self.stage]:
            return {self.label: f"because {self.label} has an older format ({done.format})"}
        stale: dict[str, str] = {}
        reason = ""
        for role, label in _input_stages(self.run, done).items():
            upstream = self.run.labelled(label)
            try:
                current = upstream.completion()
                stale |= upstream._stale(chain)
            except _CircularInputsError:
                raise
            except InputError as error:
                reason = reason or f"because the record of {label} cannot be read ({error})"
                continue
            if current is not None and current.identity != done.inputs[role]:
                reason = reason or f"because {self.label} was made from an earlier {label}"
        if reason or stale:
            stale[self.label] = reason
        return stale

    # ---- writing ----------------------------------------------------------------------------------

    def is_finished(self, config: Any, inputs: Inputs, *, force: bool = False) -> bool:
        """Return True, and print a line, if the stage finished with this configuration and these inputs.

        An option that the record lacks counts as its default, so that a version with more options skips
        what an older version finished. Raises `InputError` if the stage finished with another
        configuration or other inputs, because redoing it would replace results (`--force` allows that),
        and if another process is writing it. With `force`, always returns False.
        """
        self.run.tidy()
        if force or not self._is_finished(settings_of(config), inputs):
            atomic.check_unlocked(self.path)
            return False
        print(f"{self.label} is finished, skipped (--force redoes it)", flush=True)
        return True

    def is_current(self, config: Any) -> bool:
        """Return whether the stage finished with this configuration, and nothing that it was made from has changed since."""
        done = self.completion()
        if done is None or _differences(done.config, settings_of(config)):
            return False
        return not self.freshness().is_stale

    def _is_finished(self, settings: Settings, inputs: Inputs) -> bool:
        done = self.completion()
        if done is None:
            return False
        if done.format < OLDEST_READ[self.stage]:
            version = done.versions.get("cratelm", "an earlier version")
            print(
                f"{self.label} was written by cratelm {version} in an older format ({done.format},"
                f" oldest read {OLDEST_READ[self.stage]}): it will be redone",
                flush=True,
            )
            return False
        changed = _differences(done.config, settings)
        for role in sorted({*done.inputs, *inputs}):
            if done.inputs.get(role) != identity_of(inputs.get(role, "")):
                changed.append(f"input {role} that has changed since")
        if changed:
            raise InputError(
                f"{self.path} was finished with {'; '.join(changed[:3])}:"
                " add --force to redo it, or name another --run"
            )
        if found := first_problem(self.path):
            path, problem = found
            raise InputError(
                f"{path} is damaged ({problem}): type `{self.command()}` to make it again"
            )
        return True

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Return a lock that keeps other processes from writing the stage; readers are not blocked.

        Acquiring it raises `InputError`, which says who the writer is, if another process is writing the
        stage. `write` acquires the lock itself: this is for verbs that do expensive work before they write.
        """
        return atomic.lock(self.path)

    def remove(self) -> None:
        """Remove the stage, whose content another stage has taken over.

        Raises `InputError` if another process is writing it.
        """
        with self.lock():
            atomic.remove_folder(self.path)
            self.run.write_manifest()

    @contextlib.contextmanager
    def write(self, config: Any, inputs: Inputs, *, resume: bool = False) -> Iterator["Draft"]:
        """Yield a `Draft` in a temporary folder, which becomes the stage if no error is raised.

        On an error the stage stays as it was, and the draft is removed. With `resume` the draft survives
        errors and kills, and the next `write` with `resume` finds it as it was left: the caller decides
        what in it can be used (see `Draft.fresh`). Raises `InputError` if another process is writing the
        stage.
        """
        settings = settings_of(config)
        git_commit()  # read (and cached) now: there may be another commit while the stage runs
        with self.lock():
            atomic.recover(self.path)
            plan = {
                "config": settings.values,
                "inputs": {role: identity_of(value) for role, value in inputs.items()},
            }
            draft = self._draft(plan, resume)
            read = {v.label: v.versions for v in inputs.values() if isinstance(v, Completion)}
            skew.say_inputs(self.label, read, versions())
            try:
                yield draft
                self._finish(draft, plan, settings, inputs)
            except BaseException:
                if not resume:
                    shutil.rmtree(draft.path, ignore_errors=True)
                raise

    def _draft(self, plan: dict[str, Any], resume: bool) -> "Draft":
        if not resume:
            atomic.remove_drafts(self.path)
            return Draft(atomic.new_draft(self.path), fresh=True)
        work = atomic.resumable_draft(self.path)
        fresh = _read_plan(work) != plan
        atomic.remove_drafts(self.path, resumable=fresh)
        made_with = {**versions(), "commit": git_commit()}
        if fresh:
            work.mkdir(parents=True)
            atomic.write_json(work / PLAN, {**plan, "versions": made_with})
        else:
            begun_with = (_json(work / PLAN) or {}).get("versions")  # none in drafts of 0.1.0
            skew.say_resumed(
                self.label, begun_with if isinstance(begun_with, dict) else {}, made_with
            )
        return Draft(work, fresh)

    def _finish(
        self, draft: "Draft", plan: dict[str, Any], settings: Settings, inputs: Inputs
    ) -> None:
        excluded = {PLAN, RECORD, VERIFIED, *draft.scratch, *draft.unhashed}
        outputs = {
            str(p.relative_to(draft.path)): hash_file(p)
            for p in sorted(draft.path.rglob("*"))
            if p.is_file() and excluded.isdisjoint(p.relative_to(draft.path).parts)
        }
        labels = {r: v.label for r, v in inputs.items() if isinstance(v, Completion)}
        record = Completion(
            stage=self.stage,
            name=self.name,
            config=plan["config"],
            inputs=plan["inputs"],
            outputs=outputs,
            identity=hash_json({**plan, "outputs": outputs}),
            seconds=round(time.monotonic() - draft.started, 3),
            finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            versions=versions(),
            git_commit=git_commit(),
            results=draft.results,
            input_stages=labels,
            options=list(settings.options),
            format=FORMAT,
        )
        note_large_files(draft.path, outputs)
        values = json.loads(json.dumps(atomic.strict(dataclasses.asdict(record))))
        values["checksum"] = _checksum(values)
        atomic.write_json(draft.path / RECORD, values)
        atomic.write_json(draft.path / PLAN, {**plan, "scratch": sorted(draft.scratch)})
        atomic.put_in_place(draft.path, self.path)
        # Last: after a kill before this line, the next attempt still finds plan and checkpoints.
        _tidy(self.path)
        self.run.write_manifest()


class Draft:
    """An unfinished stage: write files under `path`, and figures into `results`."""

    def __init__(self, path: Path, fresh: bool):
        self.path = path
        self.fresh = fresh
        """False if the draft of an interrupted attempt with the same configuration and inputs is reused"""
        self.results: dict[str, Any] = {}
        """figures for the completion record"""
        self.scratch: set[str] = set()
        """names of folders directly in `path` that are removed when the stage finishes"""
        self.unhashed: set[str] = set()
        """names of files or folders whose content includes times and is not part of the identity"""
        self.started = time.monotonic()


def _model_of(label: str) -> str:
    return names.split_set(label.partition("/")[2])[0]


def _clear(*folders: Path) -> None:
    """Clear what killed writers left directly in the folders, where that is possible."""
    for folder in folders:
        atomic.clear_interrupted(folder, RECORD)


def _is_old_name(run: Run, stage: StageName, name: str) -> bool:
    """Return whether `name`, which could not be given today, is that of a folder of an earlier version."""
    if name != Path(name).name or name.startswith("."):
        return False
    with contextlib.suppress(OSError):  # a name that is too long for any folder
        return (run.path / stage / name / RECORD).is_file()
    return False


def _check_format(path: Path, written_in: Any) -> None:
    """Raise `InputError` if the file `path` says that a later version wrote it."""
    if isinstance(written_in, int) and written_in > FORMAT:
        raise InputError(
            f"{path} was written by a later version of cratelm (format {written_in}, this one reads up"
            f" to {FORMAT}): upgrade cratelm, or name another --run"
        )


def _tidy(folder: Path) -> None:
    """Remove files that were needed only while the stage was made."""
    plan = _json(folder / PLAN) or {}
    for scratch in plan.get("scratch", []):
        shutil.rmtree(folder / scratch, ignore_errors=True)
    (folder / PLAN).unlink(missing_ok=True)


def _read_record(path: Path) -> Completion:
    """Return the record in a file, without keys that this version does not know.

    Raises `InputError` if it is damaged, or of a later format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        _check_format(path, value.get("format", 1))
        if value.get("checksum") and value["checksum"] != _checksum(value):
            raise ValueError("its content is not what its stage wrote")
        done = Completion(**known_fields(Completion, value))
        for name, hint in get_type_hints(Completion).items():
            if not _is_of(getattr(done, name), hint):
                raise TypeError(f"{name} cannot be {getattr(done, name)!r:.40}")
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as a completion record ({error}): copy it again from elsewhere, or"
            f" move the folder {path.parent} away, which keeps its files, and run its stage again"
        ) from None
    renamed = RENAMED.get(done.stage, {})
    config = {renamed.get(name, name): value for name, value in done.config.items()}
    return dataclasses.replace(done, config=config)


def _is_of(value: Any, hint: Any) -> bool:
    """Return whether a value from JSON is of the type of a field of `Completion`."""
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_is_of(v, get_args(hint)[1]) for v in value.values())
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of(v, get_args(hint)[0]) for v in value)
    return isinstance(value, int | float if hint is float else hint)


def _checksum(record: Mapping[str, Any]) -> str:
    return hash_json({name: value for name, value in record.items() if name != "checksum"})


def _modified(path: Path) -> int:
    """Return the time of the last change of a file, in nanoseconds; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read_plan(work: Path) -> dict[str, Any] | None:
    plan = _json(work / PLAN)
    return {k: v for k, v in plan.items() if k in ("config", "inputs")} if plan else None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _differences(old: Mapping[str, Any], settings: Settings) -> list[str]:
    """Return, in words, the options whose values differ between a record and the current settings."""
    differences = []
    for key in sorted({*old, *settings.values}):
        before = _with_defaults(old, settings.defaults, key)
        now = settings.values.get(key)
        if before != now:
            differences.append(f"{key}={str(before)[:40]}, now {str(now)[:40]}")
    return differences


def _with_defaults(old: Mapping[str, Any], defaults: Mapping[str, Any], key: str) -> Any:
    """Return the recorded value of an option, missing parts filled in from the defaults at any depth."""
    value, default = old.get(key, defaults.get(key)), defaults.get(key)
    if isinstance(value, dict) and isinstance(default, dict):
        return {k: _with_defaults(value, default, k) for k in {*value, *default}}
    return value


# ---- the stages behind the inputs -----------------------------------------------------------------


def _input_stages(run: Run, done: Completion) -> dict[str, str]:
    """Return the label of the stage behind each input, by role."""
    if done.format > 1:
        return {role: label for role, label in done.input_stages.items() if role in done.inputs}
    return {role: label for role in done.inputs if (label := _label_of_format_1(run, done, role))}


def _label_of_format_1(run: Run, done: Completion, role: str) -> str:
    """Return the stage behind an input of a record of version 0.1.0; an empty string if there is none.

    Those records have only identities; which stage it was follows from the configuration.
    """
    if done.stage == "report":  # its roles are labels
        stage = role.partition("/")[0]
        return role if stage in STAGES else ""
    model = str(done.config.get("model", ""))
    harvest = names.split_set(done.name)[0]
    if role == "tokens":
        return "tokens"
    if role == "activations":
        return f"activations/{harvest}"
    if role == "model" and "/" not in model and not done.inputs[role].startswith("hub:"):
        return f"model/{model}"
    sae = str(done.config.get("sae") or "")
    if role == "sae" and "/" not in sae:
        return f"sae/{names.set_name(Path(model).name, sae)}"
    if role == "explanations":
        return _explanations_of_format_1(run, done, harvest)
    return ""


def _explanations_of_format_1(run: Run, done: Completion, harvest: str) -> str:
    """Return the label of the explanations that scores of version 0.1.0 read.

    Scores by a language model do not record the set if it was the model's own.
    """
    named = str(done.config.get("explanations") or "")
    if named == "promoted":
        return f"steer/{harvest}"
    of_same_model = f"explanations/{names.set_name(harvest, names.split_set(done.name)[1])}"
    if named:
        return f"explanations/{names.set_name(harvest, '' if named == 'free' else named)}"
    if not done.config.get("name"):
        return of_same_model
    for name in run.models("explanations"):
        candidate = run.stage("explanations", name).completion()
        if candidate is not None and candidate.identity == done.inputs["explanations"]:
            return candidate.label
    return of_same_model


# ---- commands -------------------------------------------------------------------------------------


def _commands(run: Run, stale: Mapping[str, str]) -> list[str]:
    """Return the commands that redo the stale stages, upstream first, without duplicates."""
    return list(dict.fromkeys(run.labelled(label).command() for label in stale))


def _first_command(stage: Stage, verb: str, model: str) -> str:
    """Return the command that makes a stage of `model` (empty for the whole run), for one that has no record."""
    options = names.training_words(model) if verb == "train" else ["--model", model]
    words = ["cratelm", *verb.split(), "--run", str(stage.run.path)]
    return shlex.join([*words, *(options if model else [])])


def _command(stage: Stage, done: Completion, *, force: bool, model: str = "") -> str:
    options = list(done.options) or _options_in(done)
    if model and "--model" in options:
        options[options.index("--model") + 1] = model
    words = ["cratelm", *done.verb.split(), "--run", str(stage.run.path), *options]
    if done.stage == "model" and "--name" not in words and done.name != usual_name(done):
        words += ["--name", done.name]  # records of versions that did not name the seed
    return shlex.join(words + ["--force"] * force)


def usual_name(done: Completion) -> str:
    """Return the name that `cratelm train` gives by default to a model with this record's options."""
    config = done.config
    return names.model_name(
        str(config.get("model")),
        steps=config.get("steps"),
        freeze=config.get("freeze", ()),
        null=config.get("null"),
        seed=config.get("seed", 0),
    )


def _options_in(done: Completion) -> list[str]:
    """Return every option that the configuration has a value for: records of format 1 have no options."""
    config = dict(done.config)
    if config.pop("import", None):
        config["model"] = config.pop("name")
    if done.stage == "model":
        config["name"] = "" if done.name == usual_name(done) else done.name
    words = []
    for name, value in config.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value not in (None, "", [], False):
            items = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, items)]
    return words
