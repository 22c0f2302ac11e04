"""Every family of models alike: what works on CRATE and its twin works on all of them."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shared import SHARED, needs_shared
from torch.nn import functional as F

from cratelm.errors import InputError
from cratelm.models import FAMILIES, SIZES, Tssa, build, capture, count_parameters, load, site_of
from cratelm.models.crate import CrateCache
from cratelm.models.gpt2_activation import Solu, TopK
from cratelm.models.sparse_gpt import AbsTopK

ORACLE = SHARED / "oracle"
VOCABULARY, LONGEST = 64, 48


def tiny(family: str, **overrides: Any) -> Any:
    """A model of two layers, its weights moved from where they start, so that no term is 0 or 1."""
    fields = {"hidden_size": 32, "num_attention_heads": 4, **overrides}
    model = build(f"{family}-2l", vocab_size=VOCABULARY, max_position_embeddings=LONGEST, **fields)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ids(batch=2, length=20):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny(request.param)


# ---- the oracle -----------------------------------------------------------------------------------


@needs_shared
def test_tssa_and_its_gradients_are_those_of_the_released_model():
    expected = load_file(ORACLE / "tssa-expected.safetensors")
    module = Tssa(48, 3, 40)
    module.load_state_dict(
        {
            "projection.weight": expected["projection"],
            "output.weight": expected["output"],
            "temperature": expected["temperature"],
            "denominator_bias": expected["denominator_bias"],
        }
    )
    x: Any = expected["x"].requires_grad_()
    y = module(x)
    assert (y - expected["y"]).abs().max() < 1e-5
    (y.flatten() * torch.linspace(-1, 1, y.numel())).sum().backward()
    assert (x.grad - expected["x_grad"]).abs().max() < 1e-5
    found: Any = module.projection.weight.grad
    assert (found - expected["projection_grad"]).abs().max() < 1e-5


# ---- the pieces, against their formulas -----------------------------------------------------------


def test_tssa_is_causal_and_its_cache_does_not_grow():
    model = tiny("crate-tssa")
    tokens = ids()
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % VOCABULARY
    with torch.no_grad():
        assert torch.equal(model(tokens).logits[:, :10], model(changed).logits[:, :10])
        sizes = []
        for length in (1, 20):
            cache = CrateCache(model.config)
            model(tokens[:, :length], past_key_values=cache, use_cache=True)
            layers: list[Any] = list(cache.layers)
            sizes.append(sum(la.keys.numel() + la.values.numel() for la in layers))
    assert sizes[0] == sizes[1] == 2 * 2 * (32 + 32 + 4)  # layers x rows x (D + D + K)


def test_tssa_says_which_cache_and_which_mask_it_needs():
    from transformers import DynamicCache

    model = tiny("crate-tssa")
    with pytest.raises(ValueError, match="running sums"):
        model(ids(), past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(ValueError, match="no attention between two positions"):
        model(ids(), attention_mask=torch.ones(2, 1, 20, 20))


def test_solu_and_topk_and_abs_topk():
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    solu = Solu(32, 1e-5)
    torch.nn.init.normal_(solu.norm.weight)
    norm = solu.norm
    expected = F.layer_norm(x * torch.softmax(x, -1), (32,), norm.weight, norm.bias, 1e-5)
    assert torch.allclose(solu(x), expected)
    kept = TopK(4)(x)
    threshold = x.relu().sort(-1).values[:, -4:-3]
    assert torch.equal(kept, torch.where(x >= threshold, x.relu(), 0))
    (gradient,) = torch.autograd.grad(kept.sum(), x)
    assert torch.equal(gradient, (kept > 0).float())
    both = AbsTopK(0.25)(x)
    assert torch.equal(both, torch.where(x.abs() >= x.abs().sort(-1).values[:, -8:-7], x, 0))
    assert ((both < 0).sum(), (both != 0).sum(-1).tolist()) == ((both < 0).sum(), [8, 8, 8])
    (gradient,) = torch.autograd.grad(both.sum(), x)
    assert torch.equal(gradient, (both != 0).float())


def test_a_gpt2_with_another_activation_starts_from_the_weights_of_its_twin():
    twin = build("gpt2-2l", vocab_size=64).state_dict()
    for name in ("gpt2-relu-2l", "gpt2-gelu-2l", "gpt2-solu-2l", "gpt2-topk-2l"):
        other = build(name, vocab_size=64)
        weights = other.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in twin.items())
        biases = {n for n, p in other.named_parameters() if n.endswith("bias") and p.requires_grad}
        assert biases == {n for n in weights if n.endswith("act.norm.bias")}
        assert len(biases) == (2 if "solu" in name else 0)


def test_topk_keeps_a_sixteenth():
    codes = capture(tiny("gpt2-topk"), "mlp", ids())
    assert all(((c > 0).sum(-1) <= 8).all() and (c > 0).any() for c in codes)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("crate-2l", {"attention": "other"}, "attention"),
        ("crate-2l", {"feedforward": "other"}, "feedforward"),
        ("gpt2-2l", {"activation": "swish"}, "activation"),
        ("gpt2-topk-2l", {"topk_fraction": 0.0}, "topk_fraction"),
        ("sparse-gpt-2l", {"weight_fraction": 2.0}, "weight_fraction"),
        ("sparse-gpt-2l", {"activation_places": ("attn",)}, "attn"),
        ("crate-tsa-2l", {}, "did you mean crate-tssa-2l"),
        ("crate-tssa-2l", {"experts": 2}, "no field"),
    ],
)
def test_mistakes_are_one_line(name, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        build(name, vocab_size=64, **fields)
    assert "\n" not in str(caught.value)


# ---- sizes ----------------------------------------------------------------------------------------

PARAMETERS = {
    "crate": 722_432,
    "crate-alpha": 853_504,
    "crate-query": 755_200,
    "crate-mlp": 853_504,
    "crate-attention": 787_968,
    "crate-mssa": 590_848,
    "crate-tssa": 724_232,
    "gpt2": 918_144,
    "gpt2-relu": 918_144,
    "gpt2-gelu": 918_144,
    "gpt2-solu": 920_192,
    "gpt2-topk": 918_144,
    "sparse-gpt": 18_221_960,
}
"""trainable parameters at 2l with 4,096 tokens and 256 positions, as docs/families.md states them"""


def test_every_family_has_every_size_and_its_parameter_count_is_stated():
    assert PARAMETERS.keys() == FAMILIES.keys()
    assert len(SIZES) == 5 * len(FAMILIES)
    for family, expected in PARAMETERS.items():
        model = build(f"{family}-2l", vocab_size=4096, max_position_embeddings=256)
        assert count_parameters(model) == expected, family


def test_initial_weights():
    for family in FAMILIES:
        model = build(f"{family}-2l", vocab_size=512, hidden_size=64, num_attention_heads=4)
        scaled = ("output.weight", "fc2.weight", "c_proj.weight")
        zero = ("denominator_bias", "bias", "sink_logit", "bigram_table.weight")
        for name, weight in model.named_parameters():
            if name.endswith(zero):
                assert not weight.any(), name
            elif name.endswith(("temperature", *NORMS)):
                assert (weight == 1).all(), name
            elif not name.endswith(("dictionary", "decoder")):
                expected = 0.02 / (2 if name.endswith(scaled) else 1)  # sqrt(2 L) = 2
                assert abs(weight.std() / expected - 1) < 0.1, name


NORMS = tuple(f"{name}.weight" for name in ("norm", "norm_mssa", "norm_ista", "norm_mlp", "ln_1", "ln_2", "ln_f"))  # fmt: skip


# ---- every family ---------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_implementations_agree(model):
    eager = model(ids()).logits
    implementation = model.config._attn_implementation
    try:
        for other in ("eager", "sdpa"):
            model.set_attn_implementation(other)
            assert torch.allclose(model(ids()).logits, eager, atol=1e-4), other
    finally:
        model.set_attn_implementation(implementation)


def test_bf16_stays_near_fp32_and_gradients_are_finite(model):
    logits = model(ids()).logits
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(ids()).logits
    # Where entries are selected, rounding exchanges some of them, which changes more than rounding does.
    selects = model.config.model_type in ("sparse_gpt", "gpt2_activation")
    assert (narrow.float() - logits).std() < (0.5 if selects else 0.05) * logits.std()
    model(ids(), labels=ids()).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert all(g.abs().sum() > 0 for g in gradients.values()), "a parameter that changes nothing"
    model.zero_grad()


def test_generate_is_the_same_with_and_without_cache(model):
    for options in ({}, {"num_beams": 2}):
        with_cache = model.generate(ids(), max_new_tokens=8, do_sample=False, **options)
        without = model.generate(
            ids(), max_new_tokens=8, do_sample=False, use_cache=False, **options
        )
        assert torch.equal(with_cache, without), options


@torch.no_grad()
def test_left_padding_does_not_reach_the_text(model):
    plain = model(ids()).logits
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids()], 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    assert torch.allclose(found, plain, atol=1e-4)


def test_saved_and_loaded_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(again(ids()).logits, model(ids()).logits)


@torch.no_grad()
def test_neurons_are_those_of_a_hook_set_by_hand_and_steering_reaches_the_logits(model):
    from cratelm.models.sites import hooked

    site = site_of(model)
    width = model.config.get_text_config().hidden_size
    assert set(site.n_neurons) == {width if site.name == "mssa" else 4 * width}
    seen = []
    handles = []
    for path in site.paths:
        module = model.get_submodule(path)
        if site.side == "output":
            handles.append(module.register_forward_hook(lambda m, a, o: seen.append(o)))
        else:
            handles.append(module.register_forward_pre_hook(lambda m, a: seen.append(a[0])))
    plain = model(ids()).logits
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(seen, capture(model, site, ids()), strict=True))

    def raise_first(place, activations):
        changed = activations.clone()
        changed[..., 0] += 5
        return changed if place == 0 else None

    with hooked(model, site, raise_first):
        assert (model(ids()).logits - plain).abs().max() > 1e-3
    assert torch.equal(model(ids()).logits, plain)


def test_the_transformer_lens_bridge_is_for_mssa_and_ista():
    lens = pytest.importorskip("cratelm.interop.transformer_lens", exc_type=ImportError)
    for family in ("crate-tssa", "crate-mlp", "crate-mssa"):
        with pytest.raises(ValueError, match="use hooks on the model itself"):
            lens.bridge(tiny(family))
    for family in ("crate-query", "crate-alpha"):
        expected = tiny(family)(ids()).logits
        assert torch.allclose(lens.bridge(tiny(family))(ids()), expected, atol=1e-5)


# ---- exported, for transformers without cratelm ---------------------------------------------------

LOAD = """
import sys
import torch
from transformers import AutoModel, AutoModelForCausalLM

for folder in sys.argv[1:]:
    trust = "modeling_" in " ".join(__import__("os").listdir(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
    expected = torch.load(folder + "/expected.pt")
    assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder
    text = model.generate(expected["ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(text, expected["text"]), folder
    AutoModel.from_pretrained(folder, trust_remote_code=trust)

"""


def test_exported_models_load_in_stock_transformers(tmp_path):
    from cratelm.interop.config import ExportModelConfig
    from cratelm.interop.export_model import export_model

    folders = []
    for family in FAMILIES:
        model = tiny(family)
        model.save_pretrained(tmp_path / "saved" / family)
        done = export_model(
            ExportModelConfig(path=tmp_path / "saved" / family, out=tmp_path / family)
        )
        code = {name for name in done.files if name.endswith(".py")}
        assert bool(code) == (family not in ("gpt2", "gpt2-relu", "gpt2-gelu"))
        text = model.generate(ids(), max_new_tokens=4, do_sample=False)
        expected = {"ids": ids(), "logits": model(ids()).logits.detach(), "text": text}
        torch.save(expected, tmp_path / family / "expected.pt")
        folders.append(str(tmp_path / family))
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    program = [sys.executable, "-c", "import sys; sys.modules['cratelm'] = None\n" + LOAD]
    done = subprocess.run(
        [*program, *folders], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


# ---- compiled -------------------------------------------------------------------------------------


@pytest.mark.slow  # 30 seconds for all of them
@torch.no_grad()
def test_compiled_models_keep_their_numbers_in_one_graph(model):
    """Traced as a whole, without code for this machine, which would need a compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model, backend="eager", fullgraph=True)
    found = compiled(input_ids=ids(), use_cache=False).last_hidden_state
    expected = model.base_model(input_ids=ids(), use_cache=False).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)
