"""A run with several seeds: names, the section of the report, matched neurons, explanations on the matches."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_train import SMALL, make_run

from cratelm import cli
from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.analysis.matching import CrossSums
from cratelm.analysis.seeds import _untrained, seeds
from cratelm.analysis.seeds_config import SeedsConfig
from cratelm.analysis.seeds_store import read_matches, read_seeds_summary, read_transfers
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.models import load
from cratelm.pipelines.config import DemoConfig
from cratelm.pipelines.demo import _train_config
from cratelm.report.config import ReportConfig
from cratelm.report.report import report
from cratelm.results.run_results import missing_results, read_results
from cratelm.results.seeds import _seed, excluded_seeds, read_seed_scores, seed_groups
from cratelm.runs import Run, names, options_of
from cratelm.runs.reading import read_json
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score
from cratelm.score.store import read_whole_scores
from cratelm.stats.seeds import compare_over_seeds, correlations
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train

MODELS = ("crate-2l", "crate-2l-seed1", "gpt2-2l", "gpt2-2l-seed1")
TOKENS = 1500


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a CRATE and its twin, scored."""
    path = make_run(tmp_path_factory.mktemp("seeds"))
    for name in MODELS:
        base, seed = names.seed_of(name)
        common: dict[str, Any] = {"run": path, "model": name, "quiet": True}
        train(TrainConfig(run=path, **{**SMALL, "steps": 4, "model": base, "seed": seed}))
        harvest(HarvestConfig(**common, tokens=TOKENS, pilot_tokens=256, top=6, device="cpu"))
        explain(ExplainConfig(**common, neurons=8))
        score(ScoreConfig(**common, resamples=100, metrics=("random_only",)))
    return path


@pytest.fixture(scope="module")
def compared(run: Path) -> Path:
    """The same run with the comparison of the seeds of both."""
    for base in ("crate-2l", "gpt2-2l"):
        seeds(SeedsConfig(run=run, model=base, tokens=TOKENS, quiet=True, device="cpu"))
    return run


# ---- names ------------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"steps": 5}, "crate-2l"),
    ({"steps": 5, "seed": 1}, "crate-2l-seed1"),
    ({"steps": 0, "seed": 12}, "crate-2l-seed12-init"),
    ({"steps": 5, "freeze": ("mlp", "attention"), "seed": 2}, "crate-2l-frozen-attention-mlp-seed2"),
    ({"steps": 0, "freeze": ("dictionary",)}, "crate-2l-frozen-dictionary-init"),
    ({"steps": 5, "freeze": ("embeddings",), "seed": 3}, "crate-2l-frozen-embeddings-seed3"),
    ({"steps": 5, "freeze": ("embeddings",)}, "crate-2l-frozen-embeddings"),
    ({"steps": 5, "freeze": ("embeddings", "attention"), "seed": 3}, "crate-2l-frozen-attention-embeddings-seed3"),
    ({"null": "permuted", "seed": 1}, "crate-2l-permuted"),
    ({"null": "permuted", "model": "crate-2l-seed1"}, "crate-2l-seed1-permuted"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "name"), OPTIONS, ids=[name for _, name in OPTIONS])
def test_names_of_seeds_are_read_as_they_are_written(options, name):
    assert TrainConfig(**options).folder == name
    made = cli.parse_options("train", names.training_words(name))
    assert made.folder == name
    assert made.model == options.get("model", "crate-2l")
    assert (made.resolved().steps == 0) == (options.get("steps", 0) == 0)
    for of in (name, f"{name}+s"):
        base, seed = names.seed_of(of)
        assert names.seeded_name(base, seed) == of
        assert names.seed_of(base) == (base, 0)
        assert (seed > 0) == ("seed" in name)


def test_a_seed_is_a_model_with_twin_and_control():
    assert names.seed_of("crate-2l-seed1-init+s") == ("crate-2l-init+s", 1)
    assert names.twin_name("crate-2l-seed1") == "gpt2-2l-seed1"
    assert names.untrained_name("crate-2l-seed1") == "crate-2l-seed1-init"
    assert names.trained_name("crate-2l-seed1-init") == "crate-2l-seed1"
    assert names.null_kind("crate-2l-seed1-init") == "init"
    for other in ("crate-2l-seed0", "crate-2l-seed01", "-seed1", "crate-2l-seed", "seed1"):
        assert names.seed_of(other) == (other, 0)


def test_hints_name_the_command_that_makes_the_model(run, tmp_path):
    for name in ("crate-2l-seed3", "crate-2l-frozen-dictionary-seed3-init"):
        with pytest.raises(InputError) as refused:
            Run(run).stage("model", name).require()
        (command,) = [part for part in str(refused.value).split("`") if part.startswith("cratelm ")]
        made = cli.parse_options("train", command.split()[2:])
        assert (made.model, made.seed, made.folder) == ("crate-2l", 3, name)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model" / "crate-2l-seed1")
    lines = missing_results(read_results(Run(copy)))
    commands = [part for line in lines for part in line.split("`") if "train --run" in part]
    made = [cli.parse_options("train", command.split()[2:]) for command in commands]
    assert [config.model for config in made] == 3 * ["crate-2l"] + 2 * ["gpt2-2l"]
    assert [config.folder for config in made] == [
        *("crate-2l-seed1", "crate-2l-init", "crate-2l-seed1-init", "gpt2-2l-init", "gpt2-2l-seed1-init"),
    ]  # fmt: skip
    for control in (made[1], made[4]):
        assert (control.resolved().sequence_length, control.model_overrides) == (
            SMALL["sequence_length"],
            SMALL["model_overrides"],
        )


def test_the_control_of_a_frozen_or_named_model_is_made_with_its_options():
    """As in the records of a run: without training one."""
    from cratelm.results.run_results import _untrained_command

    path = Path("runs/x")
    given = TrainConfig(run=path, model="crate-2l", steps=5, freeze=("dictionary",), seed=2)
    for name, words in (
        (given.folder, "--freeze dictionary --seed 2"),
        ("mine", "--name mine-init"),
    ):
        record = SimpleNamespace(config=given.identity())
        m: Any = SimpleNamespace(name=name, completions={"model": record})
        command = _untrained_command(Run(path), m)
        made = cli.parse_options("train", command.split()[2:])
        assert made.folder == f"{name}-init"
        assert (made.freeze, made.seed, made.steps) == (("dictionary",), 2, 0)
        for pair in words.split(" --"):
            assert pair.removeprefix("--") in command


def test_the_names_of_the_demo_do_not_depend_on_its_seed():
    for seed in (0, 3):
        for name in ("crate-2l", "gpt2-2l-init"):
            config = _train_config(DemoConfig(seed=seed), name)
            assert (config.folder, config.seed) == (name, seed)
            assert ("--name" in options_of(config)) == (seed > 0)


def test_a_redone_model_of_an_earlier_version_keeps_its_name(run):
    """Records of earlier versions have a seed without a name."""
    from cratelm.runs.stage import _command

    stage = Run(run).stage("model", "crate-2l-seed1")
    done = stage.require()
    assert "--name" not in _command(stage, done, force=True)
    earlier = dataclasses.replace(done, name="crate-2l")
    assert _command(stage, earlier, force=True).endswith("--name crate-2l --force")


# ---- statistics and report --------------------------------------------------------------------------


def test_the_p_value_is_that_of_the_interval():
    """Planted: no difference, a large one, and one at the edge of the interval."""
    rng = np.random.default_rng(0)
    side = [{0: rng.normal(size=200)} for _ in range(4)]
    same = compare_over_seeds(side, [{0: rng.normal(size=200)} for _ in range(4)], resamples=999)
    assert same.p_value > 0.05
    far = compare_over_seeds(side, [{0: v[0] - 3} for v in side], resamples=999)
    assert far.p_value == pytest.approx(2 / 1000)
    assert far.difference.value == pytest.approx(3)
    level = 1 - far.p_value
    edge = far.difference.low
    assert edge is not None
    assert edge > 0
    assert (
        compare_over_seeds(side, [{0: v[0] - 3} for v in side], resamples=999).difference
        == far.difference
    )
    equal = compare_over_seeds(side[:1], [{0: side[0][0]}], resamples=999)
    assert equal.p_value > 0.5
    assert level < 1


def test_the_report_has_means_over_seeds_and_pairs(compared, tmp_path, undrawn):
    path = tmp_path / "run"
    shutil.copytree(compared, path)
    written = report(ReportConfig(run=path, neurons=0, resamples=200))
    tables = read_json(written.tables)
    rows = tables["seeds"]["rows"]
    assert {row["model"] for row in rows} == {"crate-2l", "gpt2-2l"}
    measures = {(row["explainer"], row["measure"]) for row in rows}
    assert ("last token", "token share, %") in measures
    assert ("trie", "random-only") in measures
    assert ("lookup", "all tokens, correlation") in measures
    (row,) = [r for r in rows if (r["model"], r["explainer"], r["measure"]) == ("gpt2-2l", "trie", "all tokens, correlation")]  # fmt: skip
    by_seed = []
    for name in MODELS[2:]:
        scores = read_whole_scores(path / "scores" / name)
        own = [s for s in scores if (s.explainer, s.control) == ("trie", "none") and s.correlation is not None]  # fmt: skip
        layers = [[s.correlation for s in own if s.neuron.layer == n] for n in (0, 1)]
        by_seed.append(100 * np.mean([np.mean(np.array(values, float)) for values in layers]))
    assert row["mean"]["value"] == pytest.approx(np.mean(by_seed))
    assert row["mean"]["low"] <= row["mean"]["value"] <= row["mean"]["high"]
    assert row["by_seed"] == ", ".join(f"{value:.1f}" for value in by_seed)
    assert row["seeds"] == 2
    pairs = tables["seeds_twins"]["rows"]
    assert {p["layer"] for p in pairs} == {"all", "0", "1"}
    assert {p["models"] for p in pairs} == {"crate-2l − gpt2-2l"}
    for p in pairs:
        assert p["difference"]["value"] == pytest.approx(p["mean_a"] - p["mean_b"])
        assert p["p_value"] <= p["p_holm"] <= 1
    assert f"all {len(pairs)} tests" in tables["seeds_twins"]["note"]
    page = written.page.read_text(encoding="utf-8")
    assert '<h2 id="seeds">' in page
    assert "optimistic" in page
    for base in ("crate-2l", "gpt2-2l"):
        assert f"cratelm seeds --run {path} --model {base} --tokens {TOKENS}" in page
        summary = read_seeds_summary(path / "seeds" / base)
        shown = [row for row in tables["seed_matches"]["rows"] if row["model_a"] == base]
        assert [row["mean"] for row in shown] == [m.mean for m in summary.matches]
        assert [row["untrained"] for row in shown] == [m.untrained for m in summary.matches]
        kept = [row for row in tables["seed_transfer"]["rows"] if row["model_a"].startswith(base)]
        assert len(kept) == len(summary.transfers) == 4


def test_models_with_other_options_are_no_seeds(run):
    results = read_results(Run(run))
    groups = {group.base: group for group in seed_groups(results)}
    assert list(groups["crate-2l"].models) == [0, 1]
    assert not groups["crate-2l"].excluded
    scores = read_seed_scores(results, groups["crate-2l"])
    assert set(scores["trie", "random_only"]) == {0, 1}

    def changed(**config: Any) -> Any:
        """The results with another record of the second seed."""
        models = list(results.models)
        at = [m.name for m in models].index("crate-2l-seed1")
        done = models[at].completions["model"]
        record = dataclasses.replace(done, config={**done.config, **config})
        models[at] = dataclasses.replace(models[at], completions={**models[at].completions, "model": record})  # fmt: skip
        return dataclasses.replace(results, models=tuple(models))

    assert [g.base for g in seed_groups(changed(steps=7))] == ["gpt2-2l"]
    assert [g.base for g in seed_groups(changed(freeze=["dictionary"]))] == ["gpt2-2l"]
    assert excluded_seeds(changed(steps=7)) == [
        "crate-2l-seed1 as a seed of crate-2l: it has --steps 7 and crate-2l 4 in model"
    ]
    assert excluded_seeds(results) == []
    control = changed(null="permuted", seed=0).model("crate-2l-seed1")
    assert _seed(control) == 1  # the record has the seed of the permutation
    assert [g.base for g in seed_groups(changed(seed=0))] == ["gpt2-2l"]


# ---- cratelm seeds ----------------------------------------------------------------------------------


def test_streamed_correlations_are_those_of_all_tokens():
    rng = np.random.default_rng(0)
    a = np.maximum(0, rng.normal(size=(300, 5))).astype(np.float32)
    b = np.hstack([a[:, [1, 0]] + 0.5 * rng.normal(size=(300, 2)), np.full((300, 1), 0.1)])
    b = np.hstack([b, 1e-4 * a[:, :1]]).astype(np.float32)
    sums = CrossSums(5, 4)
    for first in range(0, 300, 70):
        of = slice(first, first + 70)
        sums.add(torch.from_numpy(a[of]), torch.from_numpy(b[of]))
    found, constant = sums.correlation()
    np.testing.assert_allclose(found, correlations(a, b), atol=1e-6)
    assert constant == 1
    assert found[0, 3] == pytest.approx(1, abs=1e-6)  # however small the activations are


def test_matches_and_transfer_are_those_of_the_definition(compared):
    """Recomputed from all activations at once, for one layer."""
    from cratelm.activations.batches import SearchPlan
    from cratelm.activations.open_harvest import open_harvested
    from cratelm.analysis.matching import read_activations
    from cratelm.explain.store import read_explanations
    from cratelm.runs.model_options import HarvestedModelOptions
    from cratelm.score.simulators import simulate

    run, layer = Run(compared), 1
    opened = [open_harvested(run, name, HarvestedModelOptions(device="cpu")) for name in MODELS[:2]]
    first = opened[0]
    plan = SearchPlan.of(first.store.split("held_out"), "held_out", first.store.eot_id, first.sequence_length, TOKENS, 0)  # fmt: skip
    read = list(read_activations([o.subject.model for o in opened], first.site, plan, 64, abs))
    a, b = (np.concatenate([of[side][layer].numpy() for _, of in read]) for side in (0, 1))
    folder = compared / "seeds" / "crate-2l"
    rows = [m for m in read_matches(folder) if (m.layer, m.similarity, m.control) == (layer, "activations", "none")]  # fmt: skip
    similarity = np.abs(correlations(a, b))
    for m in rows:
        assert m.value == pytest.approx(similarity[m.index_a, m.index_b], abs=1e-5)
    assert sorted(m.index_b for m in rows) == list(range(b.shape[1]))
    greedy = similarity.max(1).sum()
    assert similarity.trace() < sum(m.value for m in rows) <= greedy + 1e-6
    segments = [batch.input_ids.flatten().numpy()[low:high] for batch, _ in read for low, high in batch.segments]  # fmt: skip
    explained = {(e.neuron.layer, e.neuron.index): e for e in read_explanations(compared / "explanations" / MODELS[0]) if e.explainer == "trie"}  # fmt: skip
    matches = {m.index_a: m.index_b for m in rows}
    checked = 0
    for t in read_transfers(folder):
        if (t.model_a, t.layer, t.explainer) == (MODELS[0], layer, "trie"):
            assert t.index_b == matches[t.index_a]
            e = explained[layer, t.index_a]
            simulated = np.concatenate(simulate(e.explainer, e.payload, segments))[:, None]
            for value, true in (
                (t.own, a[:, t.index_a]),
                (t.on_match, b[:, t.index_b]),
                (t.on_random, b[:, t.index_random]),
            ):
                expected = correlations(simulated, true[:, None])[0, 0]
                assert (value or 0.0) == pytest.approx(expected, abs=1e-5)
            checked += 1
    assert checked == 8


def test_the_comparison_is_summarized_and_stored(compared, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(compared, path)
    config = SeedsConfig(run=path, model="gpt2-2l", tokens=TOKENS, quiet=True, device="cpu")
    again = seeds(config)
    assert "seeds/gpt2-2l is finished, skipped" in capsys.readouterr().out
    assert again.seeds == list(MODELS[2:])
    assert "gpt2-2l, gpt2-2l-seed1" in str(again)
    before = {p.name: p.read_bytes() for p in again.path.iterdir() if p.name != "completed.json"}
    seeds(dataclasses.replace(config, force=True))
    assert before == {p.name: p.read_bytes() for p in again.path.iterdir() if p.name != "completed.json"}  # fmt: skip
    summary = read_seeds_summary(again.path)
    rows, transfers = read_matches(again.path), read_transfers(again.path)
    for m in summary.matches:
        of = [r for r in rows if (r.layer, r.similarity) == (m.layer, m.similarity)]
        for control, mean in (("none", m.mean), ("untrained", m.untrained)):
            assert mean == pytest.approx(np.mean([r.value for r in of if r.control == control]))
    assert {(m.layer, m.similarity) for m in summary.matches} == {(n, s) for n in (0, 1) for s in ("activations", "atoms")}  # fmt: skip
    for t in summary.transfers:
        of = [r for r in transfers if (r.model_a, r.explainer) == (t.model_a, t.explainer) and r.own is not None]  # fmt: skip
        own = np.mean(np.array([r.own for r in of], float))
        assert t.own == pytest.approx(own)
        assert t.neurons == len(of)
        for ratio, field in ((t.transfer, "on_match"), (t.random, "on_random")):
            if ratio is not None:
                assert ratio.value == pytest.approx(np.mean([getattr(r, field) or 0 for r in of]) / own)  # fmt: skip
    assert {(t.model_a, t.model_b) for t in summary.transfers} == {MODELS[2:], MODELS[:1:-1]}


def test_the_null_is_the_model_before_its_training(run, tmp_path):
    """The same bits as `--steps 0` saves."""
    from cratelm.activations.open_harvest import open_harvested
    from cratelm.runs.model_options import HarvestedModelOptions

    path = tmp_path / "run"
    shutil.copytree(run, path)
    for name in ("crate-2l-seed1", "gpt2-2l-seed1"):
        base, seed = names.seed_of(name)
        options = {**SMALL, "steps": 0, "model": base, "seed": seed}
        saved = load(train(TrainConfig(run=path, **options)).path)
        opened = open_harvested(Run(path), name, HarvestedModelOptions(device="cpu"))
        fresh = _untrained(SimpleNamespace(model=opened.subject.model, seed=seed))  # pyright: ignore
        for key, weight in saved.state_dict().items():
            assert torch.equal(weight, fresh.state_dict()[key]), key


def test_what_cannot_be_compared_is_one_line(run, tmp_path):
    with pytest.raises(
        InputError, match=r"crate-2l-seed1, one seed, but .*: type --model crate-2l$"
    ):
        SeedsConfig(model="crate-2l-seed1")
    with pytest.raises(InputError, match=r"no harvested crate-3l, .*: type `cratelm train --run .* --model crate-3l`, then"):  # fmt: skip
        seeds(SeedsConfig(run=run, model="crate-3l", quiet=True))
    path = tmp_path / "run"
    shutil.copytree(run, path)
    shutil.rmtree(path / "seeds", ignore_errors=True)
    shutil.rmtree(path / "activations" / "crate-2l-seed1")
    config = SeedsConfig(run=path, model="crate-2l", quiet=True, device="cpu")
    with pytest.raises(InputError, match=r"one harvested seed of crate-2l, crate-2l, .*type `cratelm harvest --run .* --model crate-2l-seed1 --tokens"):  # fmt: skip
        seeds(config)
    shutil.rmtree(path / "model" / "crate-2l-seed1")
    with pytest.raises(InputError) as refused:
        seeds(config)
    commands = [part for part in str(refused.value).split("`") if part.startswith("cratelm ")]
    assert [command.split()[1] for command in commands] == ["train", "harvest", "explain"]
    made = cli.parse_options("train", commands[0].split()[2:])
    assert (made.folder, made.resolved().steps) == ("crate-2l-seed1", 4)
    for stage, command in zip(("activations", "explanations"), commands[1:], strict=True):
        like = Run(path).stage(stage, "crate-2l").command(force=False)
        assert command == like.replace("--model crate-2l", "--model crate-2l-seed1")
    assert not (path / "seeds").exists()
    train(TrainConfig(run=path, **{**SMALL, "steps": 2, "validate_every": 2}, seed=1))
    harvest(HarvestConfig(run=path, model="crate-2l-seed1", tokens=500, pilot_tokens=256, quiet=True))  # fmt: skip
    with pytest.raises(InputError, match="crate-2l-seed1 has --steps 2 and crate-2l 4 in model"):
        seeds(config)
