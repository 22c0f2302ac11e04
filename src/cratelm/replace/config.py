"""Options of `cratelm replace`. Imports nothing heavy, so that `--help` is quick."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from cratelm.errors import InputError
from cratelm.llm.config import NO_LLM, LLMConfig, check_specification, option
from cratelm.replace.layers import EXTENTS, Extent
from cratelm.runs import at_least, check_resamples
from cratelm.runs.model_options import SourceOptions
from cratelm.runs.names import check_name

Kind = Literal["lookup", "trie", "concepts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
EXCERPTS, SHARED = "excerpts", "shared"


@dataclass(frozen=True)
class Part:
    """One of the explanations that are stacked, as `--explainers` writes it: KIND, KIND:N, KIND:N@shared or KIND@excerpts."""

    kind: Kind
    most: int = 0
    """entries per neuron; 0 = no limit"""
    shared: bool = False
    """`most` is the mean number of entries of the neurons of a layer, not the limit of each"""
    of_excerpts: bool = False
    """made by `cratelm explain` from excerpts, instead of from a pass over fit tokens"""


def parts_of(explainer: str) -> tuple[Part, ...]:
    """Return the parts of an explainer, in the order in which they are stacked.

    Raises `InputError` for any form other than KIND, KIND:N, KIND:N@shared and KIND@excerpts, with + between them.
    """
    return tuple(_part(word, explainer) for word in explainer.split("+"))


def _part(word: str, explainer: str) -> Part:
    match = re.fullmatch(
        rf"({'|'.join(KINDS)})(?::([1-9][0-9]{{0,8}})(@{SHARED})?|(@{EXCERPTS}))?", word
    )
    if match is None or (match[1] == "concepts" and match[2]):
        raise InputError(
            f"--explainers {explainer}: it must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, with a limit of entries"
            f" such as trie:200 or trie:200@{SHARED} or with @{EXCERPTS}, or several of these with + between them"
        )
    kind: Kind = match[1]  # type: ignore[assignment]
    return Part(kind, int(match[2] or 0), match[3] is not None, match[4] is not None)


@dataclass(frozen=True)
class ReplaceConfig(LLMConfig, SourceOptions):
    """Run a model on the explanations of its neurons, and measure the loss on held-out text.

    Every neuron is explained from a pass over fit tokens. Then the codes of a layer, or of several, are replaced by what
    the explanations predict from the tokens, and the rest of the model runs on. With `--simulator`, only the neurons
    that a language model has explained are replaced, by what a language model predicts from their explanations.
    """

    simulator: str = ""
    """a language model that reads explanations: `hf:ID_OR_PATH` (a Hub id, a folder, a GGUF file, or `smollm2`), or
    `openai:MODEL` at --base-url; default: no language model"""
    explanations: str = ""
    """with --simulator: name of the language model that wrote the explanations, from the strongest excerpts; default:
    the simulator itself"""
    simulated_tokens: int = 256
    """with --simulator: held-out tokens on which the loss is measured, and as many fit tokens, on which the levels of
    each neuron are calibrated. Each piece of at most 64 of them is a call for each neuron"""
    explainers: tuple[str, ...] = ("lookup", "trie", "trie:200", "concepts", "concepts+trie")
    """explanations to run the model on. `lookup`: the mean activation per token; `trie`: the mean by context; both from a
    pass over fit tokens and without a limit of their size; `trie:200`: at most 200 entries per neuron; `trie:200@shared`: 200 on average over a layer; `concepts`: formulas
    of named predicates; `trie@excerpts`: as `cratelm explain` makes them from excerpts. Several with + between them are stacked: each is made from what those
    before it leave unexplained"""
    layers: tuple[Extent, ...] = EXTENTS
    """what is replaced at once: `all` layers, each `one` alone, all layers `up-to` each one"""
    depth: int = 4
    """tokens of context, including the current one"""
    fit_tokens: int = 200_000
    """fit tokens that explanations are made from, a random sample of whole sequences"""
    tokens: int = 100_000
    """held-out tokens on which the loss is measured, a random sample of whole sequences"""
    neuron_tokens: int = 512
    """held-out tokens on which the cost of replacing one neuron alone is measured; 0: not measured"""
    curve_tokens: int = 20_000
    """held-out tokens on which the loss with only the best-explained neurons replaced is measured; 0: not measured"""
    batch_tokens: int = 8192
    """tokens per forward pass; fewer if their logits or predictions would exceed 256 MiB"""
    resamples: int = 2000
    """bootstrap resamples over documents"""
    seed: int = 0
    """seed of the samples of sequences, the shuffled explanations and the bootstrap"""
    device: str = option("auto", in_identity=False)
    """cpu, cuda, cuda:1 ...; auto: the device of the harvest if this machine has it. Also of `hf:` language models, for
    which auto is a GPU if there is one"""
    name: str = option("", "output")
    """with --simulator: name of these results in folders and tables; default: the explainer's name, and the simulator's
    if it differs"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            self,
            {"depth": 1, "fit_tokens": 1, "tokens": 1, "neuron_tokens": 0,
             "curve_tokens": 0, "batch_tokens": 1, "resamples": 1, "seed": 0,
             "simulated_tokens": 2},
        )  # fmt: skip
        check_resamples(self)
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise InputError(
                f"--layers {' '.join(self.layers) or '(none)'}: give one or more of"
                f" {', '.join(EXTENTS)}, each once"
            )
        if not self.explainers or len(set(self.explainers)) != len(self.explainers):
            raise InputError(
                f"--explainers {' '.join(self.explainers) or '(none)'}: give one or more, each once"
            )
        for explainer in self.explainers:
            parts_of(explainer)
        self._check_simulator()

    def _check_simulator(self) -> None:
        if self.simulator:
            check_specification("--simulator", self.simulator)
            if self.explanations == NO_LLM:
                raise InputError(
                    f"--explanations {NO_LLM}: explanations made without a language model need no simulator: omit"
                    " --simulator, and name them with --explainers, such as trie@excerpts"
                )
        else:
            given = [n for n in ("explanations", "name", "shard", "dry_run") if getattr(self, n)]
            if given:
                raise InputError(
                    f"--{given[0].replace('_', '-')} needs a language model as simulator: add"
                    " --simulator hf:ID_OR_PATH or openai:MODEL"
                )
        if self.name:
            check_name("--name", self.name)
