"""Figures of one neuron over all held-out tokens. `whole` measures them, `store` reads and writes them.

Apart from `whole`, because those who read results must not import the libraries that run a model.
"""

from dataclasses import dataclass

from cratelm.records import Control, NeuronId, Status


@dataclass(frozen=True)
class WholeScore:
    """How well an explanation predicts its neuron over all held-out tokens. A figure that does not exist is None."""

    neuron: NeuronId
    explainer: str
    control: Control
    status: Status
    reason: str = ""
    correlation: float | None = None
    cosine: float | None = None
    precision_top: float | None = None
    """average precision, for positive tokens as `top`"""
    chance_top: float | None = None
    """share of positive tokens: the average precision of chance"""
    precision_tenth: float | None = None
    chance_tenth: float | None = None
    f1: float | None = None
    """of tokens positive as `tenth` with those simulated at half the maximum or more"""
    iou: float | None = None
    auc: float | None = None
    """probability that a token positive as `top` is simulated higher than a silent one, not positive as `tenth`"""
    auc_hard: float | None = None
    """the same for silent tokens with the id of a token positive as `top`: hard negatives"""
    n_tokens: int = 0


FIGURES = ("correlation", "cosine", "precision_top", "chance_top", "precision_tenth", "chance_tenth", "f1", "iou", "auc", "auc_hard")  # fmt: skip
"""the fields of a `WholeScore` that are figures"""


@dataclass(frozen=True)
class TokenShare:
    """What the last token explains of a neuron. None where there is no figure: dead or constant neurons."""

    neuron: NeuronId
    token_share: float | None
    """R2 of the mean activation on the token, at most 1"""
    token_entropy: float | None
    """nats"""
    n_tokens: int
    """held-out tokens"""

    @property
    def context_share(self) -> float | None:
        """Return 1 - the token share: what the token leaves to the context."""
        return None if self.token_share is None else 1 - self.token_share
