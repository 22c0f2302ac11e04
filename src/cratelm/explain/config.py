"""Options of `cratelm explain`. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.llm.config import LLMConfig, check_specification, option
from cratelm.records import EvidenceKind, parse_neuron_ids
from cratelm.runs import at_least
from cratelm.runs.names import check_name

ExplainerName = Literal["lookup", "trie", "concepts", "lookup+concepts"]
EXPLAINERS: tuple[ExplainerName, ...] = ("lookup", "trie", "concepts", "lookup+concepts")
EVIDENCE: tuple[EvidenceKind, ...] = ("top", "anthropic")
Prompts = Literal["cratelm", "openai"]


@dataclass(frozen=True)
class ExplainConfig(LLMConfig):
    """Explain the neurons of one model from the excerpts of its fit split, with or without a language model."""

    explainer: str = ""
    """a language model that explains: `hf:ID_OR_PATH` (a Hub id, a folder, a GGUF file, or `smollm2`),
    or `openai:MODEL` at --base-url; default: the explainers below, which need no language model"""
    explainers: tuple[ExplainerName, ...] = ("lookup", "trie", "concepts")
    """explainers without a language model. `lookup`: mean activation per token (Bills et al. 2023);
    `trie`: activation by context (Neuron-to-Graph, Foote et al. 2023); `concepts`: a formula of named predicates
    (Mu & Andreas 2020); `lookup+concepts`: a formula for what the look-up leaves, added to it"""
    concepts: tuple[Path, ...] = ()
    """files of further predicates for the formulas and sentences, in TOML"""
    evidence: tuple[EvidenceKind, ...] = EVIDENCE
    """excerpts that a language model explains from: `top`, those with the highest activations (for the
    metrics top-and-random and random-only); `anthropic`, 8-token excerpts over the whole range"""
    contrast: int = 0
    """number of excerpts without a reaction that a language model sees in addition to those with one"""
    max_entries: int = 200
    """size of an explanation without a language model: rows of the look-up table, nodes of the trie"""
    depth: int = 4
    """tokens of context in the trie, including the activating one"""
    neurons: int = 0
    """neurons per layer, drawn at random; 0 = all. Models with equally many neurons draw the same indices"""
    only: tuple[str, ...] = ()
    """only these neurons, as LAYER:INDEX, such as 0:17 1:5; 0:17+ and 0:17- name one end of a
    neuron that has two"""
    seed: int = 0
    """seed of that draw, and of the sampling of a language model"""
    prompts: Prompts = option("cratelm", "language model")
    """cratelm's prompts, or OpenAI's published ones (extra `openai-prompts`)"""
    answer_tokens: int = option(60, "language model")
    """maximum length of an explanation by a language model, in its tokens"""
    temperature: float = option(0.0, "language model")
    """sampling temperature of explanations; the paper samples at 1"""
    name: str = option("", "output")
    """name of the language model's explanations in folders and tables; default: the model's own name"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _each_once("--explainers", self.explainers, EXPLAINERS)
        _each_once("--evidence", self.evidence, EVIDENCE)
        if self.explainer:
            check_specification("--explainer", self.explainer)
        at_least(
            self,
            {"max_entries": 1, "depth": 1, "neurons": 0, "seed": 0, "contrast": 0,
             "answer_tokens": 1, "temperature": 0},
        )  # fmt: skip
        if self.prompts == "openai" and self.contrast:
            raise InputError(
                "--contrast and --prompts openai cannot be combined: those prompts have no contrast excerpts"
            )
        if self.only and self.neurons:
            raise InputError("--only and --neurons cannot be combined")
        if self.name:
            check_name("--name", self.name)
        parse_neuron_ids("--only", self.only)


def _each_once(option: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    if not values or not set(values) <= set(allowed) or len(set(values)) != len(values):
        raise InputError(
            f"{option} {' '.join(values) or '(none)'}: give one or more of {', '.join(allowed)},"
            " each once"
        )
