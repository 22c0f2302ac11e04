"""Models: CRATE in one file, its GPT-2 twin, sizes by name, and the sites of neurons in any model."""

from cratelm.models.crate import CrateConfig, CrateForCausalLM, CrateModel
from cratelm.models.sites import Site, capture, site_of
from cratelm.models.sizes import SIZES, build, config_of, count_parameters, load

__all__ = [
    "SIZES",
    "CrateConfig",
    "CrateForCausalLM",
    "CrateModel",
    "Site",
    "build",
    "capture",
    "config_of",
    "count_parameters",
    "load",
    "site_of",
]
