"""Steering against the oracle, against plain hooks, and with the cache against without it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import SHARED, needs_shared
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

import cratelm
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.interop.authors_checkpoint import load_authors_checkpoint
from cratelm.models import build, capture, site_of
from cratelm.models.sites import hooked
from cratelm.runs import Run
from cratelm.steer import Edit, Positions
from cratelm.steer.config import EffectsConfig, SteerConfig
from cratelm.steer.next_tokens import compare_next_tokens
from cratelm.steer.steer import steer
from cratelm.steer.steering import chosen, steering

ORACLE = SHARED / "oracle"
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
KINDS = ["crate", "gpt2", "neox", "llama"]


def model_of(kind: str):
    """A small model whose greedy continuations are varied."""
    torch.manual_seed(3)
    if kind == "neox":
        config = GPTNeoXConfig(vocab_size=101, max_position_embeddings=48, intermediate_size=64, **SMALL)  # fmt: skip
        model = GPTNeoXForCausalLM(config)
    elif kind == "llama":
        config = LlamaConfig(vocab_size=101, max_position_embeddings=48, intermediate_size=80, **SMALL)  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        model = build(f"{kind}-2l", vocab_size=101, max_position_embeddings=48, seed=1, **SMALL)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "dictionary" not in name:
            parameter.data.mul_(12)
    return model.eval()


def ids(batch=2, length=10, seed=0):
    return torch.randint(1, 101, (batch, length), generator=torch.Generator().manual_seed(seed))


def hooks_of(model):
    return [
        hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]  # fmt: skip


def logits(model, x, **fields):
    with torch.no_grad():
        return model(x, **fields).logits


# ---- what is edited -------------------------------------------------------------------------------


@needs_shared
def test_the_oracles_steered_logits():
    model = load_authors_checkpoint(ORACLE / "crate-ckpt.pt").eval()
    expected = load_file(ORACLE / "crate-expected.safetensors")
    told = json.loads((ORACLE / "crate-expected.json").read_text())["steer"]
    edit = Edit(layer=told["layer"], neurons=told["neuron"], set=told["value"])
    with cratelm.steering(model, edit):
        found = logits(model, expected["input_ids"])[:, -1:]
    wanted = expected["steered_next_logits"]
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not torch.allclose(found, expected["logits"][:, -1:], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_each_operation_on_several_layers_and_neurons(kind):
    model, x = model_of(kind), ids()
    site = site_of(model)
    plain = capture(model, site, x)
    edits = (
        Edit(0, (3, 5), set=1.5),
        Edit(0, 7, add=0.25, positions=[0, 4]),
        Edit(1, (2, 9), scale=-2, positions="-3:"),
        Edit(1, 11, zero=True),
        Edit(1, 11, add=1.0, positions="last"),
    )
    with steering(model, *edits):
        seen: list[torch.Tensor] = []
        with hooked(model, site, lambda place, a: seen.append(a)):
            logits(model, x)
    first = plain[0].clone()
    first[..., [3, 5]] = 1.5
    first[:, [0, 4], 7] += 0.25
    torch.testing.assert_close(seen[0], first, rtol=0, atol=0)

    def second(place, a):
        if place == 0:
            return first
        a = a.clone()
        a[:, -3:, [2, 9]] *= -2
        a[..., 11] = 0
        a[:, -1, 11] += 1
        return a

    with hooked(model, site, second):
        wanted = logits(model, x)
    with steering(model, *edits):
        torch.testing.assert_close(logits(model, x), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mssa", "heads", "ista", "model.layers.*.norm_ista"])
def test_other_sites(name):
    model, x = model_of("crate"), ids()
    with steering(model, Edit(1, 4, set=2.0), site=name):
        found = capture(model, site_of(model, name), x)
    assert (found[1][..., 4] == 2).all()
    assert (found[1][..., 5] != 2).all()
    plain = logits(model, x)
    with steering(model, Edit(1, 4, set=20.0), site=name):
        assert not torch.allclose(logits(model, x), plain, atol=1e-3)


class Rotation:
    """An autoencoder whose latents are the activations in another basis."""

    def __init__(self, size: int, seed: int):
        noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
        self.basis = torch.linalg.qr(noise)[0]  # [S, H]

    def encode(self, x):
        return x @ self.basis.T

    def decode(self, latents):
        return latents @ self.basis


def test_latents_of_one_layer():
    """Only their decoded change is added; the layer goes by its number in the model."""
    model, x = model_of("gpt2"), ids()
    below = site_of(model)
    rotation = Rotation(128, 0)
    site = replace(below, name="latents", paths=below.paths[1:], n_neurons=(128,), layers=(1,), autoencoders=(rotation,))  # fmt: skip
    plain = capture(model, below, x)[1]
    with steering(model, Edit(1, 5, set=3.0, positions="4:"), site=site):
        found = capture(model, below, x)[1]
    wanted = plain.clone()
    wanted[:, 4:] += (3.0 - plain @ rotation.basis[5])[:, 4:, None] * rotation.basis[5]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"has the layers 1$"), steering(model, Edit(0, 5, set=3.0), site=site):  # fmt: skip
        pass


def test_gradients_flow_through():
    model, x = model_of("crate").train(), ids()
    model.gradient_checkpointing_enable()
    with steering(model, Edit(0, 3, scale=2.0), Edit(1, 5, set=1.0, positions="1:")):
        model(x, labels=x).loss.backward()
    first = model.model.layers[0].ista.dictionary.grad
    assert first.abs().sum(1).min() > 0
    model.zero_grad()
    with steering(model, Edit(1, range(128), zero=True)):
        model(x, labels=x).loss.backward()
    assert model.model.layers[0].ista.dictionary.grad.abs().max() == 0  # nothing passes layer 1


# ---- contexts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before_whatever_happens(error):
    model, x = model_of("gpt2"), ids()
    plain, generate = logits(model, x), model.generate

    def inside():
        with steering(model, Edit(0, 1, set=9.0, positions="2:")):
            assert hooks_of(model)
            assert not torch.equal(logits(model, x), plain)
            raise error

    with pytest.raises(error):
        inside()
    assert not hooks_of(model)
    assert "generate" not in model.__dict__
    assert model.generate == generate
    assert torch.equal(logits(model, x), plain)


def test_contexts_nest():
    model, x = model_of("crate"), ids()
    plain = logits(model, x)
    outer, inner = Edit(0, 1, set=3.0, positions=":-2"), Edit(1, 2, set=5.0, positions="-2:")
    options = {"max_new_tokens": 6, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    with steering(model, outer, inner):
        both = logits(model, x)
        generated = model.generate(x, max_new_tokens=6, pad_token_id=0)
    with steering(model, outer):
        one = logits(model, x)
        with steering(model, inner):
            torch.testing.assert_close(logits(model, x), both)
            assert torch.equal(model.generate(x, max_new_tokens=6, pad_token_id=0), generated)
        assert torch.equal(logits(model, x), one)
        # the outer one still knows the prompt, which the inner one's wrapper of `generate` passed on
        cached = model.generate(x, use_cache=True, **options).logits
        whole = model.generate(x, use_cache=False, **options).logits
        for a, b in zip(cached, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
    assert torch.equal(logits(model, x), plain)
    assert not hooks_of(model)
    assert "generate" not in model.__dict__


def test_the_package_is_the_context_manager_and_the_verb():
    model, x = model_of("crate"), ids()
    plain = logits(model, x)
    with cratelm.steering(model, Edit(layer=1, neurons=[3], set=10.0), site="ista"):
        assert not torch.equal(logits(model, x), plain)
    with pytest.raises(InputError, match="LAYER:INDEX"):
        cratelm.api.steer(neurons=("one",), set=1.0)


# ---- positions ------------------------------------------------------------------------------------


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    position = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
    prompt = torch.tensor([[2], [4]])  # so that one token of each is generated

    def where(given):
        return chosen(Positions.of(given), position, prompt).int().tolist()

    assert where("all") == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert where(1) == [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]]
    assert where([0, -1]) == [[0, 0, 1, 1, 0], [1, 0, 0, 1, 0]]
    assert where("0,-1") == where((0, -1))
    assert where("last") == [[0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]
    assert where("generated") == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert where("2:") == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]
    assert where("-3:-1") == [[0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert where(":1") == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert where(-3) == [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]


POSITIONS = ["all", "3:", "-2:", "last", "generated", [0, 11, 13], "12:14", ":-3"]


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_the_cache_as_without(kind, positions):
    """In left-padded batches; the edits change what is generated."""
    model = model_of(kind)
    x, mask = ids(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[1, :4] = 0
    site = site_of(model)
    strong = 3 * max(float(a.abs().max()) for a in capture(model, site, x))
    edits = [
        Edit(0, (3, 4, 5), set=strong, positions=positions),
        Edit(1, range(12), set=strong, positions=positions),
    ]
    options = {
        "attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "do_sample": False,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    plain = model.generate(x, **options)
    with steering(model, *edits):
        cached = model.generate(x, use_cache=True, **options)
        whole = model.generate(x, use_cache=False, **options)
    assert torch.equal(cached.sequences, whole.sequences)
    pairs = zip(cached.logits, whole.logits, strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    differ = [
        not torch.allclose(a, b, atol=1e-2)
        for a, b in zip(plain.logits, cached.logits, strict=True)
    ]
    # of "generated" the first is read by the second pass, of 12:14 the third or, unpadded, later
    assert any(differ)
    assert differ[0] == (positions not in ("generated", "12:14"))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_move_positions(kind):
    model = model_of(kind)
    text = ids(1, 7)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), text], 1)
    mask = (torch.arange(12) >= 5)[None].long()
    edit = Edit(0, (1, 2), set=4.0, positions=[1, -1, 8])
    options = {"max_new_tokens": 5, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    with steering(model, edit):
        alone = model.generate(text, attention_mask=torch.ones_like(text), **options)
        beside = model.generate(padded, attention_mask=mask, **options)
    for a, b in zip(alone.logits, beside.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_a_cache_used_by_hand():
    """Outside of `generate` negative positions count from the end of what was read."""
    model, x = model_of("gpt2"), ids(2, 9)
    edit = Edit(1, (3, 4), set=5.0, positions="6:")
    with steering(model, edit):
        whole = logits(model, x)
        first = model(x[:, :5], use_cache=True)
        second = logits(model, x[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second, whole[:, 5:], rtol=1e-4, atol=1e-4)
    with steering(model, Edit(1, (3, 4), set=5.0, positions="-1")):
        by_end = logits(model, x)
    with steering(model, Edit(1, (3, 4), set=5.0, positions=8)):
        assert torch.equal(logits(model, x), by_end)


def test_beams_and_other_ways_to_call_generate():
    model, x = model_of("llama"), ids(2, 6)
    edit = Edit(0, (3, 4), set=2.0, positions="-2:")
    beams = {"num_beams": 3, "max_new_tokens": 5, "pad_token_id": 0}
    with steering(model, edit):
        cached = model.generate(x, use_cache=True, **beams)
        assert torch.equal(cached, model.generate(inputs=x, use_cache=False, **beams))
        embedded = model.get_input_embeddings()(x)
        again = model.generate(inputs_embeds=embedded, **beams)
    assert torch.equal(again, cached[:, 6:])


def test_a_static_cache_steers_everywhere_or_says_why_not():
    model, x = model_of("llama"), ids(2, 6)
    options = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}

    def static():
        return StaticCache(config=model.config, max_cache_len=16)

    with steering(model, Edit(0, (3, 4), set=2.0)):
        wanted = model.generate(x, **options)
        assert torch.equal(model.generate(x, past_key_values=static(), **options), wanted)


# ---- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda m: steering(m, Edit(2, 0, set=1.0)),
            "layer 2 does not exist: site ista has the layers 0 to 1",
        ),
        (lambda m: steering(m, Edit(0, 128, set=1.0)), "neuron 128 .* neurons 0 to 127"),
        (lambda m: steering(m, Edit(0, -1, set=1.0)), "neuron -1"),
        (lambda m: steering(m, Edit(0, (4, 4), add=1.0)), "twice"),
        (lambda m: steering(m, Edit(0, 0, set=1.0), site="mlp"), "no site 'mlp'"),
        (lambda m: Edit(0, 0), "no operation on the neurons is given"),
        (lambda m: Edit(0, 0, set=1.0, zero=True), "set and zero"),
        (lambda m: Edit(0, (), set=1.0), "no neuron"),
        (lambda m: Edit(0, 0, scale=float("nan")), "finite"),
        (lambda m: Edit(0, 0, set=1.0, positions="first"), "positions 'first'"),
        (lambda m: Edit(0, 0, set=1.0, positions=[]), r"positions \[\]"),
        (lambda m: Edit(0, 0, set=1.0, positions=1.5), "positions 1.5"),
        (lambda m: SteerConfig(neurons=("1:2",)), "no operation on the neurons is given"),
        (lambda m: SteerConfig(neurons=("1:2",), set=1, add=2), "--set and --add"),
        (lambda m: SteerConfig(neurons=("1.2",), set=1), "--neurons 1.2"),
        (lambda m: SteerConfig(neurons=(), set=1), "names no neuron"),
        (lambda m: SteerConfig(neurons=("1:2",), set=1, top=0), "--top must be at least 1, not 0"),
        (lambda m: SteerConfig(neurons=("1:2",), set=1, temperature=float("nan")), "--temperature"),
        (lambda m: EffectsConfig(only=("x",)), "--only x"),
        (lambda m: EffectsConfig(sequence_length=1), "--sequence-length must be at least 2, not 1"),
    ],
)
def test_mistakes_are_told_in_one_line(call, told):
    model = model_of("crate")
    with pytest.raises(InputError, match=told) as caught:  # noqa: PT012
        with_ = call(model)
        if hasattr(with_, "__enter__"):
            with_.__enter__()
    assert "\n" not in str(caught.value)
    assert not hooks_of(model)


def test_a_mask_that_does_not_tell_padding_is_refused():
    model, x = model_of("gpt2"), ids(2, 6)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    with (
        steering(model, Edit(0, 1, set=1.0, positions="2:")),
        pytest.raises(InputError, match=r"\(2, 1, 6, 6\), but \(2, 6\) is needed"),
    ):
        logits(model, x, attention_mask=mask)


# ---- the verb -------------------------------------------------------------------------------------


def small_run(path: Path) -> Run:
    """A run with tokens, and two small models that were trained a little."""
    corpus = path.parent / "corpus"
    corpus.mkdir(parents=True)
    for n in range(60):
        words = " ".join(f"word{(n * k) % 17} = {k}" for k in range(60))
        (corpus / f"{n}.txt").write_text(words + "\n")
    cratelm.api.tokenize(
        run=path, corpus=str(corpus), vocab_size=300, fit=0.3, held_out=0.3, sequence_length=64,
        quiet=True,
    )  # fmt: skip
    overrides = ("hidden_size=32", "num_attention_heads=4")
    for name in ("crate-2l", "gpt2-2l"):
        cratelm.api.train(
            run=path, model=name, steps=20, sequence_length=64, batch_size=4, learning_rate=0.01,
            model_overrides=overrides, device="cpu", tensorboard=False, quiet=True,
        )  # fmt: skip
    return Run(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return small_run(tmp_path_factory.mktemp("steer") / "run")


def test_the_verb_shows_what_changes(run, tmp_path):
    fields = {"run": run.path, "neurons": ("1:32", "0:7"), "text": "word3 = ", "generate": 6}
    result = steer(SteerConfig(set=30.0, output=tmp_path / "out.json", **fields))
    found = result.next_token
    assert 0 < found.total_variation <= 1
    assert found.kl > 0
    assert all(c.difference > 0 for c in found.gains)
    assert all(c.difference < 0 for c in found.losses)
    assert [c.difference for c in found.gains] == sorted((c.difference for c in found.gains), reverse=True)  # fmt: skip
    assert result.continuation != result.steered_continuation
    told = str(result)
    assert "neurons 1:32 0:7 set 30 at positions all" in told
    assert "word3␣=␣" in told
    assert json.loads((tmp_path / "out.json").read_text())["next_token"]["kl"] == found.kl
    nothing = steer(SteerConfig(scale=1.0, **fields))
    assert nothing.next_token.total_variation == 0
    assert nothing.next_token.gains == ()
    assert nothing.continuation == nothing.steered_continuation == result.continuation


def test_what_is_compared():
    before = torch.tensor([0.5, 0.25, 0.25], dtype=torch.double).log()
    after = torch.tensor([0.25, 0.5, 0.25], dtype=torch.double).log()
    found = compare_next_tokens(before, after, ["a", "b", "c"], 2)
    assert [c.token for c in found.gains] == ["b"]
    assert [c.token for c in found.losses] == ["a"]
    assert found.total_variation == pytest.approx(0.25)
    assert found.kl == pytest.approx(0.25 * torch.tensor(2.0).log().item())
    assert found.gains[0].log_ratio == pytest.approx(0.6931, abs=1e-4)


def test_the_verbs_text_and_seed(run, tmp_path):
    (tmp_path / "text").write_text("word1 = 4\nword2")
    fields = {
        "run": run.path,
        "model": "gpt2-2l",
        "neurons": ("0:3",),
        "add": 5.0,
        "temperature": 1.0,
        "generate": 8,
    }
    from_file = steer(SteerConfig(text_file=tmp_path / "text", **fields))
    assert "word1␣=␣4⏎word2" in str(from_file)
    held_out = steer(SteerConfig(**fields))
    again = steer(SteerConfig(**fields))
    assert held_out == again
    assert held_out.text.startswith("word0")
    other = steer(SteerConfig(path=str(run.path / "model" / "gpt2-2l"), text="word3", **fields))
    assert other.model.endswith("gpt2-2l")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--neurons", "0:9999", "--set", "1"], "neuron 9999 of layer 0"),
        (["--neurons", "5:1", "--set", "1"], "layer 5"),
        (["--neurons", "0:1"], "no operation on the neurons is given"),
        (["--neurons", "0:1", "--zero", "--positions", "60"], "no token is at these positions"),
        (["--neurons", "0:1", "--zero", "--positions", "generated", "--generate", "0"], "no token is at these positions"),
        (["--neurons", "0:1", "--zero", "--text-file", "/nowhere"], "cannot be read"),
        (["--neurons", "0:1", "--zero", "--text", "x " * 90], "exceeds the 64"),
        (["--neurons", "0:1", "--zero", "--site", "mlp"], "no site 'mlp'"),
        (["--neurons", "0:1", "--zero", "--sae", "none"], "is neither a folder nor finished in the run"),
        (["--neurons", "0:1", "--zero", "--model", "nobody"], "cratelm train"),
    ],
)  # fmt: skip
def test_mistakes_of_the_verb(run, capsys, arguments, told):
    text = [] if any(a.startswith("--text") for a in arguments) else ["--text", "word3 = 4"]
    assert main(["steer", "--run", str(run.path), *text, *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_negative_positions_on_the_command_line(run, capsys):
    shared = [
        "steer",
        "--run",
        str(run.path),
        "--neurons",
        "1:3",
        "--set",
        "9",
        "--text",
        "word3 = 4",
    ]
    assert main([*shared, "--positions=-1"]) == 0
    by_end = capsys.readouterr().out
    assert main([*shared, "--positions", "last"]) == 0
    assert capsys.readouterr().out.replace("positions last", "positions -1") == by_end
