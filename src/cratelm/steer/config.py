"""Options of `cratelm steer`, `cratelm effects` and `cratelm intervene`. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.llm.config import NO_LLM, LLMConfig, check_specification
from cratelm.records import ENDS, names_an_end, parse_neuron_ids
from cratelm.runs import at_least, check_memory, check_resamples, not_in_identity
from cratelm.runs.model_options import HarvestedModelOptions, ModelOptions, SourceOptions
from cratelm.runs.names import check_name
from cratelm.steer.edits import Edit, Positions, one_operation
from cratelm.tokens.beginning import BeginTokenOption

PROMOTED = "promoted"
"""name of the explanations derived from `cratelm effects`: the tokens that a neuron promotes most"""


@dataclass(frozen=True)
class SteerConfig(ModelOptions, BeginTokenOption):
    """Edit neurons while a model reads a text, and show how the next token and the continuation change."""

    neurons: tuple[str, ...]
    """neurons to edit, as LAYER:INDEX, such as 1:32 0:7; with a sign, one end of a neuron: `--neurons 1:32- --set 5` sets
    its activation to -5"""
    run: Path = not_in_identity(Path("runs/default"))
    """run directory"""
    model: str = "crate-2l"
    """name of a model in the run"""
    path: str | None = None
    """a model folder or Hub id, instead of a model of the run"""
    site: str | None = None
    """site of the neurons: ista, mssa, heads, mlp, or a module path with * for the layer; default: ista
    for CRATE, mlp for other models. With --sae, the site that the autoencoders read, if their files do not name it"""
    sae: str | None = None
    """steer latents of sparse autoencoders instead of neurons: their name in the run, a folder, or RELEASE/ID of
    SAELens' registry"""
    set: float | None = None
    """value that the activation is set to"""
    add: float | None = None
    """value that is added to the activation"""
    scale: float | None = None
    """factor that the activation is multiplied by"""
    zero: bool = False
    """set the activation to 0"""
    positions: str = "all"
    """tokens at which neurons are edited: all, last, generated, a span such as 5: or -3:, or numbers such as
    2,5. Position 0 is the token that begins every text; if that is the model's begin token, `all` leaves it as it
    is. Negative positions count from the end of the text"""
    text: str | None = None
    """the text; default: the beginning of a held-out document of the run"""
    text_file: Path | None = None
    """UTF-8 file with the text"""
    tokens: int = 48
    """tokens of the default text, from the beginning of the held-out document"""
    top: int = 10
    """number of tokens shown among those whose probability rises most, and among those whose falls most"""
    generate: int = 32
    """tokens generated after the text, with and without the edits; 0 = none"""
    temperature: float = 0.0
    """sampling temperature of the continuation; 0: the most likely token each time"""
    seed: int = 0
    """seed of the choice of document, and of sampling at a temperature above 0: both continuations use the
    same random numbers"""
    output: Path | None = None
    """also write the results to this JSON file"""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_operation(self.set, self.add, self.scale, self.zero, dashes="--")
        Positions.of(self.positions)
        if not parse_neuron_ids("--neurons", self.neurons):
            raise InputError("--neurons names no neuron: give LAYER:INDEX, such as 0:17")
        if names_an_end(self.neurons) and not all(n.endswith(ENDS) for n in self.neurons):
            raise InputError(
                f"--neurons {' '.join(self.neurons)}: some of these name an end and some do not: name an end of all"
                " of them, such as 0:17+, or of none"
            )
        if self.text is not None and self.text_file is not None:
            raise InputError("--text and --text-file cannot be combined: give one of them")
        at_least(self, {"tokens": 1, "top": 1, "generate": 0, "temperature": 0, "seed": 0})

    def edits(self, site: str | None = None) -> list[Edit]:
        """Return the edits that the options ask for, one per layer; all have the same operation and positions.

        `site` is the name of the site, which says what the indices count; without it they are the numbers as written.
        """
        layers: dict[int, list[int]] = {}
        for layer, index in parse_neuron_ids("--neurons", self.neurons, site):
            layers.setdefault(layer, []).append(index)
        return [
            Edit(layer, indices, self.set, self.add, self.scale, self.zero, self.positions)
            for layer, indices in layers.items()
        ]


@dataclass(frozen=True)
class EffectsConfig(HarvestedModelOptions):
    """Measure the effect of each neuron on the logits, and the loss on held-out text without it."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory, holding the harvest of `--model`"""
    model: str = "crate-2l"
    """name of the harvest, which is the name of the model"""
    neurons: int = 256
    """neurons per layer, drawn at random as `cratelm explain` draws them; 0 = all"""
    only: tuple[str, ...] = ()
    """measure only these neurons, as LAYER:INDEX, such as 0:17 1:5; 0:17+ and 0:17- name one end of a
    neuron that has two"""
    top: int = 10
    """number of tokens stored among those that a neuron promotes most, and among those it suppresses most"""
    positions: int = 16
    """number of tokens of the fit split, among those where a neuron fires, over which its exact effect is
    averaged"""
    tokens: int = 8192
    """held-out tokens on which the loss without each neuron is measured"""
    ablation: Literal["zero", "mean"] = "zero"
    """value that an ablated neuron is set to: 0, or its mean on the fit split"""
    sequence_length: int | None = None
    """tokens that the model reads at once; default: as in the harvest"""
    seed: int = 0
    """seed of the sampled neurons, positions and held-out sequences, the shuffled explanations and the
    bootstrap"""
    batch_tokens: int = not_in_identity(4096)
    """held-out tokens whose activations are in memory at a time"""
    force: bool = not_in_identity(False)
    """redo the stage even if it is finished"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            self,
            {"neurons": 0, "top": 1, "positions": 1, "tokens": 1, "sequence_length": 2, "seed": 0,
             "batch_tokens": 1},
        )  # fmt: skip
        parse_neuron_ids("--only", self.only)


@dataclass(frozen=True)
class InterveneConfig(LLMConfig, SourceOptions):
    """Ask a language model whether steering each neuron changes the text as its explanation says."""

    device: str = not_in_identity("auto")
    """device of the steered model, and of a judge `hf:`; auto: as in the harvest, and for the judge a GPU if
    there is one. The steered model has the precision of the harvest; --dtype is for the judge"""
    judge: str = ""
    """language model that judges: `hf:ID_OR_PATH` (or hf:smollm2), or `openai:MODEL` at --base-url"""
    explanations: str = NO_LLM
    """explanations to judge: `llm-free`, made without a language model; NAME of the set
    `explanations/MODEL@NAME`, made by a language model; or `promoted`, the tokens that each neuron promotes
    according to `cratelm effects`"""
    explainer: str = ""
    """explainer whose explanations are judged; default: the first name in the set"""
    neurons: int = 8
    """neurons per layer, drawn at random from those explained; 0 = all"""
    only: tuple[str, ...] = ()
    """judge only these neurons, as LAYER:INDEX"""
    texts: int = 4
    """number of held-out texts that are continued per neuron"""
    prompt_tokens: int = 24
    """tokens of each text"""
    generate: int = 24
    """tokens generated after each text, with and without steering"""
    strength: float = 1.0
    """multiple of the neuron's maximum on the fit split to which it is set, at all positions"""
    temperature: float = 1.0
    """sampling temperature of the continuations; 0: the most likely token each time"""
    name: str = ""
    """NAME of the results, in the folder steer/MODEL@NAME; default: the name of the judge"""
    resamples: int = 2000
    """number of bootstrap resamples over neurons"""
    seed: int = 0
    """seed of the sampled neurons, texts and continuations, the shuffled explanations, the random neurons and
    the bootstrap"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.judge:
            raise InputError(
                "--judge is missing: give hf:ID_OR_PATH (hf:smollm2 needs no network) or openai:MODEL"
            )
        check_specification("--judge", self.judge)
        parse_neuron_ids("--only", self.only)
        at_least(
            self,
            {"neurons": 0, "texts": 1, "prompt_tokens": 1, "generate": 1, "temperature": 0,
             "resamples": 1, "seed": 0},
        )  # fmt: skip
        if self.strength <= 0:
            raise InputError(f"--strength is {self.strength}: it must be a finite number above 0")
        if self.name:
            check_name("--name", self.name)
        check_resamples(self)
        tokens = self.texts * (self.prompt_tokens + self.generate)
        texts = ("texts", "prompt_tokens", "generate")
        check_memory(self, {texts: 8 * tokens}, "the texts of one neuron")
