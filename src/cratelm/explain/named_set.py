"""Explanations by a language model, and what results are called in which another one simulates them."""

from cratelm.errors import InputError
from cratelm.llm.config import NO_LLM
from cratelm.runs import Run, Stage
from cratelm.runs.names import set_name, sets_of


def explanations_of(run: Run, model: str, name: str, simulator: str, *others: str) -> Stage:
    """Return the finished stage of the explanations of `model` by the language model called `name`.

    Raises `InputError` if there is none: the message lists those that exist and `others`, and names the command that
    makes explanations by `simulator`, which is a specification such as `hf:smollm2`.
    """
    stage = run.stage("explanations", set_name(model, name))
    if stage.completion() is not None:
        return stage
    existing = [*sets_of(run.models("explanations"), model), *others]
    choice = (
        f"name one of {', '.join(existing)} with --explanations, or type" if existing else "type"
    )
    raise InputError(
        f"{run.path} has no explanations of {model} by {name}: {choice} `cratelm explain --run {run.path} --model"
        f" {model} --explainer {simulator}` first"
    )


def simulated_name(source: str, simulator: str) -> str:
    """Return the usual NAME in MODEL@NAME of what `simulator` made of the explanations `source` (empty: without an LLM)."""
    return simulator if source == simulator else f"{source or NO_LLM}-by-{simulator}"


def simulated_label(explainer: str, simulator: str) -> str:
    """Return the explainer's label in tables; a model that reads its own explanations is named only once.

    `simulator` is empty for explanations that are simulated without a language model.
    """
    return explainer if simulator in ("", explainer) else f"{explainer}/{simulator}"
