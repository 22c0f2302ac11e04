"""Sites in models of other families: the tensor that is read is the right one, under the right number."""

import re
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from families import DENSE, EXPERTS, INNER, LAYERS, VOCABULARY, WIDTH, deepseek, tiny
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

import cratelm
from cratelm.activations.open_harvest import open_harvested
from cratelm.activations.store import read_records
from cratelm.errors import InputError
from cratelm.models import capture, site_of
from cratelm.models.open import LoadedModel, sequence_length
from cratelm.models.partial_forward import PartialForward
from cratelm.models.sites import hooked, partial_note
from cratelm.runs import Run
from cratelm.runs.reading import read_json
from cratelm.steer.steering import Edit, steering

IDS = torch.randint(1, VOCABULARY - 8, (2, 24), generator=torch.Generator().manual_seed(1))
LAST_PROJECTION = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt-neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "gemma3": "model.language_model.layers.{}.mlp.down_proj",
    "phi": "model.layers.{}.mlp.fc2",
    "opt": "model.decoder.layers.{}.fc2",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h",
    "bloom": "transformer.h.{}.mlp.dense_4h_to_h",
    "mpt": "transformer.blocks.{}.ffn.down_proj",
}
"""of the MLP, by family; others have LLaMA's"""
WITHOUT_SDPA = ("gptj", "gemma2", "bloom", "mpt")
"""families for which transformers 5.23 has no such attention"""
ADDS_RESIDUAL = ("bloom", "mpt")
"""families whose MLP module adds the residual stream itself"""


def by_hand(model: Any, path: str) -> dict[str, torch.Tensor]:
    """Input and output of the projection, and output of the module that it is in, from plain PyTorch hooks."""
    seen: dict[str, torch.Tensor] = {}

    def of_projection(module, args, output):
        seen["input"] = args[0].clone().reshape(*IDS.shape, -1)  # OPT flattens it
        seen["output"] = output.clone().reshape(*IDS.shape, -1)

    def of_mlp(module, args, output):
        seen["mlp"] = output[0].clone() if isinstance(output, tuple) else output.clone()

    projection = model.get_submodule(path)
    handles = [
        projection.register_forward_hook(of_projection),
        model.get_submodule(path.rpartition(".")[0]).register_forward_hook(of_mlp),
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", DENSE)
def test_the_neurons_of_each_family_are_what_its_mlp_writes(family, attention, dtype):
    if attention == "sdpa" and family in WITHOUT_SDPA:
        pytest.skip(f"transformers has no sdpa for {family}")
    precision = getattr(torch, dtype)
    model = tiny(DENSE[family](), attn_implementation=attention).to(precision)
    site = site_of(model)
    assert site.name == "mlp"
    assert site.layer_numbers == tuple(range(LAYERS))
    assert partial_note(model, site) == ""
    captured = capture(model, site, IDS)
    for layer, activations in enumerate(captured):
        path = LAST_PROJECTION.get(family, "model.layers.{}.mlp.down_proj").format(layer)
        seen = by_hand(model, path)
        assert activations.shape == (*IDS.shape, site.n_neurons[layer])
        assert activations.shape[-1] in (INNER, 4 * WIDTH)
        assert activations.dtype == precision
        assert torch.equal(activations, seen["input"])
        projection = model.get_submodule(path)
        matrix = projection.weight.T if isinstance(projection, Conv1D) else projection.weight
        bias = getattr(projection, "bias", None)
        written = linear(
            activations.float(), matrix.float(), None if bias is None else bias.float()
        )
        tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6} if dtype == "float32" else {"rtol": 2e-2, "atol": 1e-3}  # fmt: skip
        torch.testing.assert_close(seen["output"].float(), written, **tolerance)
        if family not in ADDS_RESIDUAL and "mlp" in path:
            assert torch.equal(seen["mlp"], seen["output"])


@pytest.mark.parametrize("family", [*DENSE, "deepseek"])
def test_effects_of_each_family_are_those_of_an_edit_in_the_whole_model(family):
    """`effects` and `replace` run only the blocks after the neuron."""
    model = tiny(deepseek() if family == "deepseek" else DENSE[family]())
    name = "model.layers.*.mlp.shared_experts.down_proj:input" if family == "deepseek" else None
    site = site_of(model, name)
    partial = PartialForward(model, site)
    trace = partial.trace(IDS)
    generator = torch.Generator().manual_seed(2)
    rows, neurons = torch.tensor([0, 1]), torch.tensor([3, 5])
    for place in (0, site.n_layers - 1):
        delta = torch.randn(2, IDS.shape[1], generator=generator)

        def edit(
            at: int, activations: torch.Tensor, place=place, delta=delta
        ) -> torch.Tensor | None:
            if at != place:
                return None
            changed = activations.clone()
            changed[torch.arange(2), :, neurons] += delta
            return changed

        with torch.no_grad(), hooked(model, site, edit):
            whole = model(input_ids=IDS, use_cache=False).logits
        found = partial.edited(trace, place, rows, neurons, delta)
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(found, partial.plain(trace), atol=1e-4)


@pytest.mark.parametrize("family", DENSE)
def test_steering_at_a_position_changes_that_position(family):
    """In a pass with the head, of left-padded texts, and in a continuation."""
    model = tiny(DENSE[family]())
    site = site_of(model)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    seen: list[torch.Tensor] = []
    with (
        torch.no_grad(),
        steering(model, Edit(1, [4], set=9.0, positions="3"), site=site),
        hooked(model, site, lambda place, a: seen.append(a) if place == 1 else None),
    ):
        model(input_ids=IDS, attention_mask=mask, use_cache=False)
        model.generate(IDS[1:], max_new_tokens=2, do_sample=False)
    is_set = seen[0][..., 4] == 9.0
    assert is_set.nonzero().tolist() == [[0, 8], [1, 3]]  # 3 tokens after the padding
    assert len(seen) == 3
    for of_pass in seen[1:]:  # without a cache, as MPT, each pass reads the whole text
        at = [[0, 3]] if of_pass.shape[1] > 1 else []
        assert (of_pass[..., 4] == 9.0).nonzero().tolist() == at


@pytest.mark.parametrize("family", EXPERTS)
def test_fused_experts_are_an_error_that_says_what_can_be_read(family):
    model = tiny(EXPERTS[family]())
    for name in (None, "mlp"):
        with pytest.raises(InputError, match=r"holds all experts in one tensor.*'model\.layers\.\*\.mlp'") as error:  # fmt: skip
            site_of(model, name)
        assert "\n" not in str(error.value)
    if family != "gpt-oss":  # its experts return a tuple
        assert site_of(model, "model.layers.*.mlp").n_neurons == (WIDTH,) * LAYERS
    assert site_of(model, "model.layers.*").n_neurons == (WIDTH,) * LAYERS


def test_layers_without_the_site_are_named_by_their_true_numbers():
    """One dense layer, three of experts: neither takes the number of the other."""
    model = tiny(deepseek())
    dense = site_of(model, "mlp")
    assert dense.layer_numbers == (0,)
    assert partial_note(model, dense) == "site mlp is in 1 of 4 layers: 0"
    shared = site_of(model, "model.layers.*.mlp.shared_experts.down_proj:input")
    assert shared.layer_numbers == (1, 2, 3)
    assert "3 of 4 layers: 1 to 3" in partial_note(model, shared)
    one = site_of(model, "model.layers.2.mlp.shared_experts.down_proj:input")
    assert one.layer_numbers == (2,)
    captured = capture(model, shared, IDS)
    for layer, activations in zip(shared.layer_numbers, captured, strict=True):
        path = f"model.layers.{layer}.mlp.shared_experts.down_proj"
        assert torch.equal(activations, by_hand(model, path)["input"])
    assert torch.equal(capture(model, one, IDS)[0], captured[1])


def test_a_site_in_some_of_its_layers():
    model = tiny(deepseek())
    path = "model.layers.*.mlp.shared_experts.down_proj:input"
    some = site_of(model, path, (3, 1))
    assert some.layer_numbers == (1, 3)
    assert [re.findall(r"\d+", p)[0] for p in some.paths] == ["1", "3"]
    with pytest.raises(InputError, match=r"--layers names 0, but site .* has layers 1 to 3$"):
        site_of(model, path, (0,))


def test_an_edit_of_a_layer_changes_that_layer():
    """Layer 2 of layers 1 to 3, and not the third of them."""
    model = tiny(deepseek())
    site = site_of(model, "model.layers.*.mlp.shared_experts.down_proj:input")
    plain = capture(model, site, IDS)
    with steering(model, Edit(2, [5], set=7.0), site=site), torch.no_grad():
        seen = by_hand(model, "model.layers.2.mlp.shared_experts")["mlp"]
    written = model.get_submodule("model.layers.2.mlp.shared_experts.down_proj").weight
    change = torch.zeros_like(plain[1])
    change[..., 5] = 7.0 - plain[1][..., 5]
    before = by_hand(model, "model.layers.2.mlp.shared_experts")["mlp"]
    torch.testing.assert_close(seen - before, linear(change, written), rtol=1e-3, atol=1e-5)
    with (
        pytest.raises(InputError, match=r"layer 0 does not exist: site .* has the layers 1 to 3"),
        steering(model, Edit(0, [5], set=7.0), site=site),
    ):
        pass


@pytest.mark.parametrize("family", DENSE)
def test_the_default_sequence_is_bounded(family):
    config = DENSE[family]()
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if hasattr(text, name):
            setattr(text, name, 131_072)
    with torch.device("meta"):
        model = tiny_meta(config)
    assert sequence_length(LoadedModel(family, "", model), None) in (1024, 2048)


def tiny_meta(config: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_config(config)


# ---- harvests -----------------------------------------------------------------------------------------

FEW: dict[str, Any] = {"tokens": 600, "polarity": "positive", "pilot_tokens": 64, "top": 4, "random": 4, "per_bin": 2, "context": 4, "sequence_length": 32}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Tokens of a small corpus, with a vocabulary that all the tiny models have."""
    folder = tmp_path_factory.mktemp("families")
    generator = np.random.default_rng(0)
    words = ["cat", "dog", "sits", "runs", "on", "the", "mat", "hill", "and", "then"]
    texts = [" ".join(generator.choice(words, 60)) + "." for _ in range(60)]
    for number, text in enumerate(texts):
        (folder / "corpus").mkdir(exist_ok=True)
        (folder / "corpus" / f"{number}.txt").write_text(text)
    cratelm.api.tokenize(
        run=folder / "run", corpus=str(folder / "corpus"), vocab_size=VOCABULARY - 8, fit=0.3,
        held_out=0.3, sequence_length=16, quiet=True,
    )  # fmt: skip
    return folder / "run"


def harvested(run, folder, model, **options):
    model.save_pretrained(folder)
    return cratelm.api.harvest(run=run, model=str(folder), quiet=True, **(FEW | options))


def test_a_composite_model_is_harvested(run, tmp_path):
    """Gemma 3 with images: its text settings lie in `text_config`."""
    result = harvested(run, tmp_path / "composite", tiny(DENSE["gemma3"]()))
    assert result.neurons == (INNER,) * LAYERS
    assert open_harvested(Run(run), "composite").subject.longest == 64


def test_a_harvest_of_some_layers_has_their_numbers_everywhere(run, tmp_path, capsys):
    """From the harvest to explanations, scores, effects, analysis and a steered text."""
    folder = tmp_path / "experts"
    site = "model.layers.*.mlp.shared_experts.down_proj:input"
    model = tiny(deepseek())
    harvested(run, folder, model, site=site)
    assert "3 of 4 layers: 1 to 3" in capsys.readouterr().err
    stage = run / "activations" / "experts"
    assert read_json(stage / "sites.json")["layers"] == [1, 2, 3]
    records = list(read_records(stage, "fit", [2]))
    assert {r.neuron.layer for r in records} == {2}
    captured = capture(model, site_of(model, site), _first_sequence(run))
    opened = open_harvested(Run(run), "experts")
    assert opened.site.layer_numbers == (1, 2, 3)
    assert torch.equal(capture(opened.subject.model, opened.site, _first_sequence(run))[2], captured[2])  # fmt: skip
    common = {"run": run, "model": "experts", "quiet": True}
    cratelm.api.explain(**common, neurons=2, explainers=("lookup",))
    cratelm.api.score(**common)
    cratelm.api.effects(**common, only=("3:4",), tokens=64, positions=2)
    cratelm.api.analyze(**common, tokens=200)
    cratelm.api.replace(**common, explainers=("lookup",), fit_tokens=200, tokens=100, neuron_tokens=0, curve_tokens=0)  # fmt: skip
    files = [
        run / "explanations" / "experts" / "explanations.parquet",
        run / "scores" / "experts" / "scores.parquet",
        run / "analysis" / "experts" / "layers.parquet",
    ]
    for file in files:
        assert set(pq.read_table(file, columns=["layer"])["layer"].to_pylist()) == {1, 2, 3}, file
    steered = cratelm.api.steer(
        run=run, path=str(folder), site=site, neurons=("3:4",), set=5.0, text="the cat", generate=2
    )
    assert steered.site == site


def test_layers_by_number(run, tmp_path):
    """`--layers` names the model's layers, and no other ones are harvested."""
    model = tiny(DENSE["llama"]())
    result = harvested(run, tmp_path / "one", model, layers=(1,))
    assert result.neurons == (INNER,)
    stage = run / "activations" / "one"
    assert read_json(stage / "sites.json")["layers"] == [1]
    opened = open_harvested(Run(run), "one")
    assert (opened.site.layer_numbers, opened.site.paths) == ((1,), ("model.layers.1.mlp.down_proj",))  # fmt: skip
    with pytest.raises(InputError, match=r"--layers names 7, but site mlp has layers 0 to 1"):
        harvested(run, tmp_path / "two", model, layers=(7,))


def test_a_harvest_of_version_0_1_0_keeps_its_numbers(run, tmp_path):
    """There the layers 1 to 3 were called 0 to 2: what was explained under these names is opened under them."""
    from tiny_run import reseal

    site = "model.layers.*.mlp.shared_experts.down_proj:input"
    harvested(run, tmp_path / "old", tiny(deepseek()), site=site)
    stage = run / "activations" / "old"
    text = (stage / "sites.json").read_text()
    (stage / "sites.json").write_text(re.sub(r"\[\s*1,\s*2,\s*3\s*\]", "[0, 1, 2]", text))
    reseal(stage)
    opened = open_harvested(Run(run), "old")
    assert opened.site.layer_numbers == (0, 1, 2)
    assert opened.site.paths[0].startswith("model.layers.1.")


def test_the_number_of_tokens_is_right_to_within_a_sequence(run, tmp_path):
    model = tiny(DENSE["llama"]())
    for tokens, length in ((300, 32), (301, 20)):
        result = harvested(
            run, tmp_path / f"n{tokens}", model, tokens=tokens, sequence_length=length, skip_first=0
        )
        assert tokens - 2 * length < result.tokens["fit"] <= tokens


def _first_sequence(run):
    from cratelm.tokens.shards import TokenStore

    return torch.from_numpy(TokenStore(run / "tokens").split("fit").read(0, 24).astype(np.int64))[None]  # fmt: skip
