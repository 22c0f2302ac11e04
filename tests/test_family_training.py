"""Training of every family: same tokens, exact resume, frozen parts, penalties and annealed weight sparsity."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import SMALL, T, make_run, one_thread  # noqa: F401 (a fixture)

from cratelm.errors import InputError
from cratelm.models import FAMILIES, build, capture, load, site_of
from cratelm.models.nulls import null_control
from cratelm.models.parts import freeze, parts_of
from cratelm.tokens.shards import TokenStore
from cratelm.train import checkpoints
from cratelm.train.config import LAPTOP, PAPER, TrainConfig
from cratelm.train.data import BatchSampler
from cratelm.train.log import read_metrics
from cratelm.train.loop import checkpoint_blocks, train
from cratelm.train.losses import NextTokenLoss
from cratelm.train.optimizers import block_matrices, make_optimizers
from cratelm.train.weight_sparsity import WeightSparsity, gradient_limit

FIRST = {"crate-mssa": None, "crate-mlp": "mlp"}
"""the part that writes the code, of families whose name does not tell it"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("families"))


class Stopped(Exception):
    pass


def options(name: str, **fields: Any) -> dict[str, Any]:
    return {**SMALL, "steps": 8, "precision": "fp32", "name": name, **fields}


def tiny(family: str) -> Any:
    return build(f"{family}-2l", vocab_size=64, hidden_size=32, num_attention_heads=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_that_was_stopped_ends_with_the_same_bits(
    run: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    micro_batches, save = BatchSampler.micro_batches, checkpoints.save

    def spy(sampler: BatchSampler, step: int, device: torch.device) -> Any:
        for tokens, targets in micro_batches(sampler, step, device):
            seen.setdefault(name, []).append(tokens)
            yield tokens, targets

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        if arguments[-1] == 4 and name.startswith("stopped"):
            raise Stopped

    monkeypatch.setattr(BatchSampler, "micro_batches", spy)
    monkeypatch.setattr(checkpoints, "save", save_and_stop)
    name = f"whole-{family}"
    whole = train(TrainConfig(run=run, model=f"{family}-1l", **options(name)))
    name = f"stopped-{family}"
    with contextlib.suppress(Stopped):
        train(TrainConfig(run=run, model=f"{family}-1l", **options(name)))
    monkeypatch.setattr(checkpoints, "save", save)
    resumed = train(TrainConfig(run=run, model=f"{family}-1l", **options(name)))
    first, second = (load_file(r.path / "model.safetensors") for r in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert resumed.validation_loss < 5.7  # log V, for random guessing
    assert len(seen[f"stopped-{family}"]) == 8
    assert torch.equal(*(torch.stack(tokens) for tokens in seen.values()))
    _TOKENS.setdefault("all", torch.stack(seen[name]))
    assert torch.equal(_TOKENS["all"], torch.stack(seen[name])), "other tokens than other families"
    assert type(load(resumed.path)) is type(tiny(family))


_TOKENS: dict[str, torch.Tensor] = {}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_parts_that_can_be_frozen(family: str) -> None:
    model = tiny(family)
    first = FIRST.get(family, "dictionary" if family.startswith("crate") else "mlp")
    parts = parts_of(model)
    assert parts.keys() == {"attention", "embeddings"} | ({first} if first else set())
    assert all(len(weights) >= 2 for weights in parts.values())
    if first:
        freeze(model, [first])
        neurons, width = 4 * 32, 32
        assert {tuple(sorted(p.shape)) for p in parts[first]} == {(width, neurons)}
        assert not any(p.requires_grad for p in parts[first])
    else:
        with pytest.raises(InputError, match="lacks: choose from attention, embeddings"):
            freeze(model, ["dictionary"])


@pytest.mark.parametrize("family", FAMILIES)
def test_null_controls_keep_the_embeddings_and_nothing_else(family: str) -> None:
    fresh, trained = tiny(family), tiny(family)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += torch.randn_like(parameter)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    control = null_control(trained, "embeddings", seed=0)
    kept = {id(p) for p in parts_of(control)["embeddings"]}
    assert kept
    for name, parameter in control.named_parameters():
        source = before[name] if id(parameter) in kept else fresh.get_parameter(name)
        assert torch.equal(parameter, source), name
    permuted = null_control(trained, "permuted", seed=0)
    for name, parameter in permuted.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, before[name].flatten().sort().values)
        in_block = ".layers." in name or ".h." in name
        assert not in_block or parameter.numel() < 9 or not torch.equal(parameter, before[name])


def test_numbers_per_head_are_neither_matrices_nor_decayed() -> None:
    model = tiny("crate-tssa")
    muon, adamw = make_optimizers(model, "muon", 0.1)
    names = {id(p): n.rpartition(".")[2] for n, p in model.named_parameters()}
    assert {names[id(p)] for p in block_matrices(model)} == {"weight", "dictionary"}
    assert all(p.shape[1] > 1 for g in muon.param_groups for p in g["params"])
    plain = {names[id(p)] for p in adamw.param_groups[1]["params"]}
    assert plain == {"weight", "bias", "temperature", "denominator_bias"}
    assert adamw.param_groups[1]["weight_decay"] == 0


# ---- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_models_own_logits(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokens = torch.randint(64, (2, 9))
    logits = model(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    found = NextTokenLoss(model)(tokens[:, :-1], tokens[:, 1:])
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["crate", "crate-mssa", "gpt2", "gpt2-solu", "sparse-gpt"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_penalty_is_on_the_neurons_and_in_training_only(
    family: str, checkpointed: bool
) -> None:
    model = tiny(family)
    if checkpointed:
        checkpoint_blocks(model)
    tokens = torch.randint(64, (2, 8))
    plain, loss = NextTokenLoss(model), NextTokenLoss(model, l1=0.5)
    expected = (
        sum(codes.abs().sum(-1).mean() for codes in capture(model, site_of(model), tokens)) / 2
    )
    for _ in range(2):  # nothing is left of the first pass
        found = loss.train()(tokens, tokens)
        found.backward()
        assert torch.allclose(found, plain(tokens, tokens) + 0.5 * expected, atol=1e-5)
    assert torch.equal(loss.eval()(tokens, tokens), plain(tokens, tokens))
    weight = parts_of(model)["attention"][0]
    (with_penalty,) = torch.autograd.grad(loss.train()(tokens, tokens), weight)
    (without,) = torch.autograd.grad(plain(tokens, tokens), weight)
    assert not torch.allclose(with_penalty, without)


def test_a_penalty_makes_neurons_smaller_and_stays_out_of_the_validation_loss(run: Path) -> None:
    results = {
        l1: train(
            TrainConfig(
                run=run,
                model="gpt2-1l",
                **options(f"l1-{l1}", l1=l1, steps=40, optimizer="adamw", learning_rate=1e-2),
            )
        )
        for l1 in (0.0, 0.5)
    }
    split = TokenStore(run / "tokens").split("held_out")
    tokens = torch.tensor(split.sequence(0, T)[None, :T]).long()
    sizes = [capture(load(r.path), "mlp", tokens)[0].abs().mean() for r in results.values()]
    assert sizes[1] < 0.5 * sizes[0]
    penalised = results[0.5]
    assert abs(penalised.validation_loss - results[0.0].validation_loss) < 1
    assert penalised.loss is not None
    assert "l1" not in TrainConfig(model="gpt2-1l").identity()
    assert TrainConfig(model="gpt2-1l", l1=0.5).identity()["l1"] == 0.5


# ---- weight sparsity ------------------------------------------------------------------------------


def test_the_fraction_falls_over_the_first_half_and_the_largest_entries_are_kept() -> None:
    model = tiny("sparse-gpt")
    sparsity = WeightSparsity(model, steps=8)
    assert [sparsity.fraction(done) for done in (0, 2, 4, 6, 8)] == [1, 0.5625, 0.125, 0.125, 0.125]
    names = {id(p): n for n, p in model.named_parameters()}
    chosen = {names[id(p)] for p in sparsity.tensors}
    not_chosen = {n for n in names.values() if n not in chosen}
    assert all("ln_" in n or "sink" in n or "bigram" in n for n in not_chosen)
    assert {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} <= chosen
    for done in (2, 4):
        before = [p.detach().clone() for p in sparsity.tensors]
        sparsity.apply(done)
        for old, new in zip(before, sparsity.tensors, strict=True):
            kept = new != 0
            n_kept = max(1, round(sparsity.fraction(done) * new.numel()))
            assert torch.equal(new[kept], old[kept])
            if old.count_nonzero() >= n_kept:
                assert kept.sum() == n_kept
                assert old[~kept].abs().max() <= old[kept].abs().min()


def test_sparse_training_ends_at_its_fraction(run: Path) -> None:
    overrides = (*SMALL["model_overrides"], "weight_fraction=0.03125")
    config = TrainConfig(run=run, model="sparse-gpt-1l", **options("s", model_overrides=overrides))
    assert config.resolved().optimizer == "adamw"
    model: Any = load(train(config).path)
    for parameter in model.sparse_parameters():
        assert parameter.count_nonzero() <= max(1, round(parameter.numel() / 32))
    losses = [line["loss"] for line in read_metrics(run / "model" / "s") if "loss" in line]
    assert len(losses) == 8
    with pytest.raises(InputError, match="--l1"):
        TrainConfig(model="s", null="permuted", l1=0.1)


def test_recipe_of_the_weight_sparse_gpt() -> None:
    laptop = TrainConfig(model="sparse-gpt-2l").resolved()
    assert (laptop.optimizer, laptop.learning_rate, laptop.steps) == ("adamw", 3e-3, LAPTOP.steps)
    assert TrainConfig(model="sparse-gpt-12l").resolved() == PAPER
    muon = TrainConfig(model="sparse-gpt-2l", optimizer="muon").resolved()
    assert muon == LAPTOP


def test_the_gradient_is_clipped_by_its_norm_or_by_its_root_mean_square() -> None:
    model = torch.nn.Linear(3, 3)
    assert gradient_limit(1.0, model, is_sparse=False) == 1.0
    assert gradient_limit(0.5, model, is_sparse=True) == pytest.approx(0.5 * 12**0.5)
    assert gradient_limit(0, model, is_sparse=True) == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["crate-tssa", "gpt2-topk", "sparse-gpt"])
def test_a_compiled_loss_has_the_gradients_of_the_plain_one(family: str) -> None:
    """With the penalty, whose hooks are inside of the graph; without code for this machine."""
    torch._dynamo.reset()
    model = tiny(family)
    loss = NextTokenLoss(model, l1=0.5).train()
    tokens = torch.randint(64, (2, 8))
    weights = parts_of(model)["attention"]
    expected = torch.autograd.grad(loss(tokens, tokens), weights)
    compiled: Any = torch.compile(loss, backend="eager")
    for _ in range(2):
        found = torch.autograd.grad(compiled(tokens, tokens), weights)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
