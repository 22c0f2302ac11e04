"""Options of `cratelm import ...` and `cratelm export ...`. Imports nothing heavy, so that `--help` is quick."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cratelm.errors import InputError
from cratelm.records import parse_neuron_keys
from cratelm.runs import aside

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True)
class ImportAuthorsConfig:
    """Write a checkpoint of the paper's authors, CRATE or GPT-2, as a Hugging Face folder."""

    checkpoint: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]]
    """local file, or `hub:OWNER/REPO[@REVISION][/FILE]`; OWNER/REPO[/FILE] is of the Hub where no
    local file has that name. Nothing that the file carries is executed"""
    out: Path
    """folder to write: config.json, model.safetensors, the tokenizer, README.md"""
    tokenizer: str = "gpt2"
    """`gpt2` (fetched from the Hub, else through tiktoken; what the authors' models use), the path of
    a tokenizer.json, or `none`"""
    force: bool = aside(False)
    """replace what an import or export wrote to `--out` before"""

    def __post_init__(self) -> None:
        if not self.checkpoint.strip():
            raise InputError("the checkpoint is empty: a file or a name of the Hub was expected")
        if not self.tokenizer.strip():
            raise InputError("--tokenizer is empty: gpt2, a tokenizer.json or none was expected")


@dataclass(frozen=True)
class ImportSaeConfig:
    """Write a sparse autoencoder of the paper's authors as a folder that SAELens reads too."""

    file: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILE")]]
    """local file NAME.pt, or `hub:OWNER/REPO[@REVISION][/FILE]`. Nothing that it carries is executed"""
    out: Path
    """folder to write: cfg.json, sae_weights.safetensors, README.md"""
    config: Path | None = None
    """its settings; left out: NAME_cfg.json beside the file"""
    site: str = ""
    """where in the model its inputs live, as `cratelm harvest --site` takes it; left out: from the
    settings' act_name"""
    force: bool = aside(False)
    """replace what an import or export wrote to `--out` before"""

    def __post_init__(self) -> None:
        if not self.file.strip():
            raise InputError("the file is empty: NAME.pt or a name of the Hub was expected")


@dataclass(frozen=True)
class ImportRecordsConfig:
    """Make a run of activations that were harvested elsewhere: OpenAI's NeuronRecord JSON files."""

    files: tuple[Path, ...]
    """files, or folders that are searched for .json files at any depth; one neuron a file"""
    model: str
    """name that the model gets in the run"""
    run: Path = aside(Path("runs/elsewhere"))
    """run directory, in which `tokens/` and `activations/MODEL/` are written; one import a run"""
    site: str = "mlp"
    """where in a layer these neurons live: the files do not say"""
    force: bool = aside(False)
    """import again where it was done before"""
    quiet: bool = aside(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        if not self.files:
            raise InputError("--files names nothing: a file or a folder of records was expected")
        for name in ("model", "site"):
            if not getattr(self, name).strip():
                raise InputError(f"--{name} is empty: a name was expected")


@dataclass(frozen=True)
class ExportModelConfig:
    """Write a folder that transformers loads without cratelm, ready for the Hub."""

    out: Path
    """folder to write: config.json, model.safetensors, the model's code, the tokenizer, README.md"""
    model: str = ""
    """name of the model in the run"""
    run: Path = aside(Path("runs/default"))
    """run directory, holding `--model`"""
    path: Path | None = None
    """a model folder, in place of `--run` and `--model`"""
    dtype: Literal["fp32", "bf16"] | None = None
    """precision of the weights; left out: as they are"""
    push: str = aside("")
    """OWNER/REPO of the Hub to which the folder is sent as well; a repository that is not there is
    made, private"""
    force: bool = aside(False)
    """replace what an import or export wrote to `--out` before"""

    def __post_init__(self) -> None:
        if bool(self.model) == (self.path is not None):
            raise InputError("one of --model (with --run) and --path was expected")
        if self.push and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.push):
            raise InputError(f"--push is {self.push!r}: OWNER/REPO was expected")


@dataclass(frozen=True)
class ExportRecordsConfig:
    """Write the excerpts of a harvest as OpenAI's NeuronRecord JSON, a file a neuron."""

    model: str
    """name of the model in the run"""
    out: Path
    """folder to write, as LAYER/NEURON.json"""
    run: Path = aside(Path("runs/default"))
    """run directory, holding the harvest of `--model`"""
    layers: tuple[int, ...] = ()
    """layers to write, from 0; left out: all"""
    only: tuple[str, ...] = ()
    """these neurons alone, as LAYER:INDEX, such as 0:17 1:5"""
    force: bool = aside(False)
    """replace what an export wrote to `--out` before"""
    quiet: bool = aside(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        _check_layers(self.layers, self.only)


@dataclass(frozen=True)
class ExportNeuronpediaConfig:
    """Write neurons, excerpts, explanations and scores in the format of Neuronpedia's exports."""

    model: str
    """name of the model in the run"""
    out: Path
    """folder to write, as MODEL_ID/SOURCE_ID/..., and config/"""
    run: Path = aside(Path("runs/default"))
    """run directory, holding the harvest of `--model` and what explains and scores it"""
    layers: tuple[int, ...] = ()
    """layers to write, from 0; left out: all"""
    only: tuple[str, ...] = ()
    """these neurons alone, as LAYER:INDEX, such as 0:17 1:5"""
    model_id: str = ""
    """id of the model in Neuronpedia: letters, digits, `-` and `_`; left out: the model's name, with
    other characters as `-`, in small letters"""
    source_set: str = ""
    """name of the neurons' set; a layer of it is the source LAYER-SET; left out: the site"""
    excerpts: int = 20
    """excerpts written of each kind, bin and split: the highest, or the first drawn"""
    creator_id: str = "clkht01d40000jv08hvalcvly"
    """id of a user in the Neuronpedia that imports; the default is the one that Neuronpedia's own
    conversion of dashboards falls back to"""
    creator_name: str = "cratelm"
    """who is shown as the creator"""
    force: bool = aside(False)
    """replace what an export wrote to `--out` before"""
    quiet: bool = aside(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        _check_layers(self.layers, self.only)
        if self.excerpts < 1:
            raise InputError(f"--excerpts is {self.excerpts}: 1 or more was expected")
        for name in ("model_id", "source_set"):
            value = getattr(self, name)
            if value and not _ID.fullmatch(value):
                flag = name.replace("_", "-")
                raise InputError(
                    f"--{flag} is {value!r}: 1 to 128 letters, digits, '-' or '_' were expected"
                )


def _check_layers(layers: tuple[int, ...], only: tuple[str, ...]) -> None:
    """Raises `InputError` for a choice that no harvest can have."""
    if layers and only:
        raise InputError("--layers and --only: one of the two was expected")
    wrong = [layer for layer in layers if layer < 0]
    if wrong:
        raise InputError(f"--layers {wrong[0]}: numbers from 0 were expected")
    parse_neuron_keys("--only", only)
