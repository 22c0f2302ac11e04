"""Which stages of a run are finished, and how a reader deals with files that are missing or damaged."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import pyarrow as pa

from cratelm.errors import InputError, one_line
from cratelm.runs import Completion, Run, StageName
from cratelm.runs.names import FAMILIES, family_of, seed_of, set_name, sets_of, split_set

MODEL_STAGES: dict[StageName, str] = {
    "model": "train",
    "activations": "harvest",
    "explanations": "explain",
    "scores": "score",
}
"""stages of one model, with the command that writes each"""
SET_STAGES: dict[StageName, str] = {"explanations": "explain", "scores": "score"}
"""those that can exist several times: once without a language model, and once for each language model"""
SIDE_STAGES: tuple[StageName, ...] = ("sae", "steer", "analysis", "seeds", "replacement")
"""optional measurements of a model. Every stage listed here and above is an input of the report, so that an
addition makes existing reports of runs with such a stage ask for `--force`"""
READ_ERRORS = (OSError, pa.ArrowException, KeyError, ValueError, TypeError, IndexError, AttributeError)  # fmt: skip
"""exceptions that reading a damaged file may raise"""
_T = TypeVar("_T")


def principal_explainer(explainers: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return whose explanations and scores are shown first, of pairs of an explanation set and an explainer.

    The trie if it is there, else the first by name that used no language model (its set is empty), else the
    first by name. None if there are no explainers.
    """
    return min(explainers, key=lambda e: (e[0] != "", e[1] != "trie", e), default=None)


class Problems:
    """Messages about files that could not be read, collected so that all other files are still shown."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.lines = list(lines)

    def attempt(self, label: str, read: Callable[[], _T], default: _T) -> _T:
        """Return the result of `read`; if its file is damaged, record `label` with the error and return `default`."""
        try:
            return read()
        except (*READ_ERRORS, InputError) as error:
            self.lines.append(f"{label} ({one_line(error)})")
            return default


def changed_at(run: Run) -> int:
    """Return the time at which a stage of the run last finished, in ns since the epoch; 0 if none has."""
    try:
        return (run.path / "manifest.json").stat().st_mtime_ns
    except OSError:
        return 0


def model_names(run: Run) -> list[str]:
    """Return the names of all models that have a finished stage of `MODEL_STAGES`, sorted."""
    return sorted({split_set(name)[0] for stage in MODEL_STAGES for name in run.models(stage)})


def set_names(run: Run, model: str) -> list[str]:
    """Return the names of the sets of explanations and scores of `model` that used a language model."""
    return sets_of((name for stage in SET_STAGES for name in run.models(stage)), model)


def completions(
    run: Run, name: str, stages: Iterable[StageName] = tuple(MODEL_STAGES)
) -> dict[StageName, Completion]:
    """Return the completion records of those of `stages` that are finished for the model or set `name`."""
    records: dict[StageName, Completion | None] = {
        stage: run.stage(stage, name).completion() for stage in stages
    }
    return {stage: done for stage, done in records.items() if done is not None}


def set_completions(run: Run, model: str, name: str) -> dict[StageName, Completion]:
    """Return the completion records of the explanations and scores of one set of `model`."""
    return completions(run, set_name(model, name), SET_STAGES)


def missing_sets(run: Run, model: str, null: str) -> dict[str, str]:
    """Return the sets of scores by a language model that `model` has and its null control `null` lacks.

    Each name comes with the commands that make the set, in words.
    """
    scored = run.models("scores")
    missing = sorted(set(sets_of(scored, model)) - set(sets_of(scored, null)))
    return {
        name: ", then ".join(f"`{command}`" for command in _commands_for(run, model, null, name))
        for name in missing
    }


def _commands_for(run: Run, model: str, null: str, name: str) -> Iterator[str]:
    """Yield the commands that explain and score `null` as the set `name` of `model` was."""
    scored = run.stage("scores", set_name(model, name))
    done = scored.completion()
    label = done.input_stages.get("explanations") if done else None
    explained = run.labelled(label or f"explanations/{scored.name}")
    of_null = run.stage("explanations", set_name(null, split_set(explained.name)[1]))
    if of_null.completion() is None:
        yield explained.command(force=False, model=null)
    yield scored.command(force=False, model=null)


def side_completions(run: Run, models: Sequence[str]) -> tuple[Completion, ...]:
    """Return the completion records of all finished `SIDE_STAGES` of the models."""
    stages = (run.stage(stage, name) for stage in SIDE_STAGES for name in run.models(stage))
    several = {seed_of(model)[0] for model in models}  # a comparison of seeds has their common name
    records = (
        stage.completion()
        for stage in stages
        if split_set(stage.name)[0] in (several if stage.stage == "seeds" else models)
    )
    return tuple(done for done in records if done is not None)


def display_order(name: str, null_of: str) -> tuple[bool, int, str, int]:
    """Return the sort key of a model: trained models first, CRATE before GPT-2 before other families, seeds by number.

    `null_of` is the trained model for which `name` is the null control; empty for any other model.
    """
    family = family_of(name)
    place = FAMILIES.index(family) if family else len(FAMILIES)
    return bool(null_of), place, *seed_of(name)
