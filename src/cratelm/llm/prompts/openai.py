"""OpenAI's published few-shot prompts (Bills et al. 2023), built verbatim by OpenAI's own package.

The package `automated-interpretability` needs NumPy below 2: install cratelm with the extra
`openai-prompts` in a separate environment. Only its prompt builders are used; it neither sends requests nor
computes scores.

Control characters in tokens are written as escapes, as in our own prompts: a raw tab in a token would be
indistinguishable from the tab between a token and its level.
"""

# pyright: reportMissingImports=false
# the package needs an older NumPy than the development environment has

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import missing_extra
from cratelm.llm.requests import Chat, LogprobQuery
from cratelm.records import MAX_LEVEL, Excerpt
from cratelm.text.display import printable

VERSION = "openai"


def openai_explain_request(
    excerpts: Sequence[Excerpt],
    strings: Sequence[str],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> Chat:
    """Return the request for an explanation in the wording of OpenAI's token-and-activation explainer.

    `strings` [V] is the text of each token id.
    """
    from neuron_explainer.activations.activation_records import calculate_max_activation
    from neuron_explainer.activations.activations import ActivationRecord

    records = [
        ActivationRecord(_tokens(e.token_ids, strings), [float(a) for a in e.activations])
        for e in excerpts
    ]
    messages = _explainer().make_explanation_prompt(
        all_activation_records=records,
        max_activation=calculate_max_activation(records),
        max_tokens_for_completion=max_tokens,
    )
    turns = tuple((str(getattr(m["role"], "value", m["role"])), m["content"]) for m in messages)
    return Chat(turns, max_tokens, temperature, seed)  # type: ignore[arg-type]


def openai_simulate_read(
    explanation: str, token_ids: NDArray, strings: Sequence[str], *, full: bool = False
) -> LogprobQuery:
    """Return the request for the level 0..10 of each token of one excerpt in the wording of OpenAI's simulator.

    `strings` [V] is the text of each token id; the request has one slot per token, [n].
    """
    from neuron_explainer.activations.activation_records import (
        UNKNOWN_ACTIVATION_STRING,
        format_sequences_for_simulation,
    )

    tokens = _tokens(token_ids, strings)
    simulator = _simulator(printable(explanation))
    prompt = simulator.make_simulation_prompt(tokens)
    body = format_sequences_for_simulation([tokens])
    assert prompt.endswith(body)
    context = len(prompt) - len(body)
    preamble = prompt.rindex("\n\nNeuron ", 0, context)
    lengths = np.array([len(t) + len(f"\t{UNKNOWN_ACTIVATION_STRING}\n") for t in tokens])
    begins = body.index("<start>\n") + len("<start>\n") + np.cumsum(lengths) - lengths
    slots = [int(b) + len(t) + 1 for b, t in zip(begins, tokens, strict=True)]
    assert all(body.startswith(UNKNOWN_ACTIVATION_STRING, slot) for slot in slots)
    return LogprobQuery(
        preamble=prompt[:preamble],
        context=prompt[preamble:context],
        body=body,
        slots=tuple(slots),
        options=tuple(map(str, range(MAX_LEVEL + 1))),
        full=full,
    )


def require() -> None:
    """Raise `InputError` if the package `automated-interpretability` is not installed."""
    try:
        import neuron_explainer  # noqa: F401
    except ImportError:
        package, otherwise = (
            "automated-interpretability",
            ", in a separate environment, since it needs numpy < 2",
        )
        raise missing_extra("openai-prompts", "--prompts openai", package, otherwise) from None


@cache
def _explainer() -> Any:
    from neuron_explainer.explanations.explainer import TokenActivationPairExplainer

    class Explainer(TokenActivationPairExplainer):
        """Explainer that only builds prompts. Their length is not checked here: that would download a
        tokenizer, and the model reports prompts that are too long anyway."""

        def _prompt_is_too_long(self, prompt_builder: Any, max_tokens_for_completion: int) -> bool:
            return False

    return Explainer(model_name="", override_api_key="none")


def _simulator(explanation: str) -> Any:
    from neuron_explainer.explanations.prompt_builder import PromptFormat
    from neuron_explainer.explanations.simulator import ExplanationNeuronSimulator

    return ExplanationNeuronSimulator("", explanation, prompt_format=PromptFormat.NONE)


def _tokens(token_ids: NDArray, strings: Sequence[str]) -> list[str]:
    return [printable(strings[int(t)]) for t in token_ids]
