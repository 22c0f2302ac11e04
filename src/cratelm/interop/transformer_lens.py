"""CRATE in TransformerLens: run with cache, hook names, patching (extra `tools`).

TransformerLens wraps a model with an adapter that names its parts
(https://github.com/TransformerLensOrg/TransformerLens/issues/1298). The names below are those of TransformerLens for
the parts that it has in common with CRATE, and those of CRATE for all others. The computation is still that of
`crate.py`.
"""

from typing import Any

from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    EmbeddingBridge,
    LinearBridge,
    NormalizationBridge,
    OpaqueBlockBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers.modeling_utils import PreTrainedModel

from cratelm.models.crate import CrateForCausalLM

_ALIASES = {
    "hook_attn_out": "mssa.hook_out",
    "hook_resid_mid": "ln2.hook_in",
    "hook_neurons": "ista.code.hook_out",
}


class CrateAdapter(ArchitectureAdapter):
    """Maps the modules of `CrateForCausalLM` to the parts of a TransformerLens model.

    `blocks.L.hook_neurons` is the sparse code A [B, T, H]; `blocks.L.hook_resid_mid` and `hook_resid_post` are the
    residual stream [B, T, D] before and after sparse coding.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        cfg.normalization_type, cfg.positional_embedding_type = "LN", "standard"
        self.component_mapping = {
            "embed": EmbeddingBridge("model.embed_tokens"),
            "pos_embed": PosEmbedBridge("model.embed_positions"),
            "blocks": OpaqueBlockBridge("model.layers", cfg, _parts(cfg), _ALIASES),
            "ln_final": _norm("model.norm", cfg),
            "unembed": UnembeddingBridge("lm_head"),
        }


def _parts(cfg: Any) -> dict[str, GeneralizedComponent]:
    mssa = {
        "projection": LinearBridge("projection"),
        "subspace": GeneralizedComponent("subspace"),
        "heads": GeneralizedComponent("heads"),
        "output": LinearBridge("output"),
    }
    return {
        "ln1": _norm("norm_mssa", cfg),
        "mssa": GeneralizedComponent("mssa", submodules=mssa),
        "ln2": _norm("norm_ista", cfg),
        "ista": GeneralizedComponent("ista", submodules={"code": GeneralizedComponent("code")}),
    }


def _norm(name: str, cfg: Any) -> NormalizationBridge:
    """Return a norm that is computed by PyTorch's own LayerNorm, so that the logits stay bit-identical."""
    return NormalizationBridge(name, cfg, use_native_layernorm_autograd=True)


ArchitectureAdapterFactory.register_adapter(CrateForCausalLM.__name__, CrateAdapter)


def bridge(model: PreTrainedModel, tokenizer: Any = None) -> TransformerBridge:
    """Return `model` as a TransformerLens model, for `run_with_cache` and `run_with_hooks`.

    CRATE uses the adapter above; other models (GPT-2 twins) use TransformerLens's own adapters. The model is
    wrapped in place: its outputs stay the same, but the paths of its modules change, so that `cratelm.site_of` no
    longer finds them; load the model again for that. Raises `ValueError` for an architecture that TransformerLens
    does not support, and for a CRATE with other steps than MSSA and ISTA.
    """
    if isinstance(model, CrateForCausalLM):
        steps = (model.config.attention, model.config.feedforward)
        if steps[0] == "tssa" or steps[1] != "ista":
            raise ValueError(
                f"the model has the steps {' and '.join(steps)}, but only CRATE with MSSA and ISTA has an adapter for"
                " TransformerLens: use hooks on the model itself (cratelm.models.sites.hooked)"
            )
    return build_bridge_from_module(
        model, type(model).__name__, hf_config=model.config, tokenizer=tokenizer
    )
