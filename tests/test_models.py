"""Models against software not written here, against the plain recurrence, and against themselves."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shared import SHARED, needs_shared
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from cratelm.errors import InputError
from cratelm.interop.authors_checkpoint import load_authors_checkpoint
from cratelm.models import (
    CrateConfig,
    CrateForCausalLM,
    CrateModel,
    build,
    capture,
    count_parameters,
    load,
    site_of,
)
from cratelm.models.crate import CrateCache, Ista
from cratelm.models.sites import hooked

ORACLE = SHARED / "oracle"
RELATIVE = 1e-5
"""largest difference from the oracle, relative to its largest value"""


def tiny(family="crate", **overrides):
    fields = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, **overrides}
    return build(
        f"{family}-2l", vocab_size=101, max_position_embeddings=48, seed=1, **fields
    ).eval()


def ids(batch=2, length=24, seed=0):
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_a_site_can_be_captured_by_its_name():
    """And hooked: every function that takes a site takes its name."""
    model, seen = tiny(), []
    with hooked(model, "ista", lambda place, a: seen.append(place)):
        model(input_ids=ids())
    assert seen == [0, 1]
    by_name = capture(model, "ista", ids())
    assert len(by_name) == 2
    for a, b in zip(by_name, capture(model, site_of(model, "ista"), ids()), strict=True):
        assert torch.equal(a, b)


def close(found, expected):
    return (found - expected).abs().max() <= RELATIVE * expected.abs().max()


# ---- the oracle -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["crate", "gpt2"])
def oracle(request):
    """Family, model from the authors' file, expected tensors and figures."""
    if not SHARED.is_dir():
        pytest.skip(f"shared data not found at {SHARED}: set CRATELM_SHARED")
    model = load_authors_checkpoint(ORACLE / f"{request.param}-ckpt.pt")
    expected = load_file(ORACLE / f"{request.param}-expected.safetensors")
    figures = json.loads((ORACLE / f"{request.param}-expected.json").read_text())
    return request.param, model, expected, figures


@torch.no_grad()
def test_logits_and_losses(oracle):
    _, model, expected, figures = oracle
    logits = model(input_ids=expected["input_ids"]).logits
    assert close(logits, expected["logits"])
    loss = F.cross_entropy(logits.flatten(0, 1), expected["labels_next"].flatten())
    assert loss.item() == pytest.approx(figures["loss_first_two_rows"], rel=RELATIVE)
    tokens = np.fromfile(ORACLE / "val-tokens-uint16.bin", np.uint16).astype(np.int64)
    inputs = torch.from_numpy(tokens[:-1]).view(256, 64)
    targets = torch.from_numpy(tokens[1:]).view(256, 64)
    losses = [
        F.cross_entropy(model(input_ids=x).logits.flatten(0, 1), y.flatten(), reduction="sum")
        for x, y in zip(inputs.split(32), targets.split(32), strict=True)
    ]
    mean = sum(loss.item() for loss in losses) / targets.numel()
    assert mean == pytest.approx(figures["val_loss_first_16384_targets"], rel=RELATIVE)
    assert count_parameters(model) == figures["num_params_non_position"]


def test_neurons_and_attention(oracle):
    family, model, expected, _ = oracle
    sites = {"neuron": None, "attn_out": "transformer.h.*.attn.c_proj:input"}
    if family == "crate":
        sites = {"neuron": "ista", "subspace": "mssa", "attn_out": "heads"}
    for prefix, name in sites.items():
        found = capture(model, site_of(model, name), expected["input_ids"])
        assert len(found) == 2
        for layer, tensor in enumerate(found):
            assert close(tensor, expected[f"{prefix}.{layer}"]), (prefix, layer)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_continuation(oracle, use_cache):
    _, model, expected, _ = oracle
    given = expected["greedy_32"]
    found = model.generate(given[:, :8], max_new_tokens=24, do_sample=False, use_cache=use_cache)
    assert torch.equal(found, given)


@torch.no_grad()
def test_steering_by_a_hook(oracle):
    family, model, expected, figures = oracle
    if family != "crate":
        pytest.skip("the oracle steers CRATE alone")
    steer = figures["steer"]

    def see(layer, activations):
        if layer != steer["layer"]:
            return None
        activations = activations.clone()
        activations[..., steer["neuron"]] = steer["value"]
        return activations

    with hooked(model, site_of(model), see):
        logits = model(input_ids=expected["input_ids"]).logits[:, -1:]
    assert close(logits, expected["steered_next_logits"])
    assert not torch.allclose(logits, expected["logits"][:, -1:])


@needs_shared
def test_checkpoint_without_compile_prefix(tmp_path):
    checkpoint = torch.load(ORACLE / "crate-ckpt.pt", weights_only=True)
    plain = {k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
    torch.save({"model": plain, "model_args": checkpoint["model_args"]}, tmp_path / "ckpt.pt")
    first = load_authors_checkpoint(ORACLE / "crate-ckpt.pt").state_dict()
    second = load_authors_checkpoint(tmp_path / "ckpt.pt").state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


# ---- reading checkpoints safely -------------------------------------------------------------------


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def small_checkpoint(**changes):
    """An authors' checkpoint of a small CRATE, some entries replaced."""
    model = tiny()
    names = {
        "model.embed_tokens.": "transformer.wte.",
        "model.embed_positions.": "transformer.wpe.",
        "model.norm.": "transformer.ln_f.",
        "model.layers.": "transformer.h.",
        ".norm_mssa.": ".prenorm_1.",
        ".norm_ista.": ".prenorm_2.",
        ".mssa.projection.": ".attn.c_attn.",
        ".mssa.output.": ".attn.c_proj.",
        ".ista.dictionary": ".ista.weight",
    }
    weights = {}
    for key, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        weights[key] = tensor.clone()
    arguments = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48, "vocab_size": 101}
    return model, {"model": weights, "model_args": arguments, "best_val_loss": np.float32(3), **changes}  # fmt: skip


def test_checkpoint_round_trip_and_numpy_scalars(tmp_path):
    model, checkpoint = small_checkpoint()
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    found = load_authors_checkpoint(tmp_path / "ckpt.pt")
    with torch.no_grad():
        assert torch.equal(found(ids()).logits, model(ids()).logits)


def test_hostile_checkpoint_is_refused(tmp_path):
    marker = tmp_path / "was-run"
    _, checkpoint = small_checkpoint(config=Hostile(marker))
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=r"refused.*open"):
        load_authors_checkpoint(tmp_path / "ckpt.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(InputError, match="refused"):
        load_authors_checkpoint(tmp_path / "raw.pt")
    assert not marker.exists()


def test_damaged_checkpoints_say_what_is_wrong(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(InputError, match="is not a file"):
        load_authors_checkpoint(path)
    _, checkpoint = small_checkpoint()
    torch.save(checkpoint, path)
    (tmp_path / "short.pt").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="truncated"):
        load_authors_checkpoint(tmp_path / "short.pt")
    key = "transformer.h.1.ista.weight"
    for change, told in (
        ({"model": {k: v for k, v in checkpoint["model"].items() if k != key}}, "ista"),
        ({"model": {**checkpoint["model"], key: torch.zeros(3, 3)}}, r"shape \(3, 3\)"),
        ({"model": {**checkpoint["model"], "surplus": torch.zeros(1)}}, "surplus"),
        ({"model_args": {}}, "n_embd"),
        ({"model": None}, "no entry 'model'"),
    ):
        torch.save({**checkpoint, **change}, path)
        with pytest.raises(InputError, match=told):
            load_authors_checkpoint(path)


# ---- ISTA -----------------------------------------------------------------------------------------


def plain_recurrence(x, atoms, steps=2, eta=0.1, threshold=0.1):
    """The sparse code as the paper writes it: every step from A, with all its products."""
    code = x.new_zeros(*x.shape[:-1], len(atoms))
    for _ in range(steps):
        gradient = (x - code @ atoms) @ atoms.T
        code = F.relu(code + eta * gradient - eta * threshold)
    return code


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_ista_and_its_gradients_equal_the_plain_recurrence(steps):
    config = CrateConfig(hidden_size=12, num_attention_heads=2, ista_steps=steps)
    ista = Ista(config).double()
    torch.nn.init.uniform_(ista.dictionary, -0.7, 0.7, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 7, 12, dtype=torch.double, requires_grad=True)
    atoms = ista.dictionary.detach().clone().requires_grad_()
    expected = plain_recurrence(x, atoms, steps) @ atoms
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), (x, atoms))
    found = ista(x)
    got = torch.autograd.grad((found * weights).sum(), (x, ista.dictionary))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.count += 1
        return function(*arguments, **(keywords or {}))


def test_ista_takes_four_products():
    ista = Ista(CrateConfig(hidden_size=8, num_attention_heads=2))
    torch.nn.init.normal_(ista.dictionary)
    with torch.no_grad(), CountProducts() as counter:
        ista(torch.randn(6, 8))
    assert counter.count == 4


def test_switches_change_the_model_as_told():
    base = tiny()
    x = ids()
    with torch.no_grad():
        plain = base(x).logits
        residual = tiny(ista_residual=True)
        residual.load_state_dict(base.state_dict())
        assert not torch.allclose(residual(x).logits, plain)
        hidden = torch.randn(1, 3, 32)
        block, with_residual = base.model.layers[0], residual.model.layers[0]
        middle = hidden + block.mssa(block.norm_mssa(hidden))[0]
        torch.testing.assert_close(with_residual(hidden), block(hidden) + middle)

        decoupled = tiny(decoupled_dictionary=True)
        assert count_parameters(decoupled) == count_parameters(base) + 2 * 128 * 32
        for layer in decoupled.model.layers:
            assert torch.equal(layer.ista.decoder, layer.ista.dictionary)  # starts as a copy
            layer.ista.decoder.zero_()
        assert decoupled.model.layers[0](hidden).abs().max() == 0
        assert not torch.allclose(tiny(threshold=3.0)(x).logits, plain)
        assert capture(tiny(expansion=2), site_of(tiny(expansion=2)), x)[0].shape == (2, 24, 64)


# ---- sizes ----------------------------------------------------------------------------------------

PARAMETERS = {
    "crate-1l": 6_538_112,
    "crate-2l": 6_637_056,
    "crate-3l": 6_736_000,
    "crate-6l": 59_891_712,
    "crate-12l": 81_148_416,
    "gpt2-1l": 6_635_904,
    "gpt2-2l": 6_832_768,
    "gpt2-3l": 7_029_632,
    "gpt2-6l": 81_110_784,
    "gpt2-12l": 123_587_328,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_papers(name):
    with torch.device("meta"):
        model = build(name)
    assert count_parameters(model) == PARAMETERS[name]


def test_initial_weights():
    """N(0, 0.02); the attention output map N(0, 0.02 / sqrt(2L)); D uniform in +-sqrt(6/d)."""
    model = build("crate-2l", vocab_size=2000)
    block = model.model.layers[0]
    assert block.mssa.projection.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mssa.output.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert block.mssa.output.bias.abs().max() == 0
    bound = (6 / 128) ** 0.5
    assert block.ista.dictionary.abs().max() <= bound
    assert block.ista.dictionary.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert torch.equal(build("crate-2l", vocab_size=100).lm_head.weight, build("crate-2l", vocab_size=100).model.embed_tokens.weight)  # fmt: skip
    with_seed = build("crate-2l", vocab_size=100, seed=1).model.layers[0].ista.dictionary
    assert not torch.equal(with_seed, build("crate-2l", vocab_size=100).model.layers[0].ista.dictionary)  # fmt: skip


def test_build_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    tiny()
    assert torch.equal(torch.rand(1), wanted)


def test_twin_has_no_biases(tmp_path):
    model = tiny("gpt2")
    biases = {n: p for n, p in model.named_parameters() if n.endswith(".bias")}
    assert biases
    assert all(p.abs().max() == 0 and not p.requires_grad for p in biases.values())
    assert model.config.activation_function == "relu"
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert all(not p.requires_grad for n, p in again.named_parameters() if n.endswith(".bias"))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: build("crate-2"), "did you mean crate-2l"),
        (lambda: build("crate-2l", ista_step=3), "did you mean ista_steps"),
        (lambda: build("gpt2-2l", ista_steps=3), "GPT2Config has no field"),
        (lambda: build("crate-2l", num_attention_heads=5), "not a multiple"),
        (lambda: build("crate-2l", step_size=-1.0), "step_size"),
        (lambda: load("/nowhere/at/all"), "cratelm train"),
        (lambda: site_of(tiny(), "mlp"), "no site 'mlp'"),
        (
            lambda: site_of(tiny(), "model.layers.*.ista.code:sideways"),
            "one of input, output, residual",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(call, told):
    with pytest.raises(InputError, match=told) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- Hugging Face ---------------------------------------------------------------------------------


def test_cache_holds_half_the_bytes_and_keeps_the_tokens():
    crate, gpt2 = tiny(), tiny("gpt2")
    prompt = ids(2, 9)
    with torch.no_grad():
        ours = crate(prompt, use_cache=True).past_key_values
        theirs = gpt2(prompt, use_cache=True).past_key_values
    assert isinstance(ours, CrateCache)
    assert isinstance(theirs, DynamicCache)

    def held(cache):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values)}  # fmt: skip
        return sum(storages.values())

    assert 2 * held(ours) == held(theirs)
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        with_cache = crate.generate(prompt, max_new_tokens=20, use_cache=True, pad_token_id=0, **options)  # fmt: skip
        without = crate.generate(prompt, max_new_tokens=20, use_cache=False, pad_token_id=0, **options)  # fmt: skip
        assert torch.equal(with_cache, without)


@torch.no_grad()
def test_cache_in_pieces_gives_the_logits_of_the_whole():
    model, prompt = tiny(), ids(2, 20)
    whole = model(prompt).logits
    cache = CrateCache()
    parts = [
        model(prompt[:, a:b], past_key_values=cache, use_cache=True).logits
        for a, b in ((0, 7), (7, 8), (8, 20))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    cache.crop(-5)
    again = model(prompt[:, 15:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, whole[:, 15:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_left_padding_does_not_reach_the_text():
    model, prompt = tiny(), ids(1, 10)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], 1)
    mask = torch.tensor([[0] * 4 + [1] * 10])
    positions = torch.tensor([[0] * 4 + list(range(10))])
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(found, model(prompt).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_implementations_agree():
    model, x = tiny(), ids()
    expected = model(x).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-5)
    weights = model(x, output_attentions=True).attentions
    assert weights[0].shape == (2, 4, 24, 24)
    assert torch.triu(weights[0], 1).abs().max() == 0


def test_saved_and_loaded_is_the_same(tmp_path):
    model, x = tiny(ista_steps=3, threshold=0.2), ids()
    model.save_pretrained(tmp_path)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load(tmp_path)):
        assert isinstance(again, CrateForCausalLM)
        assert again.config.ista_steps == 3
        with torch.no_grad():
            assert torch.equal(again(x).logits, model(x).logits)


def test_gradient_checkpointing_keeps_the_gradients():
    model, x = tiny().train(), ids()
    model(x, labels=x).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].ista.code.register_forward_hook(lambda *_: calls.append(1))
    model(x, labels=x).loss.backward()
    assert len(calls) == 2  # once forward, once again on the way back
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_compiled_model_keeps_the_numbers():
    model, x = tiny(), ids()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    loss, other = model(x, labels=x).loss, compiled(x, labels=x).loss
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    other.backward()
    for ours, theirs in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["crate", "gpt2"])
@torch.no_grad()
def test_bf16_stays_near_fp32(family):
    """bf16 keeps 8 bits: logits stay within 2% of the largest logit, the loss within 1%."""
    model, x = tiny(family), ids(4, 40)
    # weights of the size that training gives, so that logits are not all near 0
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.abs().max() < 0.2:
            parameter.mul_(8)
    full = model(x, labels=x)
    half = copy.deepcopy(model).to(torch.bfloat16)(x, labels=x)
    assert half.logits.dtype == torch.bfloat16
    assert (half.logits.float() - full.logits).abs().max() <= 0.02 * full.logits.abs().max()
    assert abs(half.loss.item() - full.loss.item()) <= 0.01 * full.loss.item()


# ---- sites of other people's models ---------------------------------------------------------------


def neox():
    config = GPTNeoXConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


def llama():
    config = LlamaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_mlp_site_of_other_models():
    for model, layers, neurons in ((neox(), 2, 64), (llama(), 3, 80)):
        site = site_of(model)
        assert (site.name, site.n_layers, set(site.n_neurons)) == ("mlp", layers, {neurons})
    model = llama()
    found = capture(model, site_of(model), ids())
    by_path = capture(model, site_of(model, "model.layers.*.mlp.down_proj:input"), ids())
    assert all(torch.equal(a, b) for a, b in zip(found, by_path, strict=True))
    gate = capture(model, site_of(model, "model.layers.*.mlp.gate_proj"), ids())
    up = capture(model, site_of(model, "model.layers.*.mlp.up_proj"), ids())
    torch.testing.assert_close(found[1], F.silu(gate[1]) * up[1])


def test_hooks_are_removed_whatever_happens():
    model = tiny("gpt2")
    assert isinstance(model, GPT2LMHeadModel)
    site = site_of(model)
    with pytest.raises(RuntimeError, match="stop"), hooked(model, site, lambda layer, a: None):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_auto_classes_know_crate(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is CrateModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is CrateForCausalLM
