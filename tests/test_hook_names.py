"""Names of TransformerLens and of modules, as sites: the tensor is the one that TransformerLens captures."""

import copy
from typing import Any

import pytest
import torch
import transformers

from cratelm.errors import InputError
from cratelm.models import build, capture, site_of
from cratelm.models.hook_names import hooks_of_families, path_in_family, path_of
from cratelm.models.sites import hooked

IDS = torch.randint(0, 101, (2, 7), generator=torch.Generator().manual_seed(0))
_SMALL: dict[str, Any] = {"vocab_size": 101, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip
_GATED: dict[str, Any] = {
    **_SMALL,
    "intermediate_size": 40,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
_SIZES: dict[str, dict[str, Any]] = {"GPT2": {"vocab_size": 101, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}, "GPTNeoX": {**_SMALL, "intermediate_size": 40}, "Phi": {**_SMALL, "intermediate_size": 40}}  # fmt: skip
_SIZES |= {"GPTJ": {**_SIZES["GPT2"], "rotary_dim": 4}}
_FALCON = {**_SMALL, "ffn_hidden_size": 40}
_SIZES |= {"OPT": {**_SMALL, "ffn_dim": 40, "word_embed_proj_dim": 16}, "Falcon": _FALCON, "Bloom": {"vocab_size": 101, "hidden_size": 16, "n_layer": 2, "n_head": 2}}  # fmt: skip
_SIZES |= {"Mpt": {"vocab_size": 101, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}}  # fmt: skip
_SIZES |= {"Granite": {**_GATED, "residual_multiplier": 0.2, "embedding_multiplier": 3.0}}
_VARIANTS: dict[str, dict[str, Any]] = {
    "GPTNeoX sequential": {"use_parallel_residual": False},
    "Falcon sequential": {"parallel_attn": False},
    "Falcon two norms": {"new_decoder_architecture": True, "num_kv_heads": 1},
}
OTHERS = ["OPT", "Bloom", "Falcon", "Falcon sequential", "Falcon two norms", "Mpt", "Granite"]
"""families whose blocks add up differently"""
FAMILIES = ["GPT2", "GPTNeoX", "GPTNeoX sequential", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo2", "Phi", "GPTJ"]  # fmt: skip
RESIDUAL = ("blocks.{}.hook_resid_pre", "blocks.{}.hook_resid_post", "blocks.{}.hook_attn_out", "blocks.{}.hook_mlp_out", "blocks.{}.attn.hook_z", "blocks.{}.mlp.hook_post", "blocks.{}.ln1.hook_normalized")  # fmt: skip


def tiny(family):
    """A model of two layers whose norms do not have weight 1, so that what they multiply by is seen."""
    if family == "CRATE":
        made = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
        model = build("crate-2l", vocab_size=101, max_position_embeddings=32, seed=1, **made)
    else:
        name = family.split()[0]
        kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        stem = {"Gemma3": "Gemma3Text"}.get(name, name)
        fields = {**_SIZES.get(name, _GATED), **_VARIANTS.get(family, {})}
        config = getattr(transformers, f"{stem}Config")(**fields)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = getattr(transformers, name + kind)(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif "dictionary" not in key:
                parameter *= 5
    return model.eval()


def cache_of(model):
    """What TransformerLens captures, by its own names; the model itself is left as it is."""
    pytest.importorskip("transformer_lens", reason="the extra `tools` is not installed")
    from cratelm.interop.transformer_lens import bridge

    lens = bridge(copy.deepcopy(model))
    with torch.no_grad():
        _, cache = lens.run_with_cache(IDS)
    return {name: cache[name] for name in cache if isinstance(cache[name], torch.Tensor)}


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS, "CRATE"])
def test_every_hook_is_the_tensor_of_transformer_lens(family):
    model = tiny(family)
    try:
        cache = cache_of(model)
    except (ValueError, AttributeError, TypeError) as error:
        pytest.skip(f"TransformerLens does not wrap {family}: {error}")
    compared = set()
    for name, theirs in cache.items():
        hook = name.removeprefix("blocks.1.")
        if hook == name:
            continue
        try:
            site = site_of(model, name)
        except InputError:
            continue
        (ours,) = capture(model, site, IDS)
        expected = theirs.reshape(*IDS.shape, -1)  # heads side by side; OPT's MLP has no batches
        assert ours.shape == expected.shape, name
        assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max(), name
        compared.add(hook)
    wanted = {hook.removeprefix("blocks.{}.") for hook in RESIDUAL}
    wanted -= {"attn.hook_z", "mlp.hook_post", "hook_mlp_out"} if family == "CRATE" else set()
    wanted -= {"ln1.hook_normalized"} if family == "Olmo2" else set()
    scaled = {"hook_attn_out", "hook_mlp_out", "hook_resid_mid"} if family == "Granite" else set()
    assert wanted - scaled <= compared, family
    assert not scaled & compared
    has_mid = "hook_resid_mid" in {n[9:] for n in cache} - scaled
    assert ("hook_resid_mid" in compared) == has_mid, family
    assert len(compared) >= (20 if family != "CRATE" else 14), sorted(compared)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "CRATE", "GPTNeoX", "Gemma2"])
def test_names_of_modules(family):
    """In full, from the base model on, as sparsify names folders, and with a side."""
    model = tiny(family)
    block = path_of(model, "blocks.1.hook_resid_post")
    inner = block[0].replace("*", "1").partition(".")[2]
    for name in (block[0].replace("*", "1"), inner, inner.replace(".", "_"), f"{inner}.output"):
        assert path_of(model, name) == block
    assert path_of(model, f"{inner}.input") == path_of(model, "blocks.1.hook_resid_pre")
    assert path_of(model, f"{inner}:input") == path_of(model, "blocks.1.hook_in")


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma2", "CRATE", "OPT", "Bloom", "Mpt"])
@torch.no_grad()
def test_an_edit_between_attention_and_mlp_changes_the_stream(family):
    """Not only what the next norm reads: the last block's output is that of the edited stream."""
    model = tiny(family)
    if family == "CRATE":
        model.model.layers[1].residual = True
    site = site_of(model, "blocks.1.hook_resid_mid")
    (middle,) = capture(model, site, IDS)
    delta = torch.randn(middle.shape, generator=torch.Generator().manual_seed(3))
    block = model.get_submodule(path_of(model, "blocks.1.hook_resid_post")[0].replace("*", "1"))
    seen = []
    handle = block.register_forward_hook(
        lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
    )
    with hooked(model, site, lambda place, x: x + delta):
        model(input_ids=IDS)
    handle.remove()
    x = middle + delta
    parts = {
        "GPT2": lambda b, x: b.mlp(b.ln_2(x)),
        "Llama": lambda b, x: b.mlp(b.post_attention_layernorm(x)),
        "Gemma2": lambda b, x: b.post_feedforward_layernorm(b.mlp(b.pre_feedforward_layernorm(x))),
        "CRATE": lambda b, x: b.ista(b.norm_ista(x)),
        "OPT": lambda b, x: b.fc2(b.activation_fn(b.fc1(b.final_layer_norm(x)))),
        "Bloom": lambda b, x: b.mlp(b.post_attention_layernorm(x), 0 * x),
        "Mpt": lambda b, x: b.ffn(b.norm_2(x), 0 * x),
    }
    assert torch.allclose(seen[0], x + parts[family](block, x), atol=1e-4)


@pytest.mark.parametrize(("family", "norm"), [("GPT2", "ln_1"), ("Llama", "input_layernorm"), ("Gemma2", "input_layernorm")])  # fmt: skip
@torch.no_grad()
def test_an_edit_of_what_is_normalised_is_scaled_by_the_weight(family, norm):
    model = tiny(family)
    path = path_of(model, "blocks.1.hook_out")[0].replace("*", "1")
    module = model.get_submodule(f"{path}.{norm}")
    (before,) = capture(model, f"{path}.{norm}", IDS)
    site = site_of(model, "blocks.1.ln1.hook_normalized")
    seen = []
    with hooked(model, site, lambda place, x: 2 * x):
        handle = module.register_forward_hook(lambda m, a, o: seen.append(o))
        model(input_ids=IDS)
        handle.remove()
    bias = getattr(module, "bias", None)
    bias = 0 if bias is None else bias
    assert torch.allclose(seen[0] - bias, 2 * (before - bias), atol=1e-4)
    with hooked(model, site, lambda place, x: x.clone()):
        again = model(input_ids=IDS).logits
    assert torch.allclose(again, model(input_ids=IDS).logits, atol=1e-5)


def test_several_layers_at_once():
    model = tiny("Llama")
    found = capture(model, "blocks.*.hook_resid_mid", IDS)
    assert len(found) == 2
    for number, tensor in enumerate(found):
        (norm_input,) = capture(model, f"model.layers.{number}.post_attention_layernorm:input", IDS)
        assert torch.equal(tensor, norm_input)


def test_what_is_unknown_is_listed():
    for name in ("blocks.0.hook_nothing", "blocks.0.attn.hook_pattern", "hook_pos_embed", "layers.9.mlp", ""):  # fmt: skip
        with pytest.raises(InputError, match=r"is no tensor of Llama.*hook_resid_mid.*--site"):
            path_of(tiny("Llama"), name)
    with pytest.raises(InputError, match="hook_resid_mid' is no tensor"):
        path_of(tiny("GPTNeoX"), "blocks.0.hook_resid_mid")  # attention and MLP side by side
    with pytest.raises(InputError, match=r"mlp\.hook_pre' is no tensor of CrateForCausalLM"):
        path_of(tiny("CRATE"), "blocks.0.mlp.hook_pre")
    mamba = transformers.MambaConfig(vocab_size=101, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"known for CRATE, GPT-2.*--site"):
        path_of(transformers.MambaForCausalLM(mamba), "blocks.0.hook_resid_pre")
    for name in ("blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out", "hook_embed"):  # scaled
        with pytest.raises(InputError, match="is no tensor"):
            path_of(tiny("Granite"), name)
    after = transformers.OPTConfig(**_SIZES["OPT"], do_layer_norm_before=False)
    with pytest.raises(InputError, match="is no tensor"):  # the stream itself is normalised
        path_of(transformers.OPTForCausalLM(after), "blocks.0.hook_resid_mid")
    with pytest.raises(InputError, match="one of input, output, residual, normalized"):
        site_of(tiny("GPT2"), "transformer.h.*:inputs")
    with pytest.raises(InputError, match="not inside a numbered block"):
        site_of(tiny("GPT2"), "transformer.wte:residual")
    with pytest.raises(InputError, match="neither a layer norm nor an RMS norm"):
        site_of(tiny("GPT2"), "transformer.h.*.mlp.c_fc:normalized")


def test_names_without_a_model():
    assert path_in_family("hook_resid_pre", is_crate=True) == "model.layers.*:input"
    assert path_in_family("hook_mlp_out", is_crate=False) == "transformer.h.*.mlp"
    assert path_in_family("mlp.hook_pre", is_crate=True) is None
    assert {"hook_resid_mid", "mlp.hook_post"} <= set(hooks_of_families())


def test_a_model_that_also_reads_images():
    """Its language model lies deeper; names from the base model on still find it."""
    text = {**_GATED, "hidden_size": 16}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    expected = ("model.language_model.layers.*", 1)
    for name in ("blocks.1.hook_resid_post", "layers.1", "model.language_model.layers.1"):
        assert path_of(model, name) == expected
    site = site_of(model, "blocks.*.hook_mlp_out")
    assert site.paths[1] == "model.language_model.layers.1.post_feedforward_layernorm"
