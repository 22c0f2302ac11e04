"""Models: CRATE in one file, its GPT-2 twin, other families, sizes by name, and sites of neurons in any model."""

from cratelm.models.crate import CrateConfig, CrateForCausalLM, CrateModel
from cratelm.models.families import FAMILIES, SIZES, register_family
from cratelm.models.sites import Site, capture, site_of
from cratelm.models.sizes import build, config_of, count_parameters, load
from cratelm.models.sparse_gpt import SparseGptConfig, SparseGptForCausalLM, SparseGptModel
from cratelm.models.tssa import Tssa

__all__ = [
    "FAMILIES",
    "SIZES",
    "CrateConfig",
    "CrateForCausalLM",
    "CrateModel",
    "Site",
    "SparseGptConfig",
    "SparseGptForCausalLM",
    "SparseGptModel",
    "Tssa",
    "build",
    "capture",
    "config_of",
    "count_parameters",
    "load",
    "register_family",
    "site_of",
]
