"""Options of `cratelm import` and `cratelm export`, one class per command. Imports nothing heavy, so that `--help` is quick."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cratelm.errors import InputError
from cratelm.records import parse_neuron_ids
from cratelm.runs import Options, at_least, not_in_identity
from cratelm.runs.model_options import model_option
from cratelm.runs.names import check_name

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True)
class ImportAuthorsConfig(Options):
    """Write a checkpoint of the paper's authors, CRATE or GPT-2, as a Hugging Face folder."""

    checkpoint: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]]
    """local file, or `hub:OWNER/REPO[@REVISION][/FILE]`; OWNER/REPO[/FILE] refers to the Hub if there is no
    local file of that name. Nothing in the file is executed"""
    out: Path
    """folder to write: config.json, model.safetensors, the tokenizer, README.md"""
    tokenizer: str = "gpt2"
    """`gpt2`, which the authors' models use (through tiktoken if it is installed, else from the Hub), the path of a
    tokenizer.json, or `none`"""
    force: bool = not_in_identity(False)
    """replace the folder `--out` if an earlier import or export wrote it"""


@dataclass(frozen=True)
class ImportSparseGptConfig(Options):
    """Write a released checkpoint of a weight-sparse GPT as a Hugging Face folder."""

    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]]
    """folder with beeg_config.json and final_model.pt. Nothing in the files is executed"""
    out: Path
    """folder to write: config.json, model.safetensors, the model's code, README.md and, if there is one, the
    tokenizer"""
    tokenizer: str = ""
    """path of its tokenizer.json; default: the one in the folder, else none"""
    force: bool = not_in_identity(False)
    """replace the folder `--out` if an earlier import or export wrote it"""


@dataclass(frozen=True)
class ImportSaeConfig(Options):
    """Write a sparse autoencoder of the paper's authors as a folder that SAELens can also read."""

    file: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILE")]]
    """local file NAME.pt, or `hub:OWNER/REPO[@REVISION][/FILE]`. Nothing in the file is executed"""
    out: Path
    """folder to write: cfg.json, sae_weights.safetensors, README.md"""
    config: Path | None = None
    """JSON file with the settings of the autoencoder; default: NAME_cfg.json in the same folder as the file"""
    site: str = ""
    """site of its inputs in the model, as for `cratelm harvest --site`; default: the site that corresponds to
    `act_name` in the settings"""
    force: bool = not_in_identity(False)
    """replace the folder `--out` if an earlier import or export wrote it"""


@dataclass(frozen=True)
class ImportRecordsConfig(Options):
    """Create a run from activations that were harvested elsewhere: OpenAI's NeuronRecord JSON files."""

    files: tuple[Path, ...]
    """files with one neuron each, or folders that are searched for .json files at any depth"""
    model: str
    """name of the model in the run"""
    run: Path = not_in_identity(Path("runs/elsewhere"))
    """run directory in which `tokens/` and `activations/MODEL/` are written; a run can hold one import"""
    site: str = "mlp"
    """site of these neurons, which the files do not state"""
    force: bool = not_in_identity(False)
    """redo the import even if it is finished"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise InputError("--files is empty: name a file or a folder of records")
        check_name("--model", self.model, reserved="@+")


@dataclass(frozen=True)
class ExportModelConfig(Options):
    """Write a folder that transformers loads without cratelm, ready for the Hub."""

    out: Path
    """folder to write: config.json, model.safetensors, the model's code, the tokenizer, README.md"""
    model: str = ""
    """name of the model in the run"""
    run: Path = not_in_identity(Path("runs/default"))
    """run directory with `--model`"""
    path: Path | None = None
    """a model folder to export instead of `--model` of `--run`"""
    dtype: Literal["fp32", "bf16"] | None = None
    """precision of the weights; default: unchanged"""
    trust_remote_code: bool = model_option(False, identity=False)
    """with --path: run the Python code that comes with a model that transformers itself does not have. Without this
    option such a model is refused with the names of the files and the class"""
    push: str = not_in_identity("")
    """OWNER/REPO on the Hub to which the folder is also uploaded; a repository that does not exist is created as a
    private one"""
    force: bool = not_in_identity(False)
    """replace the folder `--out` if an earlier import or export wrote it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model) == (self.path is not None):
            raise InputError("exactly one of --model (with --run) and --path must be given")
        if self.push and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.push):
            raise InputError(f"--push is {self.push!r}: it must have the form OWNER/REPO")


@dataclass(frozen=True)
class ExportRecordsConfig(Options):
    """Write the excerpts of a harvest as OpenAI's NeuronRecord JSON, one file per neuron."""

    model: str
    """name of the model in the run"""
    out: Path
    """folder to write, as LAYER/NEURON.json"""
    run: Path = not_in_identity(Path("runs/default"))
    """run directory with the harvest of `--model`"""
    layers: tuple[int, ...] = ()
    """layers to write, counted from 0; default: all"""
    only: tuple[str, ...] = ()
    """only these neurons, as LAYER:INDEX, such as 0:17 1:5; 0:17+ and 0:17- name one end of a
    neuron that has two"""
    force: bool = not_in_identity(False)
    """replace the folder `--out` if an earlier export wrote it"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(self.layers, self.only)


@dataclass(frozen=True)
class ExportNeuronpediaConfig(Options):
    """Write neurons, excerpts, explanations and scores in the format of Neuronpedia's exports."""

    model: str
    """name of the model in the run"""
    out: Path
    """folder to write, as MODEL_ID/SOURCE_ID/..., and config/"""
    run: Path = not_in_identity(Path("runs/default"))
    """run directory with the harvest of `--model`, its explanations and scores"""
    layers: tuple[int, ...] = ()
    """layers to write, counted from 0; default: all"""
    only: tuple[str, ...] = ()
    """only these neurons, as LAYER:INDEX, such as 0:17 1:5; 0:17+ and 0:17- name one end of a
    neuron that has two"""
    model_id: str = ""
    """id of the model in Neuronpedia: letters, digits, `-` and `_`; default: the model's name in lowercase,
    with `-` for other characters"""
    source_set: str = ""
    """name of the set of neurons, whose layers become the sources LAYER-SET; default: the site"""
    excerpts: int = 20
    """maximum number of excerpts per kind, bin and split: those with the highest activation, or the first
    drawn"""
    creator_id: str = "clkht01d40000jv08hvalcvly"
    """id of a user in the Neuronpedia that imports the files; the default is the fallback of Neuronpedia's own
    conversion of dashboards"""
    creator_name: str = "cratelm"
    """name of the creator to display"""
    force: bool = not_in_identity(False)
    """replace the folder `--out` if an earlier export wrote it"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(self.layers, self.only)
        at_least(self, {"excerpts": 1})
        for name in ("model_id", "source_set"):
            value = getattr(self, name)
            if value and not _ID.fullmatch(value):
                flag = name.replace("_", "-")
                raise InputError(
                    f"--{flag} is {value!r}: it must be 1 to 128 letters, digits, '-' or '_'"
                )


def _check_layers(layers: tuple[int, ...], only: tuple[str, ...]) -> None:
    """Raise `InputError` for layers or neurons that no harvest can have."""
    if layers and only:
        raise InputError("--layers and --only cannot be combined")
    wrong = [layer for layer in layers if layer < 0]
    if wrong:
        raise InputError(f"--layers {wrong[0]}: layers are numbered from 0")
    parse_neuron_ids("--only", only)
