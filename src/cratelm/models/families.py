"""Families of models: which configuration and which class a name such as `crate-tssa-2l` stands for.

A family is a model in one file, or a model of another family with some fields of its configuration changed. Every
family has every size, at the same width D, number of heads K and number of layers L.

name              model                                                       the question that it answers
crate             CRATE, arXiv 2410.16443                                     -
crate-alpha       residual in ISTA, and a second dictionary for decoding      what do these two change?
crate-query       MSSA with a query of its own projection                     binding: can it look for other tokens?
crate-mlp         MSSA, and an MLP instead of ISTA                            is it the attention?
crate-attention   attention with three projections, and ISTA                  is it the sparse code?
crate-mssa        MSSA only, arXiv 2506.03790                                 without a sparse code
crate-tssa        token statistics instead of MSSA, arXiv 2412.17810          in linear time
gpt2, gpt2-relu   GPT-2 with ReLU and without biases                          the twin
gpt2-gelu         the same with GELU                                          without sparse neurons
gpt2-solu         the same with SoLU                                          is it the derivation, or
gpt2-topk         the same with TopK, 1/16 of the neurons                     only sparsity?
sparse-gpt        weight-sparse GPT, arXiv 2511.13653                         small circuits against readable neurons
"""

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError, one_line
from cratelm.models.crate import CrateConfig, CrateForCausalLM, CrateModel
from cratelm.models.gpt2 import build_gpt2, gpt2_config
from cratelm.models.gpt2_activation import (
    Gpt2ActivationConfig,
    Gpt2ActivationForCausalLM,
    Gpt2ActivationModel,
)
from cratelm.models.sparse_gpt import SparseGptConfig, SparseGptForCausalLM, SparseGptModel


@dataclass(frozen=True)
class Size:
    """Shape of a model: width D, heads K, layers L; H = 4D neurons per layer."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int


_SIZES = {
    "1l": Size(128, 4, 1),
    "2l": Size(128, 4, 2),
    "3l": Size(128, 4, 3),
    "6l": Size(768, 12, 6),
    "12l": Size(768, 12, 12),
}


@dataclass(frozen=True)
class Family:
    """Models of one architecture, from a configuration with the fields of `Size`."""

    config: Callable[..., Any]
    """returns a configuration of its fields, given by name"""
    model: Callable[[Any], PreTrainedModel]
    """returns a causal language model of a configuration, with fresh weights"""
    config_class: type
    """class of the configuration"""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """fields of the configuration that differ from its defaults"""
    large: Mapping[str, Any] = field(default_factory=dict)
    """the same, for sizes wider than those of a laptop"""

    def fields_at(self, size: Size) -> dict[str, Any]:
        """Return the fields that differ from the configuration's defaults at a size."""
        return {**self.fields, **(self.large if size.hidden_size > 128 else {})}

    def field_names(self) -> set[str]:
        """Return the names that `config` accepts."""
        accepted = set(inspect.signature(self.config_class).parameters)
        return accepted | set(inspect.signature(self.config).parameters) - {"others", "kwargs"}

    def types(self) -> dict[str, Any]:
        """Return the type of each field that states one."""
        annotated = self.config_class if self.config is self.config_class else self.config
        return inspect.get_annotations(annotated)


FAMILIES: dict[str, Family] = {}
"""families by name; `register_family` adds one"""
SIZES: dict[str, Size] = {}
"""shapes by the name of a model, FAMILY-SIZE"""
OUTSIDE = "CRATELM_FAMILIES"
"""environment variable that names modules, separated by commas, which call `register_family` when they are imported"""
_imported: set[str] = set()


def register_family(
    name: str,
    config_class: type,
    model_class: type,
    *,
    config: Callable[..., Any] | None = None,
    model: Callable[[Any], PreTrainedModel] | None = None,
    base_class: type | None = None,
    large: Mapping[str, Any] | None = None,
    **fields: Any,
) -> None:
    """Add a family called `name`: `NAME-1l` ... `NAME-12l` can then be built, trained and loaded as others are.

    `config_class` must accept `vocab_size`, `max_position_embeddings`, `hidden_size`, `num_attention_heads`,
    `num_hidden_layers` and `eos_token_id`; `config` does so in its place if it is given. `model_class` is the causal
    language model (`model` builds it if that needs more), and `base_class` the model without its head. `fields` are
    those of the configuration that differ from its defaults, and `large` those that do so at 6l and 12l alone.
    Raises `InputError` for a name that is taken, or that would be read as one of another family.
    """
    if name in FAMILIES or not name or not all(part.isalnum() for part in name.split("-")):
        raise InputError(
            f"the family {name!r} cannot be added: give a new name of letters, digits and hyphens"
        )
    FAMILIES[name] = Family(
        config or config_class, model or model_class, config_class, fields, large or {}
    )
    SIZES.update({f"{name}-{size}": shape for size, shape in _SIZES.items()})
    if config_class is not GPT2Config:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)  # type: ignore[attr-defined]
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)  # type: ignore[arg-type]
        if base_class is not None:
            AutoModel.register(config_class, base_class, exist_ok=True)  # type: ignore[arg-type]


def import_outside_families() -> None:
    """Import the modules that the environment variable `CRATELM_FAMILIES` names, each once.

    Raises `InputError` for one that cannot be imported.
    """
    names = [name.strip() for name in os.environ.get(OUTSIDE, "").split(",")]
    for name in names:
        if not name or name in _imported:
            continue
        _imported.add(name)
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the module raises
            _imported.discard(name)
            raise InputError(
                f"{OUTSIDE} names the module {name!r}, which cannot be imported ({one_line(error)}): put its folder"
                " into PYTHONPATH, or unset the variable"
            ) from None


def different_families() -> tuple[str, ...]:
    """Return the names of all families, without a second name of the same one: `gpt2-relu` is `gpt2`."""
    import_outside_families()
    names, values = list(FAMILIES), list(FAMILIES.values())
    return tuple(name for i, name in enumerate(names) if values.index(values[i]) == i)


def family_of(name: str) -> str:
    """Return the family of a model's name, such as `crate-tssa` for `crate-tssa-2l`."""
    return name.rpartition("-")[0]


def model_of(config: Any) -> PreTrainedModel:
    """Return a model with fresh weights of a configuration of one of the families."""
    for family in FAMILIES.values():
        if type(config) is family.config_class:
            return family.model(config)
    raise InputError(
        f"{type(config).__name__} is the configuration of none of the families {', '.join(FAMILIES)}"
    )


def _register_all() -> None:
    switches: dict[str, dict[str, Any]] = {
        "crate": {},
        "crate-alpha": {"ista_residual": True, "decoupled_dictionary": True},
        "crate-query": {"attention": "query"},
        "crate-mlp": {"feedforward": "mlp"},
        "crate-attention": {"attention": "standard"},
        "crate-mssa": {"feedforward": "none"},
        "crate-tssa": {"attention": "tssa"},
    }
    for name, fields in switches.items():
        register_family(name, CrateConfig, CrateForCausalLM, base_class=CrateModel, **fields)
    for name in ("gpt2", "gpt2-relu", "gpt2-gelu"):
        fields: dict[str, Any] = {"activation": "gelu"} if name == "gpt2-gelu" else {}
        register_family(
            name, GPT2Config, GPT2LMHeadModel, config=gpt2_config, model=build_gpt2, **fields
        )
    for activation in ("solu", "topk"):
        register_family(
            f"gpt2-{activation}",
            Gpt2ActivationConfig,
            Gpt2ActivationForCausalLM,
            config=gpt2_config,
            model=build_gpt2,
            base_class=Gpt2ActivationModel,
            activation=activation,
        )
    # V x V entries are 17 million at the demo's vocabulary of 4,096, and 2.5 billion (10 GB) at GPT-2's.
    register_family(
        "sparse-gpt",
        SparseGptConfig,
        SparseGptForCausalLM,
        base_class=SparseGptModel,
        large={"bigram_table": False},
    )


_register_all()
