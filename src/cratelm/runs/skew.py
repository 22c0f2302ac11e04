"""Other versions: when a result was made with other libraries than those that continue it.

What is said, and when: docs/reliability.md and docs/files.md describe it for users. Reading finished
results says nothing, whatever made them: their format decides whether they can be read.
"""

import sys
from collections.abc import Mapping

_NUMERIC = ("cratelm", "torch", "transformers")
"""packages whose version can change figures; NumPy, pyarrow and Python do so only by mistake"""
_said: set[str] = set()


def differences(made_with: Mapping[str, str], now: Mapping[str, str], *, exact: bool) -> list[str]:
    """Return, in words, the packages whose versions differ, such as `torch 2.9.0 (now 2.10.0)`.

    With `exact` every difference counts; else only that of the first two numbers of a version, because a
    patch release keeps results. A package without a recorded version differs from none.
    """
    pairs = [(name, made_with.get(name, ""), now.get(name, "")) for name in _NUMERIC]
    return [
        f"{name} {before} (now {after})"
        for name, before, after in pairs
        if before and after and (before != after if exact else _series(before) != _series(after))
    ]


def say_resumed(label: str, begun_with: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Print a line on stderr if an interrupted attempt is resumed with other versions, or another commit."""
    found = differences(begun_with, now, exact=True)
    commits = begun_with.get("commit", ""), now.get("commit", "")
    if all(commits) and commits[0] != commits[1]:
        found.append(f"commit {commits[0][:12]} (now {commits[1][:12]})")
    if found:
        _say(
            f"note: {label} was begun with {', '.join(found)} and is resumed: its figures can differ from"
            " those of one version"
        )


def say_inputs(label: str, inputs: Mapping[str, Mapping[str, str]], now: Mapping[str, str]) -> None:
    """Print a line on stderr if `label` is about to be made from stages of other versions.

    `inputs` has the versions of each stage, by its label.
    """
    notes = []
    for name, versions in inputs.items():
        found = differences(versions, now, exact=False)
        if found:
            notes.append(f"{name} with {', '.join(found)}")
    if notes:
        _say(f"note: {label} is made from results of other versions: {'; '.join(notes)}")


def _say(line: str) -> None:
    """Print a line once per process."""
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr, flush=True)


def _series(version: str) -> tuple[str, ...]:
    """Return the first two numbers of a version."""
    return tuple(version.partition("+")[0].split(".")[:2])
