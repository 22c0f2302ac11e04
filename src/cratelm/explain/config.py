"""Configuration of `cratelm explain`. Imports nothing heavy."""

import re
from dataclasses import dataclass
from typing import Literal

from cratelm.errors import InputError
from cratelm.llm.config import LLMConfig, check_specification

ExplainerName = Literal["lookup", "trie"]
EXPLAINERS: tuple[ExplainerName, ...] = ("lookup", "trie")
Evidence = Literal["top", "anthropic"]
EVIDENCE: tuple[Evidence, ...] = ("top", "anthropic")
Prompts = Literal["cratelm", "openai"]


@dataclass(frozen=True)
class ExplainConfig(LLMConfig):
    """Explain the neurons of one model from the excerpts of its fit split, with or without a language model."""

    explainer: str = ""
    """a language model that explains: `hf:ID_OR_PATH` (a Hub id, a folder, a GGUF file, or `smollm2`),
    or `openai:MODEL` at --base-url; left out: the explainers below, which need none"""
    explainers: tuple[ExplainerName, ...] = EXPLAINERS
    """without a language model. `lookup`: mean activation per token (Bills et al. 2023); `trie`: what
    it does after which tokens (Neuron-to-Graph, Foote et al. 2023)"""
    name: str = ""
    """what the language model's explanations are called in folders and tables; left out: its own name"""
    evidence: tuple[Evidence, ...] = EVIDENCE
    """excerpts that a language model explains from: `top`, the strongest (for top-and-random and
    random-only), `anthropic`, the whole range in 8-token excerpts"""
    contrast: int = 0
    """excerpts that do not activate shown to a language model beside those that do"""
    prompts: Prompts = "cratelm"
    """our prompts, or OpenAI's published ones (extra `openai-prompts`)"""
    answer_tokens: int = 60
    """longest explanation by a language model, in its tokens"""
    temperature: float = 0.0
    """of a language model's explanations; the paper samples at 1"""
    max_entries: int = 200
    """size of an explanation without a language model: rows of the look-up's table, nodes of the trie"""
    depth: int = 4
    """tokens of context in the trie, the activating one counted"""
    neurons: int = 0
    """neurons per layer, drawn at random; 0 = all. Models with as many neurons draw the same indices"""
    only: tuple[str, ...] = ()
    """these neurons alone, as LAYER:INDEX, such as 0:17 1:5"""
    seed: int = 0
    """seed of that draw, and of the sampling of a language model"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _each_once("--explainers", self.explainers, EXPLAINERS)
        _each_once("--evidence", self.evidence, EVIDENCE)
        if self.explainer:
            check_specification("--explainer", self.explainer)
        lowest = {
            "max_entries": 1, "depth": 1, "neurons": 0, "seed": 0, "contrast": 0,
            "answer_tokens": 1, "temperature": 0,
        }  # fmt: skip
        for name, least in lowest.items():
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {getattr(self, name)}: {least} or more was expected")
        if self.prompts == "openai" and self.contrast:
            raise InputError("--contrast: OpenAI's prompts have no place for it, leave it out")
        if self.only and self.neurons:
            raise InputError("--only and --neurons: one of the two was expected")
        self.places()

    def places(self) -> list[tuple[int, int]]:
        """(layer, index) of `only`, sorted."""
        found = []
        for text in self.only:
            match = re.fullmatch(r"(\d+):(\d+)", text)
            if match is None:
                raise InputError(f"--only {text}: LAYER:INDEX was expected, such as 0:17")
            found.append((int(match[1]), int(match[2])))
        return sorted(set(found))


def _each_once(option: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not given or not set(given) <= set(known) or len(set(given)) != len(given):
        raise InputError(
            f"{option} {' '.join(given) or '(none)'}: expected one or more of {', '.join(known)},"
            " each once"
        )
