"""Edits of neurons, and what `cratelm steer`, `effects` and `intervene` can be told. Imports nothing heavy."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.llm.config import NO_LLM, LLMConfig, check_specification
from cratelm.records import parse_neuron_ids
from cratelm.runs import aside

Operation = Literal["set", "add", "scale", "zero"]
PROMOTED = "promoted"
"""names the explanations that `cratelm effects` gives: the tokens that the neuron promotes"""


@dataclass(frozen=True)
class Positions:
    """Which tokens of a text are edited.

    A position is the number of real tokens before a token in its row: padding has none and is not
    counted, tokens that a cache holds are. Negative ones count from the end of the prompt: of what
    `generate` was given, or, outside of it, of what the pass has read.
    """

    listed: tuple[int, ...] | None = None
    """these alone; None for the span below"""
    start: int = 0
    stop: int | None = None
    """left out itself; None: to the end, generated tokens included"""
    generated: bool = False
    """those that `generate` adds"""

    @property
    def everywhere(self) -> bool:
        return self == Positions()

    @classmethod
    def of(cls, given: "str | int | Sequence[int] | Positions") -> "Positions":
        """From `all`, `last`, `generated`, a span such as `5:` or `-3:`, one number or several.

        Raises `InputError` for anything else.
        """
        if isinstance(given, Positions):
            return given
        if isinstance(given, str):
            return _from_words(given)
        try:
            numbers = (given,) if isinstance(given, int) else tuple(given)
            if numbers and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
                return cls(listed=numbers)
        except TypeError:
            pass
        raise _no_positions(given)


def _from_words(text: str) -> Positions:
    named = {
        "all": Positions(),
        "last": Positions(listed=(-1,)),
        "generated": Positions(generated=True),
    }
    if text in named:
        return named[text]
    span = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text)
    if span:
        return Positions(start=int(span[1] or 0), stop=int(span[2]) if span[2] else None)
    if re.fullmatch(r"-?\d+(,-?\d+)*", text):
        return Positions(listed=tuple(map(int, text.split(","))))
    raise _no_positions(text)


def _no_positions(given: object) -> InputError:
    return InputError(
        f"positions {given!r}: expected all, last, generated, a span such as 5: or -3:, or numbers"
        " such as 2,5"
    )


@dataclass(frozen=True)
class Edit:
    """What is done to some neurons of one layer. One of `set`, `add`, `scale`, `zero` is given.

    Raises `InputError` where none or several are, or for a number that is not finite.
    """

    layer: int
    neurons: int | Sequence[int]
    """one index or several"""
    set: float | None = None
    """the activation becomes this, a raw activation"""
    add: float | None = None
    """so much is added, a raw activation"""
    scale: float | None = None
    """the activation is multiplied by this"""
    zero: bool = False
    """the activation becomes 0"""
    positions: str | int | Sequence[int] | Positions = "all"
    """`all`, `last` (of the prompt), `generated`, a span such as `5:`, numbers; see `Positions`"""

    def __post_init__(self) -> None:
        neurons = (self.neurons,) if isinstance(self.neurons, int) else tuple(self.neurons)
        object.__setattr__(self, "neurons", neurons)
        object.__setattr__(self, "positions", Positions.of(self.positions))
        _one_operation(self.set, self.add, self.scale, self.zero, "")
        if not neurons:
            raise InputError("an edit names no neuron: one or more indices were expected")

    @property
    def indices(self) -> tuple[int, ...]:
        assert isinstance(self.neurons, tuple)
        return self.neurons

    @property
    def where(self) -> Positions:
        assert isinstance(self.positions, Positions)
        return self.positions

    @property
    def operation(self) -> tuple[Operation, float]:
        """What is done, and with which number."""
        return _one_operation(self.set, self.add, self.scale, self.zero, "")


def _one_operation(
    set_: float | None, add: float | None, scale: float | None, zero: bool, dashes: str
) -> tuple[Operation, float]:
    """The one that is given. Raises `InputError` where it is not one, or no finite number."""
    values: dict[Operation, float | None] = {"set": set_, "add": add, "scale": scale}
    given: list[tuple[Operation, float]] = [(k, v) for k, v in values.items() if v is not None]
    if zero:
        given.append(("zero", 0.0))
    if len(given) != 1:
        told = " and ".join(dashes + name for name, _ in given) or "nothing"
        names = ", ".join(dashes + name for name in ("set", "add", "scale", "zero"))
        raise InputError(f"{told} is given, one of {names} was expected")
    if not math.isfinite(given[0][1]):
        raise InputError(f"{dashes}{given[0][0]} is {given[0][1]}: a finite number was expected")
    return given[0]


@dataclass(frozen=True)
class SteerConfig:
    """Edit neurons while a model reads a text: what becomes of the next token, and of the continuation."""

    neurons: tuple[str, ...]
    """which, as LAYER:INDEX, such as 1:32 0:7"""
    run: Path = aside(Path("runs/default"))
    """run directory"""
    model: str = "crate-2l"
    """name of a model in the run"""
    path: str | None = None
    """a model folder or Hub id in its place"""
    site: str | None = None
    """where neurons live: ista, mssa, heads, mlp, or a module path with * for the layer; left out: ista
    for CRATE, mlp for others"""
    sae: str | None = None
    """steer latents of sparse autoencoders in place of neurons: their name in the run, or a folder"""
    set: float | None = None
    """the activation becomes this"""
    add: float | None = None
    """so much is added to the activation"""
    scale: float | None = None
    """the activation is multiplied by this"""
    zero: bool = False
    """the activation becomes 0"""
    positions: str = "all"
    """tokens at which: all, last, generated, a span such as 5: or -3:, or numbers such as 2,5. 0 is the
    token that texts begin with; negative ones count from the end of the text"""
    text: str | None = None
    """the text; left out: the beginning of a held-out document of the run"""
    text_file: Path | None = None
    """a UTF-8 file with the text"""
    tokens: int = 48
    """first tokens of the held-out document that are read"""
    top: int = 10
    """tokens shown that gain most, and that lose most"""
    generate: int = 32
    """tokens that the text is continued by, with and without; 0 = none"""
    temperature: float = 0.0
    """of the continuation; 0: the likeliest token each time"""
    seed: int = 0
    """draws the document, and the tokens at a temperature above 0: the same draws with and without"""
    output: Path | None = None
    """write the figures as JSON to this file, too"""

    def __post_init__(self) -> None:
        _one_operation(self.set, self.add, self.scale, self.zero, "--")
        Positions.of(self.positions)
        if not parse_neuron_ids("--neurons", self.neurons):
            raise InputError("--neurons names no neuron: LAYER:INDEX was expected, such as 0:17")
        if self.text is not None and self.text_file is not None:
            raise InputError("--text and --text-file are both given: one text was expected")
        if self.sae and self.site:
            raise InputError(
                f"--site {self.site} beside --sae: autoencoders say what site they read"
            )
        _at_least(self, {"tokens": 1, "top": 1, "generate": 0, "temperature": 0, "seed": 0})

    def edits(self) -> list[Edit]:
        """One edit a layer."""
        layers: dict[int, list[int]] = {}
        for layer, index in parse_neuron_ids("--neurons", self.neurons):
            layers.setdefault(layer, []).append(index)
        return [
            Edit(layer, indices, self.set, self.add, self.scale, self.zero, self.positions)
            for layer, indices in layers.items()
        ]


@dataclass(frozen=True)
class EffectsConfig:
    """Measure what each neuron writes to the vocabulary, and the loss on held-out text without it."""

    run: Path = aside(Path("runs/default"))
    """run directory, holding the harvest of `--model`"""
    model: str = "crate-2l"
    """name of the harvest, which is the model's name"""
    neurons: int = 256
    """neurons per layer, drawn at random as `cratelm explain` draws them; 0 = all"""
    only: tuple[str, ...] = ()
    """these neurons alone, as LAYER:INDEX, such as 0:17 1:5"""
    top: int = 10
    """tokens kept that each neuron promotes most, and suppresses most"""
    positions: int = 16
    """tokens of the fit split at which a neuron fires, over which its exact effect is averaged"""
    tokens: int = 8192
    """held-out tokens on which the loss is measured without each neuron"""
    ablation: Literal["zero", "mean"] = "zero"
    """what a neuron is put to: 0, or its mean on the fit split"""
    sequence_length: int | None = None
    """tokens that the model sees at once; left out: as in the harvest"""
    seed: int = 0
    """draws neurons, positions, held-out sequences, shuffled explanations and resamples"""
    batch_tokens: int = aside(4096)
    """held-out tokens whose activations are held at a time"""
    force: bool = aside(False)
    """redo the stage even if it is finished"""
    quiet: bool = aside(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        _at_least(
            self,
            {"neurons": 0, "top": 1, "positions": 1, "tokens": 1, "sequence_length": 2, "seed": 0,
             "batch_tokens": 1},
        )  # fmt: skip
        parse_neuron_ids("--only", self.only)


@dataclass(frozen=True)
class InterveneConfig(LLMConfig):
    """Ask a language model whether steering each neuron changes the text as its explanation says."""

    judge: str = ""
    """language model that judges: `hf:ID_OR_PATH` (or hf:smollm2), or `openai:MODEL` at --base-url"""
    explanations: str = NO_LLM
    """which: `llm-free`, made without a language model; the name of a language model whose set
    `explanations/MODEL@NAME` is there; or `promoted`, the tokens that `cratelm effects` found"""
    explainer: str = ""
    """of that set, by name; left out: its first by name"""
    neurons: int = 8
    """neurons per layer, drawn at random of those explained; 0 = all"""
    only: tuple[str, ...] = ()
    """these neurons alone, as LAYER:INDEX"""
    texts: int = 4
    """held-out texts that are continued, a neuron"""
    prompt_tokens: int = 24
    """tokens of each text"""
    generate: int = 24
    """tokens that each text is continued by, with the neuron steered and without"""
    strength: float = 1.0
    """the neuron is set to so many times its maximum on the fit split, at all positions"""
    temperature: float = 1.0
    """of the continuations; 0: the likeliest token each time"""
    name: str = ""
    """what the judgements are called: the folder is steer/MODEL@NAME; left out: the judge's name"""
    resamples: int = 2000
    """bootstrap resamples over neurons"""
    seed: int = 0
    """draws neurons, texts, continuations, shuffled explanations, random neurons and resamples"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.judge:
            raise InputError(
                "--judge is missing: hf:ID_OR_PATH (hf:smollm2 needs no network) or openai:MODEL"
            )
        check_specification("--judge", self.judge)
        parse_neuron_ids("--only", self.only)
        _at_least(
            self,
            {"neurons": 0, "texts": 1, "prompt_tokens": 1, "generate": 1, "temperature": 0,
             "resamples": 1, "seed": 0},
        )  # fmt: skip
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise InputError(f"--strength {self.strength}: a number above 0 was expected")


def _at_least(config: object, lowest: dict[str, float]) -> None:
    for name, least in lowest.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            option = name.replace("_", "-")
            raise InputError(f"--{option} {value}: {least} or more was expected")
