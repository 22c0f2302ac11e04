"""Options of all verbs that open a model: the same names, with the same meaning. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Any, Literal

from cratelm.runs.config import Options

Dtype = Literal["auto", "float32", "bfloat16"]


def model_option(default: Any, **metadata: Any) -> Any:
    """Return a dataclass field among the options of the model in `--help`; `metadata` as in `not_in_identity`."""
    return field(default=default, metadata={"group": "model", **metadata})


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Options):
    """Which version of a model is opened, and whether code that comes with it may run."""

    # Neither is part of a stage's identity: the commit is, as the identity of the model.
    revision: str | None = model_option(None, identity=False, in_commands=True)
    """for a model of the Hub: branch, tag or commit; the commit is recorded. Default: the newest, and in verbs
    that read a harvest the one that was harvested"""
    trust_remote_code: bool = model_option(False, identity=False, in_commands=True)
    """run the Python code that comes with a model that transformers itself does not have. Without this option
    such a model is refused with the names of the files and the class"""

    @property
    def device_wanted(self) -> str:
        """Return the device of the model: `auto` if the verb has no option for it."""
        return getattr(self, "device", "auto")

    @property
    def dtype_wanted(self) -> str:
        """Return the precision of the model: `auto` if the verb has no option for it."""
        return "auto"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(SourceOptions):
    """How a model is opened that the user names: in the run, by folder or by Hub id."""

    device: str = model_option("auto", identity=False)
    """cpu, cuda, cuda:1 ...; auto uses an accelerator if there is one"""
    dtype: Dtype = model_option("auto")
    """precision of the model; auto: that of its files"""

    @property
    def dtype_wanted(self) -> str:
        """Return the precision of the model."""
        return self.dtype


@dataclass(frozen=True, kw_only=True)
class HarvestedModelOptions(ModelOptions):
    """How a harvested model is opened again."""

    device: str = model_option("auto", identity=False)
    """cpu, cuda, cuda:1 ...; auto: as in the harvest"""
    dtype: Dtype = model_option("auto")
    """precision of the model; auto: as in the harvest, whose activations no other precision gives exactly"""
