"""Read the settings and weights of autoencoders in the formats of SAELens, sparsify and dictionary_learning.

Each function takes what the files contain and returns a `SparseAutoencoder`, or raises an `InputError` that names the
setting which is not supported: nothing is guessed. `autoencoder_files` finds and reads the files.

Shape legend: H inputs, S latents.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from cratelm.errors import InputError
from cratelm.models.sparse_autoencoder import Activation, SparseAutoencoder, SparseAutoencoderConfig
from cratelm.runs.arguments import LARGEST

Weights = Mapping[str, torch.Tensor]
_ACTIVATIONS: dict[str, Activation] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}
"""by architecture in SAELens; matryoshka autoencoders are trained in another way, and decode in the same"""
_NORMALIZATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")
_WRITES_STREAM = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
)


# --- SAELens -----------------------------------------------------------------------------------------


def from_sae_lens(
    settings: Mapping[str, Any], weights: Weights, source: object, scale: float | None = None
) -> SparseAutoencoder:
    """Return an autoencoder in the format of SAELens 6, or of an older version, whose settings are not nested.

    `scale` is the factor of the activations that is not folded into the weights, where the file states one; `source`
    stands in messages.
    """
    metadata = settings.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else settings
    architecture = settings.get("architecture") or "standard"
    function = settings.get("activation_fn_str") or settings.get("activation_fn") or "relu"
    k = settings.get("k")
    if function == "topk" and architecture in ("standard", "topk"):  # before version 6
        architecture, k = "topk", (settings.get("activation_fn_kwargs") or {}).get("k", k)
    elif function not in ("relu", "topk"):
        raise _unsupported(source, "activation_fn", function, "relu, topk")
    if architecture not in _ACTIVATIONS:
        raise _unsupported(source, "architecture", architecture, ", ".join(_ACTIVATIONS))
    _reject(
        source, metadata, "hook_head_index", "hook_point_head_index", "hook_name_out", "is_transcoder"
    )  # fmt: skip
    module = str(metadata.get("hf_hook_name") or "")
    hook = str(metadata.get("hook_name") or metadata.get("hook_point") or module)
    layer = next(
        (metadata[n] for n in ("layer", "hook_layer", "hook_point_layer") if n in metadata), None
    )
    hook = hook.replace("{layer}", str(layer)) if type(layer) is int else hook  # before version 3
    processing = metadata.get("model_from_pretrained_kwargs") or {}
    config = SparseAutoencoderConfig(
        **_sizes(settings.get("d_in"), settings.get("d_sae"), source),
        activation=_ACTIVATIONS[architecture],
        k=_k(k, source) if architecture == "topk" else 0,
        subtracts_b_dec=settings.get("apply_b_dec_to_input", True),
        centres=bool(processing.get("center_writing_weights")) and hook.endswith(_WRITES_STREAM),
        decoder_norms="selection" if settings.get("rescale_acts_by_decoder_norm") else "none",
        hook_name=hook,
        module_name=module,
        site=str(metadata.get("site") or ""),
        layer=layer if type(layer) is int else None,
        model_name=str(metadata.get("model_name") or ""),
        model_identity=(metadata.get("provenance") or {}).get("model_identity"),
    )
    config = _normalization(config, settings.get("normalize_activations"), source, scale)
    weights = dict(weights)
    if "topk_threshold" in weights:  # of BatchTopK in training: one number, in double precision
        weights["threshold"] = weights.pop("topk_threshold").expand(config.d_sae)
    return _made(config, weights, source, _latent_scale(settings, weights, source))


def _normalization(
    config: SparseAutoencoderConfig, named: Any, source: object, scale: float | None
) -> SparseAutoencoderConfig:
    """Return the configuration with the normalisation that SAELens calls `named`."""
    if isinstance(named, bool) or named is None:  # version 3 and before
        named = "expected_average_only_in" if named else "none"
    if named not in _NORMALIZATIONS:
        raise _unsupported(source, "normalize_activations", named, ", ".join(_NORMALIZATIONS))
    if named == "expected_average_only_in":
        if scale is None:
            print(
                f"note: {source} has normalize_activations {named}, and no activation_scaler.json: its weights are taken"
                " to include the factor, as SAELens takes them",
                file=sys.stderr,
                flush=True,
            )
        return replace(config, scale=1.0 if scale is None else scale)
    return config if named == "none" else replace(config, normalization=named)


def _latent_scale(
    settings: Mapping[str, Any], weights: dict[str, torch.Tensor], source: object
) -> torch.Tensor | None:
    """Remove the factor of the latents from the weights, and return it; None if it is 1 everywhere."""
    names = [n for n in ("finetuning_scaling_factor", "scaling_factor") if n in weights]
    if not names:
        return None
    factor = weights.pop(names[0])
    if bool((factor == 1).all()):
        return None
    if not settings.get("finetuning_scaling_factor"):
        raise InputError(
            f"{source} has weight {names[0]}, but its setting finetuning_scaling_factor is not true: it is not clear"
            " whether latents are to be multiplied by it"
        )
    return factor


# --- sparsify ----------------------------------------------------------------------------------------


def from_sparsify(
    settings: Mapping[str, Any], weights: Weights, source: object, hook: str, model_name: str = ""
) -> SparseAutoencoder:
    """Return an autoencoder of EleutherAI's sparsify: TopK after a ReLU, with b_dec subtracted before.

    `hook` is the module that it reads, which is the name of its folder.
    """
    _reject(
        source, settings, "transcode", "skip_connection", "embed_skip", "gram_lookup", "signed", "matching_pursuit"
    )  # fmt: skip
    if settings.get("activation", "topk") != "topk":
        raise _unsupported(source, "activation", settings["activation"], "topk")
    d_in, latents = settings.get("d_in"), settings.get("num_latents")
    if not latents and type(d_in) is int and type(settings.get("expansion_factor")) is int:
        latents = d_in * settings["expansion_factor"]
    config = SparseAutoencoderConfig(
        **_sizes(d_in, latents, source),
        activation="topk",
        k=_k(settings.get("k"), source),
        hook_name=hook,
        model_name=model_name,
    )
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    return _made(config, _renamed(weights, names, ("encoder.weight",)), source)


# --- dictionary_learning -----------------------------------------------------------------------------

_DICTIONARIES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "AutoEncoder": ({}, {"encoder.bias": "b_enc", "bias": "b_dec"}),
    "AutoEncoderNew": ({"subtracts_b_dec": False}, {"encoder.bias": "b_enc", "decoder.bias": "b_dec"}),
    "AutoEncoderTopK": ({"activation": "topk"}, {"encoder.bias": "b_enc"}),
    "BatchTopKSAE": ({"activation": "jumprelu"}, {"encoder.bias": "b_enc"}),
    "MatryoshkaBatchTopKSAE": ({"activation": "jumprelu"}, {}),
    "JumpReluAutoEncoder": (
        {"activation": "jumprelu", "subtracts_b_dec": False, "decoder_norms": "latents"}, {},
    ),
    "GatedAutoEncoder": (
        {"activation": "gated", "decoder_norms": "latents"},
        {"gate_bias": "b_gate", "mag_bias": "b_mag", "decoder_bias": "b_dec"},
    ),
}  # fmt: skip
"""by `dict_class`: what differs from the standard autoencoder, and names of biases -> those of cratelm"""
_TENSORS = {
    "resid_pre": "hook_resid_pre", "resid_in": "hook_resid_pre", "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post", "resid_out": "hook_resid_post", "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}  # fmt: skip
_READ_BY_INPUT = ("pre", "_in", "mid")
"""ends of the names of `_TENSORS` that a module may read, rather than write"""
_SUBMODULE = re.compile(rf"({'|'.join(_TENSORS)})(?:_layer_?(\d+))?")


def from_dictionary_learning(
    settings: Mapping[str, Any], weights: Weights, source: object, folders: tuple[str, ...]
) -> SparseAutoencoder:
    """Return an autoencoder of dictionary_learning, from its `config.json` and the tensors of `ae.pt`.

    `folders` are the names of its folder and of those above, from the inside out: where the settings name no module,
    one of them may, as `resid_post_layer_8`.
    """
    trainer = settings.get("trainer")
    trainer = trainer if isinstance(trainer, Mapping) else settings
    kind = trainer.get("dict_class")
    if kind not in _DICTIONARIES:
        raise _unsupported(source, "dict_class", kind, ", ".join(_DICTIONARIES))
    fields, names = _DICTIONARIES[kind]
    names = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", **names}
    tensors = _renamed(weights, names, ("encoder.weight", "decoder.weight"))
    k = tensors.pop("k", None)
    if fields.get("activation") == "topk":
        tensors.pop("threshold", None)  # of another way to encode, which is not the class's own
        fields = {**fields, "k": _k(trainer.get("k") if k is None else int(k), source)}
    if "threshold" in tensors and tensors["threshold"].dim() == 0 and "W_enc" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(tensors["W_enc"].shape[-1])
    tensors.pop("group_sizes", None)  # of the matryoshka loss
    layer = trainer.get("layer")
    config = SparseAutoencoderConfig(
        **_sizes(trainer.get("activation_dim"), trainer.get("dict_size"), source),
        **fields,
        hook_name=_submodule(trainer, settings.get("buffer") or {}, source, folders),
        layer=layer if type(layer) is int else None,
        model_name=str(trainer.get("lm_name") or ""),
    )
    return _made(config, tensors, source)


def _submodule(
    trainer: Mapping[str, Any], buffer: Mapping[str, Any], source: object, folders: tuple[str, ...]
) -> str:
    """Return the hook that `submodule_name` or a folder's name stands for; empty if none names a tensor."""
    side, layer = str(buffer.get("io", "out")), trainer.get("layer")
    if side not in ("in", "out"):
        raise _unsupported(source, "io", side, "in, out")
    named = str(trainer.get("submodule_name") or "")
    for name in (named, *folders):
        match = _SUBMODULE.fullmatch(name)
        if match is None:
            continue
        if side == "in" and not match[1].endswith(_READ_BY_INPUT):
            raise InputError(f"{source} contradicts itself: io in, and {name}")
        number = int(match[2]) if match[2] is not None else layer
        if type(layer) is int and number != layer:
            raise InputError(f"{source} contradicts itself: layer {layer}, and {name}")
        return f"blocks.{number}.{_TENSORS[match[1]]}" if number is not None else ""
    return f"{named}:input" if named and side == "in" else named


# --- common ------------------------------------------------------------------------------------------


def _made(
    config: SparseAutoencoderConfig,
    weights: Weights,
    source: object,
    latent_scale: torch.Tensor | None = None,
) -> SparseAutoencoder:
    """Return the autoencoder. Raises `InputError` for weights that are missing, unknown or of another shape."""
    for name, shape in config.shapes.items():
        if name not in weights:
            raise InputError(
                f"{source}: weight {name} is missing; the file has {', '.join(weights)}"
            )
        if tuple(weights[name].shape) != shape:
            raise InputError(
                f"{source} describes {config.d_in:,} inputs and {config.d_sae:,} latents, but weight {name} has shape"
                f" {tuple(weights[name].shape)} instead of {shape}: they do not belong together"
            )
    surplus = sorted(weights.keys() - config.shapes.keys())
    if surplus:
        raise InputError(
            f"{source}: weight {surplus[0]} does not belong to an autoencoder with {config.activation}, so that what"
            " it computes is not known"
        )
    if config.k > config.d_sae:
        raise InputError(f"{source} has k {config.k}, but only {config.d_sae} latents")
    return SparseAutoencoder(config, weights, latent_scale).eval()


def _renamed(
    weights: Weights, names: Mapping[str, str], transposed: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Return the weights by cratelm's names; those of linear layers, [out, in] in their files, are transposed."""
    return {names.get(k, k): v.T if k in transposed else v for k, v in weights.items()}


def _sizes(d_in: Any, d_sae: Any, source: object) -> dict[str, Any]:
    for size in (d_in, d_sae):
        if type(size) is not int or not 1 <= size <= LARGEST:
            raise InputError(
                f"{source} has d_in {d_in!r:.40} and d_sae {d_sae!r:.40}: both must be whole numbers from 1 to"
                f" {LARGEST:,}"
            )
    return {"d_in": d_in, "d_sae": d_sae}


def _k(k: Any, source: object) -> int:
    if type(k) is not int or k < 1:
        raise InputError(f"{source} has k {k!r:.40}: it must be a whole number of at least 1")
    return k


def _reject(source: object, settings: Mapping[str, Any], *names: str) -> None:
    """Raise `InputError` if one of the settings, each of which changes what is computed, is switched on."""
    for name in names:
        value = settings.get(name)
        if value is not None and value is not False:
            raise _unsupported(source, name, value, "none")


def _unsupported(source: object, name: str, value: Any, supported: str) -> InputError:
    return InputError(
        f"{source} has {name} {value!r:.60}, which is not supported: supported are {supported}"
    )
