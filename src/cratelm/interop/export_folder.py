"""A folder that an export writes: whole or not at all, and nothing of others is replaced."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from cratelm.activations.store import read_summaries
from cratelm.errors import InputError
from cratelm.records import NeuronSummary, parse_neuron_ids
from cratelm.runs import Run, Stage, write_json

MARK = ".cratelm-export"
"""file that says what wrote a folder; `--force` replaces no folder without it"""


@contextlib.contextmanager
def export_folder(out: Path, told: dict[str, str], *, force: bool) -> Iterator[Path]:
    """Yields a temporary folder that becomes `out` where no error is raised.

    `told` is written into the mark. Raises `InputError` where `out` holds anything, unless it is an
    export and `force` is given.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, a folder was expected: name another with --out")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise InputError(f"{out} is not empty and no export: name another folder with --out")
        if not force:
            raise InputError(f"{out} holds an export: add --force to replace it, or name another")
    # absolute, so that the name of `.` is known
    out = out.absolute()
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        write_json(work / MARK, told)
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        work.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def harvest_of(run: Run, model: str) -> tuple[Stage, dict[str, str]]:
    """The harvest of a model, and the identities of what an export of it reads.

    Raises `InputError` where there is none, or where it is of other tokens than those of the run.
    """
    tokens = run.stage("tokens").require("tokenize").identity
    stage = run.stage("activations", model)
    done = stage.require("harvest")
    if done.inputs.get("tokens", tokens) != tokens:
        raise InputError(
            f"{stage.path} is of tokens that have changed since: type `cratelm harvest --force --run"
            f" {run.path} --model {model}` with the options of its completed.json"
        )
    return stage, {"activations": done.identity, "tokens": tokens}


def chosen_neurons(
    harvest: Path, layers: Sequence[int] = (), only: Sequence[str] = ()
) -> dict[int, list[NeuronSummary]]:
    """Fit summaries of the neurons to write, by layer and index: those of `layers`, or `only` these
    (`LAYER:INDEX`), or all.

    Raises `InputError` for a layer or a neuron that the harvest has not.
    """
    there: dict[int, dict[int, NeuronSummary]] = {}
    for summary in read_summaries(harvest, "fit"):
        there.setdefault(summary.neuron.layer, {})[summary.neuron.index] = summary
    wanted = sorted(set(layers)) or sorted(there)
    chosen = {layer: _layer(harvest, there, layer, "--layers") for layer in wanted}
    if not only:
        return {layer: list(found.values()) for layer, found in chosen.items()}
    few: dict[int, list[NeuronSummary]] = {}
    for layer, index in parse_neuron_ids("--only", only):
        found = _layer(harvest, there, layer, "--only")
        if index not in found:
            raise InputError(
                f"--only {layer}:{index}: layer {layer} of {harvest} has {len(found):,} neurons,"
                f" {min(found)} to {max(found)}, and not this one"
            )
        few.setdefault(layer, []).append(found[index])
    return few


def _layer(
    harvest: Path, there: dict[int, dict[int, NeuronSummary]], layer: int, option: str
) -> dict[int, NeuronSummary]:
    if layer not in there:
        has = ", ".join(map(str, sorted(there)))
        raise InputError(f"{option}: layer {layer} is not in {harvest}, which has layers {has}")
    return there[layer]
