"""Translate the names that other tools give to tensors of a model into paths of sites.

TransformerLens and SAELens name a tensor by a hook, `blocks.5.hook_resid_pre`; TransformerLens 3 also by the part
that it leaves, `blocks.5.mlp.hook_out`. sparsify and others name a module of transformers, `model.layers.5` or,
relative to the base model, `layers.5.mlp`. Both become a path with `*` for the layer, as `sites.site_of` reads it.

What a hook means is what TransformerLens 3 captures in a model whose weights it has not processed; a test compares
the two for every family that is named here.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from cratelm.errors import InputError

_HOOK = re.compile(r"blocks\.(\d{1,6}|\*)\.(.+)")
_EMBEDDINGS = ("hook_embed", "embed.hook_out")
_NUMBER = re.compile(r"(?<=\.)\d{1,6}(?=\.|$)")


@dataclass(frozen=True)
class _Family:
    """Names of the modules in a family of models. Those in a block are relative to it; empty: there is none."""

    prefixes: tuple[str, ...]
    """of the base model, in the language model"""
    blocks: str
    embedding: str
    attention: str
    heads: str
    """map whose input are the outputs of all heads, side by side"""
    mlp: str
    neurons: str
    """the MLP's activations"""
    pre: str = ""
    """map whose output are the MLP's neurons before the activation function; if gated, that of the gate"""
    linear: str = ""
    """if gated, the map whose output the gate is multiplied with"""
    query: str = ""
    """map of the queries, with {} for q, k or v"""
    norm_1: str = ""
    norm_2: str = ""
    attention_norm: str = ""
    """norm of the attention's output, before it is added to the residual stream"""
    mlp_norm: str = ""
    attention_added: str = ""
    """what is added to the residual stream, where the attention itself returns the stream"""
    mlp_added: str = ""
    """likewise of the MLP, or of an MLP that is no module"""
    is_parallel: bool = False
    """True if attention and MLP read the same residual stream, so that there is none between them"""
    model_type: str = ""
    """the family has this name in configurations; empty: only its modules' names decide"""


_GPT2 = _Family(
    ("transformer",), "h", "wte", "attn", "attn.c_proj", "mlp", "mlp.c_proj:input", "mlp.c_fc",
    norm_1="ln_1", norm_2="ln_2",
)  # fmt: skip
_LLAMA = _Family(
    ("model", "model.language_model"), "layers", "embed_tokens", "self_attn", "self_attn.o_proj", "mlp",
    "mlp.down_proj:input", "mlp.gate_proj", "mlp.up_proj", "self_attn.{}_proj",
    norm_1="input_layernorm", norm_2="post_attention_layernorm",
)  # fmt: skip
_GEMMA = replace(
    _LLAMA,
    norm_2="pre_feedforward_layernorm",
    attention_norm="post_attention_layernorm",
    mlp_norm="post_feedforward_layernorm",
)
_CRATE = _Family(
    ("model",), "layers", "embed_tokens", "mssa", "mssa.output", "ista", "ista.code",
    norm_1="norm_mssa", norm_2="norm_ista",
)  # fmt: skip
_BLOOM = _Family(
    ("transformer",), "h", "word_embeddings", "self_attention", "self_attention.dense", "mlp",
    "mlp.dense_4h_to_h:input", "mlp.dense_h_to_4h", norm_1="input_layernorm", norm_2="post_attention_layernorm",
    attention_added="self_attention.dense", mlp_added="mlp.dense_4h_to_h", model_type="bloom",
)  # fmt: skip
_FALCON = replace(_BLOOM, attention_added="", mlp_added="", model_type="falcon")
_FAMILIES = (
    _BLOOM,
    _FALCON,  # one after the other
    replace(_FALCON, norm_2="", is_parallel=True),  # side by side, after one norm
    replace(_FALCON, norm_1="ln_attn", norm_2="ln_mlp", is_parallel=True),
    _Family(
        ("transformer",), "blocks", "wte", "attn", "attn.out_proj", "ffn", "ffn.down_proj:input", "ffn.up_proj",
        norm_1="norm_1", norm_2="norm_2", mlp_added="ffn.down_proj", model_type="mpt",
    ),
    _Family(  # OPT, whose MLP is no module
        ("model.decoder",), "layers", "embed_tokens", "self_attn", "self_attn.out_proj", "", "fc2:input", "fc1",
        query="self_attn.{}_proj", norm_1="self_attn_layer_norm", norm_2="final_layer_norm", mlp_added="fc2",
        model_type="opt",
    ),
    _CRATE,
    _GPT2,
    _Family(  # GPT-J
        ("transformer",), "h", "wte", "attn", "attn.out_proj", "mlp", "mlp.fc_out:input", "mlp.fc_in",
        query="attn.{}_proj", norm_1="ln_1", is_parallel=True,
    ),
    _Family(  # GPT-NeoX, Pythia
        ("gpt_neox",), "layers", "embed_in", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h:input",
        "mlp.dense_h_to_4h", norm_1="input_layernorm", norm_2="post_attention_layernorm",
    ),
    _GEMMA,  # Gemma 2 and 3
    replace(_GEMMA, norm_1="", norm_2=""),  # OLMo 2
    _LLAMA,  # LLaMA, Mistral, Qwen, Gemma, OLMo
    _Family(  # Phi
        ("model",), "layers", "embed_tokens", "self_attn", "self_attn.dense", "mlp", "mlp.fc2:input", "mlp.fc1",
        query="self_attn.{}_proj", norm_1="input_layernorm", is_parallel=True,
    ),
)  # fmt: skip
"""in the order in which they are tried; a model is of the first one whose attention and norms it has"""


def path_of(model: nn.Module, name: str) -> tuple[str, int]:
    """Return the path of the site that another tool calls `name`, with `*` for the layer, and the layer's number.

    `blocks.1.hook_resid_post` of a LLaMA gives `model.layers.*` and 1; a name without a number, such as
    `hook_embed`, gives layer 0. Raises `InputError`, which lists the names that are known, for one that the model
    does not have.
    """
    hook = _HOOK.fullmatch(name)
    if hook and hook[2].split(".")[-1].startswith("hook_"):
        path, number = _points(model).get(hook[2]), hook[1]
        if path is not None:
            return path, 0 if number == "*" else int(number)
    elif name in _EMBEDDINGS:
        embedding = _embedding(model)
        if embedding:
            return embedding, 0
    elif name and (found := _module(model, name)):
        return found
    raise InputError(
        f"{name!r} is no tensor of {type(model).__name__}: {_known(model)}; name the site that is meant with --site"
    )


def is_hook_name(name: str) -> bool:
    """Return whether `name` has the form of a name of TransformerLens."""
    return name.rpartition(".")[2].startswith("hook_")


def path_in_family(hook: str, *, is_crate: bool) -> str | None:
    """Return the path of `hook`, the part after `blocks.N.`, in CRATE or GPT-2 without a model; None for others."""
    family = _CRATE if is_crate else _GPT2
    return _paths(family, family.prefixes[0], family.is_parallel).get(hook)


def hooks_of_families() -> list[str]:
    """Return the hooks, without `blocks.N.`, that GPT-2 and CRATE have."""
    return sorted(set.intersection(*(set(_paths(f, "", f.is_parallel)) for f in (_GPT2, _CRATE))))


_ADDED = ("hook_attn_out", "hook_resid_mid", "hook_mlp_out")
"""hooks of what is added to the residual stream, and of the stream in between"""


def _points(model: nn.Module) -> dict[str, str]:
    """Return the paths of the model's sites by the part of the hook's name after `blocks.N.`."""
    found = _family(model)
    if found is None:
        return {}
    family, prefix, block = found
    # GPT-NeoX decides it by its configuration
    is_parallel = family.is_parallel or getattr(block, "use_parallel_residual", False)
    points = _paths(family, prefix, is_parallel)
    if getattr(model.config, "residual_multiplier", 1) != 1:  # Granite scales what it adds
        return {hook: path for hook, path in points.items() if hook not in _ADDED}
    return points


def _family(model: nn.Module) -> tuple[_Family, str, nn.Module] | None:
    """Return the family of a model, the prefix of its base model, and its first block; None if it is of none."""
    config: Any = getattr(model, "config", None)
    after_the_stream = not getattr(config, "do_layer_norm_before", True)  # OPT-350m
    if after_the_stream or getattr(config, "apply_residual_connection_post_layernorm", False):
        return None  # the stream itself is normalised
    for family in _FAMILIES:
        if family.model_type not in ("", getattr(config, "model_type", "")):
            continue
        for prefix in family.prefixes:
            block = _submodule(model, f"{prefix}.{family.blocks}.0")
            needed = (family.heads, family.norm_1, family.norm_2, family.attention_norm)
            has_all = block is not None and all(_submodule(block, n) for n in needed if n)
            if has_all and bool(family.mlp_norm) == hasattr(block, "post_feedforward_layernorm"):
                assert block is not None
                return family, prefix, block
    return None


def _paths(f: _Family, prefix: str, is_parallel: bool) -> dict[str, str]:
    added = f.attention_norm or f.attention_added or f.attention
    mlp_added = f.mlp_norm or f.mlp_added or f.mlp
    points = {
        "hook_resid_pre": ":input",
        "hook_in": ":input",
        "hook_resid_post": "",
        "hook_out": "",
        "hook_attn_out": added,
        "attn.hook_out": f.attention,
        "attn.hook_z": f"{f.heads}:input",
        "attn.o.hook_in": f"{f.heads}:input",
        "attn.o.hook_out": f.heads,
        "hook_mlp_out": mlp_added,
        "mlp.hook_post": f.neurons,
    }
    if f.mlp:
        points |= {"mlp.hook_in": f"{f.mlp}:input", "mlp.hook_out": f.mlp}
    if not is_parallel:
        points["hook_resid_mid"] = f"{added}:residual"
    if f.pre:
        points |= {"mlp.hook_pre": f.pre, f"mlp.{'gate' if f.linear else 'in'}.hook_out": f.pre}
        points |= {"mlp.out.hook_in": f.neurons, "mlp.out.hook_out": f.neurons.partition(":")[0]}
    if f.linear:
        points |= {"mlp.hook_pre_linear": f.linear, "mlp.in.hook_out": f.linear}
    if f.query:
        for part in "qkv":
            points |= dict.fromkeys(
                (f"attn.hook_{part}", f"attn.{part}.hook_out"), f.query.format(part)
            )
    norms = {
        "ln1": f.norm_1, "ln2": f.norm_2, "ln1_post": f.attention_norm, "ln2_post": f.mlp_norm,
    }  # fmt: skip
    for name, norm in norms.items():
        if norm:
            points |= {f"{name}.hook_in": f"{norm}:input", f"{name}.hook_out": norm}
            points[f"{name}.hook_normalized"] = f"{norm}:normalized"
    if f is _CRATE:  # its own names, as `interop.transformer_lens` gives them
        points |= {"hook_neurons": f.neurons, "ista.code.hook_out": f.neurons}
        points |= {"mssa.hook_out": f.attention, "ista.hook_out": f.mlp}
        points |= {
            f"mssa.{of}.hook_out": f"mssa.{of}" for of in ("projection", "subspace", "heads")
        }
    start = f"{prefix}.{f.blocks}.*" if prefix else f"{f.blocks}.*"
    return {
        hook: f"{start}{path}" if path.startswith(":") or not path else f"{start}.{path}"
        for hook, path in points.items()
    }


def _embedding(model: nn.Module) -> str:
    """Return the path of the embedding of tokens; empty for a family that is not known or scales it afterwards."""
    found = _family(model)
    scaled = (
        "Gemma" in type(model).__name__ or getattr(model.config, "embedding_multiplier", 1) != 1
    )
    return "" if found is None or scaled else f"{found[1]}.{found[0].embedding}"


def _module(model: nn.Module, name: str) -> tuple[str, int] | None:
    """Return the path and layer of a module of the model, named in full or from the base model on; None if absent."""
    base = getattr(model, "base_model_prefix", "")
    named, end = name, ""
    for side in (
        "input",
        "output",
    ):  # `model.layers.5:input`, and SAELens's `model.layers.5.output`
        for separator in ":.":
            if name.endswith(separator + side):
                named, end = name.removesuffix(separator + side), f":{side}"
    spellings = [
        named,
        f"{base}.{named}",
        f"{base}.decoder.{named}",
        f"{base}.language_model.{named}",
    ]
    if "." not in named:  # a folder may be named layers_5_mlp
        spellings += [re.sub(r"_(\d+)(?:_|$)", r".\1.", s).strip(".") for s in spellings]
    for spelling in spellings:
        if _submodule(model, spelling) is not None:
            number = _NUMBER.search(spelling)
            path = _NUMBER.sub("*", spelling, count=1)
            return path + end.replace(":output", ""), int(number[0]) if number else 0
    return None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path) if path else None
    except AttributeError:
        return None


def _known(model: nn.Module) -> str:
    """Return which names are known, in words."""
    hooks = sorted(_points(model))
    if not hooks:
        return (
            "names of TransformerLens are known for CRATE, GPT-2, GPT-J, GPT-NeoX, LLaMA and its relatives, Gemma, OLMo 2,"
            " Phi, OPT, BLOOM, Falcon, MPT and Granite, and for other models names of modules"
        )
    return f"known are blocks.N. and one of {', '.join(hooks)}, hook_embed, and names of modules"
