"""`cratelm check`: whether a run is sound, whole and current.

Every recorded file is hashed again, every other file that a verb writes is parsed, and the names that writers
give to drafts and locks are looked for. No result is changed: `.verified` notes which large
files were found to be sound (see `cratelm.runs.verified`), and the lock of a dead process is removed.
"""

import contextlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from cratelm.errors import InputError
from cratelm.runs.atomic import check_unlocked
from cratelm.runs.check_config import CheckConfig
from cratelm.runs.identity import versions
from cratelm.runs.reading import damaged, read_json, read_json_lines, reading
from cratelm.runs.stage import FORMAT, MANIFEST, STAGES, Run, Stage
from cratelm.runs.storage import temporary_name
from cratelm.runs.verified import RECORD, hash_again, recorded_files

FindingKind = Literal["damaged", "stale", "left over", "unfinished", "version"]
KINDS: dict[FindingKind, int] = {
    "damaged": 5,
    "stale": 4,
    "left over": 4,
    "unfinished": 0,
    "version": 0,
}
"""exit status that a finding of each kind calls for: an interrupted command can be continued, and results of
another version are as good as they were"""
_COMPARED = ("cratelm", "torch", "transformers", "tokenizers")
"""versions that may change results"""


@dataclass(frozen=True)
class Finding:
    """Something about a run that its owner should know."""

    kind: FindingKind
    what: str
    """what was found and where, and what to type or to do"""

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


@dataclass(frozen=True)
class CheckResult:
    """What `cratelm check` found."""

    run: Path
    n_stages: int
    """finished stages"""
    n_files: int
    """files that were hashed or parsed"""
    n_bytes: int
    findings: tuple[Finding, ...]

    @property
    def exit_status(self) -> int:
        """Return 0 if all is well, 4 if something is stale or left over, 5 if something is damaged."""
        return max((KINDS[finding.kind] for finding in self.findings), default=0)

    def __str__(self) -> str:
        size = f"{self.n_bytes / 1e6:,.1f} MB"
        read = f"{self.n_stages} stages, {self.n_files} files, {size} read"
        counts = {k: sum(f.kind == k for f in self.findings) for k in KINDS}
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        return "\n".join([*map(str, self.findings), f"{self.run}: {read}: {told or 'all is well'}"])


def check(config: CheckConfig) -> CheckResult:
    """Verify every file of a run, and look for what is stale, left over, or from another version.

    Memory: one Parquet row group. Raises `InputError` if there is no run at the path.
    """
    run = Run(config.run)
    if not run.is_begun():
        raise InputError(
            f"{run.path} has no stage of a run: name a run directory, `cratelm check runs/NAME`"
        )
    stages = list(_stages(run))
    files = [path for stage in stages for path in _files_of(stage)]
    files += [path for path in sorted(run.path.iterdir()) if path.suffix in _PARSERS]
    findings = list(_unreadable(stages))
    n_bytes = 0
    for path in _progress(files, config.quiet):
        findings += [Finding("damaged", what) for what in _damage(path)]
        n_bytes += path.stat().st_size if path.is_file() else 0
    findings += _manifest(run)
    findings += [
        Finding("stale", f"{s.label} is stale, {f}")
        for s in stages
        if (f := s.freshness()).is_stale
    ]
    findings += _leftovers(run)
    findings += _versions(stages)
    order = {kind: number for number, kind in enumerate(KINDS)}
    findings.sort(key=lambda finding: order[finding.kind])
    return CheckResult(run.path, len(stages), len(files), n_bytes, tuple(findings))


# ---- what belongs to a run ------------------------------------------------------------------------


def _stages(run: Run) -> Iterator[Stage]:
    """Yield the finished stages, whether or not their records can be read."""
    return map(run.labelled, run.labels())


def _files_of(stage: Stage) -> list[Path]:
    """Return the recorded files of a stage, also missing ones, and others that can be parsed."""
    recorded = {stage.path / name for name in recorded_files(stage.path)}
    others = {
        path
        for path in stage.path.rglob("*")
        if path.is_file() and path.suffix in _PARSERS and path.name != RECORD
    }
    return sorted(recorded | others)


def _progress(files: list[Path], quiet: bool) -> Iterable[Path]:
    from tqdm import tqdm

    return tqdm(files, desc="check", unit="file", disable=quiet or len(files) < 100)


# ---- damage ---------------------------------------------------------------------------------------


def _unreadable(stages: list[Stage]) -> Iterator[Finding]:
    for stage in stages:
        try:
            stage.completion()
        except InputError as error:
            yield Finding("damaged", str(error))


def _damage(path: Path) -> Iterator[str]:
    """Yield what is wrong with a file, as a sentence with a remedy."""
    if problem := hash_again(path):
        yield str(damaged(path, problem))
        return
    parse = _PARSERS.get(path.suffix)
    if parse is not None and path.is_file():
        try:
            parse(path)
        except InputError as error:
            yield str(error)


def _parse_json(path: Path) -> None:
    """Read a JSON file, whatever its content: a configuration of transformers may be an array."""
    with reading(path, "JSON"):
        json.loads(path.read_text(encoding="utf-8"))


def _parse_parquet(path: Path) -> None:
    """Read every row group, which checks what a footer does not."""
    with reading(path, "a Parquet file"), pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            file.read_row_group(group)


def _parse_sqlite(path: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as file:
            problems = [row[0] for row in file.execute("PRAGMA quick_check")]
    except sqlite3.Error as error:
        problems = [str(error)]
    if problems != ["ok"]:
        raise InputError(
            f"{path} is damaged ({problems[0]}): restore it from a copy, or move it away and ask the"
            " language model again"
        )


_PARSERS = {
    ".json": _parse_json,
    ".jsonl": read_json_lines,
    ".parquet": _parse_parquet,
    ".sqlite": _parse_sqlite,
}
"""how to read files by the end of their name, beside comparing their hash"""


def _manifest(run: Run) -> Iterator[Finding]:
    """Yield what is wrong with `manifest.json`, which the next stage that finishes writes again."""
    path = run.path / MANIFEST
    if not path.is_file():
        yield Finding("left over", f"{path} is missing: the next stage that finishes writes it")
        return
    remedy = "the next stage that finishes writes it again"
    try:
        content = read_json(path)
        listed = {(s["stage"], s["name"]): s["identity"] for s in content["stages"]}
    except (InputError, KeyError, TypeError) as error:
        yield Finding("damaged", f"{path} cannot be read ({error}): {remedy}")
        return
    if listed != {(c.stage, c.name): c.identity for c in run.completions()}:
        yield Finding("left over", f"{path} does not list the stages that are there: {remedy}")


# ---- leftovers ------------------------------------------------------------------------------------


def _leftovers(run: Run) -> Iterator[Finding]:
    folders = [run.path, *(run.path / stage for stage in STAGES if (run.path / stage).is_dir())]
    for folder in folders:
        for path in sorted(folder.iterdir()):
            found = temporary_name(path.name)
            if found is not None:
                yield from _draft(path, *found)
            elif path.is_dir() and folder != run.path and _is_unfinished(path):
                yield Finding(
                    "left over", f"{path} has no {RECORD}: no verb finished it; move it away"
                )


def _is_unfinished(path: Path) -> bool:
    """Return whether a folder beside the stages of models is none: neither it nor its parent has a record."""
    return not (path / RECORD).is_file() and not (path.parent / RECORD).is_file()


def _draft(path: Path, name: str, kind: str) -> Iterator[Finding]:
    target = path.with_name(name)
    try:
        check_unlocked(target)
    except InputError as error:
        if kind == "lock":
            yield Finding("unfinished", str(error))
        return
    if not path.exists():  # a lock whose holder is dead: looking has removed it
        return
    if kind == "partial":
        yield Finding(
            "unfinished",
            f"{path} is an interrupted attempt: the command that began it continues it, with the same"
            " options",
        )
        return
    yield Finding(
        "left over", f"{path} is what a killed writer left: the next one of {target} removes it"
    )


# ---- versions -------------------------------------------------------------------------------------


def _versions(stages: list[Stage]) -> Iterator[Finding]:
    """Yield a finding for each version that differs from today's, with the stages that it made."""
    today = versions()
    by_version: dict[str, list[str]] = defaultdict(list)
    for stage in stages:
        with contextlib.suppress(InputError):
            done = stage.completion()
            if done is None:
                continue
            if done.format < FORMAT:
                by_version[f"format {done.format}, now {FORMAT}"].append(stage.label)
            for name in _COMPARED:
                then, now = done.versions.get(name), today.get(name)
                if then and now and then != now:
                    by_version[f"{name} {then}, now {now}"].append(stage.label)
    for version, labels in by_version.items():
        yield Finding("version", f"made with {version}: {', '.join(labels)}")
