"""`cratelm study`: recipes, the grid, its cost, the page, and intervals that are paired over seeds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_train import TINY

from cratelm import cli
from cratelm.errors import InputError
from cratelm.models.flops import forward_flops
from cratelm.pipelines import study_cost
from cratelm.pipelines.study import study
from cratelm.pipelines.study_config import StudyConfig
from cratelm.pipelines.study_recipe import own_recipes, read_recipes, train_config
from cratelm.replace.store import read_documents
from cratelm.report.study.claims import Claim, Tested
from cratelm.results.study import Training
from cratelm.runs import Run
from cratelm.runs.reading import read_json
from cratelm.stats.documents import DocumentResamples
from cratelm.stats.replicates import Replicates, SeedResamples
from cratelm.stats.seeds import mean_over_seeds

RECIPES = Path(__file__).parent.parent / "recipes"
T = 16
SMALL: dict[str, Any] = {
    "question": "Does it run?",
    "families": ["crate", "gpt2"],
    "sizes": ["2l"],
    "seeds": [0, 1],
    "controls": ["init"],
    "rates": {"crate": 0.01},
    "switches": {"frozen": {"families": ["crate"], "train": {"freeze": ["dictionary"]}}},
    "equal_flops": "gpt2",
    "stages": {
        "tune": {"steps": 2, "rates": [0.003, 0.03]},
        "tokenize": {"vocab_size": 300, "fit": 0.2, "held_out": 0.2, "sequence_length": 16},
        "train": {
            "steps": 6, "batch_size": 4, "micro_batch_size": 4, "sequence_length": T, "validate_every": 2,
            "validation_sequences": 8, "model_overrides": list(TINY),
        },
        "harvest": {"tokens": 1500, "sequence_length": T, "top": 6, "random": 6, "per_bin": 2, "pilot_tokens": 256},
        "explain": {"neurons": 8, "explainers": ["lookup", "trie"]},
        "score": {"resamples": 100},
        "replace": {
            "explainers": ["lookup", "trie"], "fit_tokens": 1500, "tokens": 1000, "curve_tokens": 0,
            "neuron_tokens": 0, "layers": ["all"], "resamples": 100,
        },
        "seeds": {"tokens": 500},
    },
}  # fmt: skip
"""a recipe that runs in seconds"""


def recipe_file(folder: Path, name: str = "small", **changes: Any) -> Path:
    """Write the small recipe with some keys changed; None leaves one out."""
    content = {k: v for k, v in {**SMALL, **changes}.items() if v is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def stages(**changes: Any) -> dict[str, Any]:
    """Return the stages of the small recipe with some options changed."""
    return {name: {**of, **changes.get(name, {})} for name, of in SMALL["stages"].items()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of sentences over few words."""
    draw = np.random.default_rng(0)
    words = ["red", "blue", "green", "stone", "river", "the", "a", "over", "under", "sees", "1"]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = (" ".join(draw.choice(words, draw.integers(10, 60))) for _ in range(150))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def done(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyConfig]:
    """A finished study, and its options."""
    folder = tmp_path_factory.mktemp("study")
    config = StudyConfig(
        (recipe_file(folder),),
        run=folder / "run",
        corpus=str(corpus),
        page=folder / "docs" / "study.md",
        resamples=400,
        jobs=1,
        quiet=True,
    )
    study(config)
    return folder, config


# ---- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_headed_by_cost_and_result_and_states_what_it_costs(path, capsys):
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(line.startswith("# Cost: ") for line in head)
    assert any("esult" in line or "Never run" in line for line in head)
    status = cli.main(["study", str(path), "--run", "absent", "--dry-run", "--tflops", "10"])
    printed = capsys.readouterr().out
    assert status == 0
    assert "models to train" in printed
    assert not Path("absent").exists()
    calls = int(printed.split("in all")[1].split("\n")[0].split()[-1].replace(",", ""))
    assert (calls > 0) == (path.stem == "paper")  # the one with language models


def test_the_grid_goes_seed_after_seed_and_names_every_model_once(tmp_path):
    recipe = read_recipes([recipe_file(tmp_path)])
    assert [cell.name for cell in recipe.cells] == [
        "crate-2l",
        "crate-2l-init",
        "crate-2l-equal-flops",
        "gpt2-2l",
        "gpt2-2l-init",
        "crate-2l-frozen",
        "crate-2l-seed1",
        "crate-2l-equal-flops-seed1",
        "gpt2-2l-seed1",
        "crate-2l-frozen-seed1",
    ]
    assert set(recipe.seeded()) == {
        "crate-2l",
        "crate-2l-equal-flops",
        "gpt2-2l",
        "crate-2l-frozen",
    }
    frozen = train_config(recipe, recipe.cells[-1], tmp_path)
    assert (frozen.freeze, frozen.seed, frozen.learning_rate) == (("dictionary",), 1, 0.01)
    assert frozen.folder == "crate-2l-frozen-seed1"
    assert train_config(recipe, recipe.cells[3], tmp_path).learning_rate is None
    assert train_config(recipe, recipe.cells[1], tmp_path).steps == 0
    assert "replace" not in recipe.stages_of(recipe.cells[1])


def test_the_recipe_of_the_docs_can_be_read(tmp_path):
    page = (RECIPES.parent / "docs" / "verbs" / "study.md").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(page.split("```text\n")[1].split("```")[0], encoding="utf-8")
    names = {cell.name for cell in read_recipes([path]).cells}
    assert {"crate-3l-frozen-seed2", "crate-1l-equal-flops", "gpt2-2l-init"} - names == {
        "crate-3l-frozen-seed2"  # the switch is of two layers alone
    }


def test_own_recipes_are_found_by_name():
    assert set(own_recipes()) == {path.stem for path in RECIPES.glob("*.yaml")}
    assert read_recipes([Path("laptop")]) == read_recipes([RECIPES / "laptop.yaml"])


def test_recipes_of_one_command_share_models_and_stages(tmp_path):
    one = recipe_file(tmp_path, "one", switches=None, equal_flops=None, controls=None)
    two = recipe_file(tmp_path, "two", families=["gpt2", "gpt2-solu"], switches=None, equal_flops=None, controls=None)  # fmt: skip
    joined = read_recipes([one, two])
    assert joined.name == "one+two"
    assert [c.name for c in joined.cells if not c.seed] == ["crate-2l", "gpt2-2l", "gpt2-solu-2l"]
    other = recipe_file(tmp_path, "other", stages=stages(train={"steps": 7}))
    with pytest.raises(InputError, match="stage train different options"):
        read_recipes([one, other])
    faster = recipe_file(tmp_path, "faster", switches=None, equal_flops=None, controls=None, rates={"crate": 0.02})  # fmt: skip
    with pytest.raises(InputError, match="trains crate-2l otherwise"):
        read_recipes([one, faster])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"familes": ["crate"]}, "has no 'familes': expected question, families"),
    "unknown family": ({"families": ["crates"]}, "families has 'crates': expected crate"),
    "family twice": ({"families": ["crate", "crate"]}, "name each once"),
    "no families": ({"families": None}, "families must be a list of families"),
    "unknown size": ({"sizes": ["9l"]}, "sizes has '9l': expected 1l, 2l"),
    "seed below 0": ({"seeds": [-1]}, "seeds must be different numbers from 0"),
    "seeds as text": ({"seeds": "0, 1"}, "seeds must be different numbers from 0"),
    "unknown control": ({"controls": ["random"]}, "controls has 'random': expected init"),
    "rate of no family": ({"rates": {"crat": 1}}, "rates has no 'crat'"),
    "rate of 0": ({"rates": {"crate": 0}}, "stages.train: --learning-rate is 0"),
    "no stages": ({"stages": None}, "lacks `stages`"),
    "unknown stage": ({"stages": {"trian": {}}}, "stages has no 'trian'"),
    "unknown option": ({"stages": stages(train={"step": 3})}, "stages.train has no 'step'"),
    "option of the grid": ({"stages": stages(train={"model": "x"})}, "stages.train has no 'model'"),
    "wrong type": ({"stages": stages(train={"steps": "many"})}, "stages.train: --steps"),
    "refused value": ({"stages": stages(harvest={"tokens": 0})}, "stages.harvest: --tokens must be at least 1"),
    "score without explain": ({"stages": {"train": {}, "harvest": {}, "score": {}}}, "has score without explain"),
    "switch with a slash": ({"switches": {"a/b": {"train": {}}}}, "has a slash"),
    "switch without options": ({"switches": {"a": {}}}, "switches.a.train must be keys with values"),
    "search of one rate": ({"stages": stages(tune={"rates": [0.1]})}, "stages.tune: --rates needs at least two"),
    "reserved switch": ({"switches": {"equal-flops": {"train": {}}}}, "rename it"),
    "equal FLOPs to nothing": ({"equal_flops": "gpt3"}, "equal_flops is 'gpt3': name one of the families"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_refused_in_one_line_before_anything_is_made(name, tmp_path, capsys):
    changes, message = WRONG[name]
    path = recipe_file(tmp_path, **changes)
    status = cli.main(["study", str(path), "--run", str(tmp_path / "run")])
    said = capsys.readouterr().err.strip()
    assert status == 2
    assert message in said
    assert str(path) in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a", "has no keys"), ("a: [", "is not YAML"), (None, "there is no recipe"), ("\x00", "is not YAML")],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused(content, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert cli.main(["study", str(path), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "crate-9l"], "--only has crate-9l, which is not a model of the recipe"),
        (["--tflops", "3"], "add --dry-run"),
        (["--page", "study.html"], "must be a Markdown file"),
        (["--corpus", "absent.txt"], "absent.txt"),
    ],
)
def test_wrong_options_are_refused(words, message, tmp_path, capsys):
    path = recipe_file(tmp_path)
    assert cli.main(["study", str(path), "--run", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_refuses_its_options_is_reported_before_others_are_trained(tmp_path, capsys):
    bad = {"ista": {"families": ["crate"], "train": {"model_overrides": ["ista_stepz=3"]}}}
    path = recipe_file(tmp_path, switches=bad)
    assert cli.main(["study", str(path), "--run", str(tmp_path / "run")]) == 2
    assert "ista_stepz" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- cost -----------------------------------------------------------------------------------------


def test_operations_are_those_of_the_products():
    # per layer: two D x D products of MSSA, four D x 4D products of ISTA; scores and mixing over T tokens; the head
    d, layers, vocab, length = 128, 2, 512, 64
    products = layers * (2 * d * d + 4 * 4 * d * d) + vocab * d
    attention = layers * 2 * length * d
    assert forward_flops("crate-2l", vocab, length) == 2 * (products + attention)


def test_models_for_equal_flops_take_steps_in_proportion(tmp_path):
    recipe = read_recipes([recipe_file(tmp_path, stages=stages(train={"steps": 1000}))])
    flops = study_cost.flops_of(recipe)
    cell = next(c for c in recipe.cells if c.budget)
    steps = recipe.steps(cell, flops)
    assert abs(steps * flops["crate-2l"] / (1000 * flops["gpt2-2l"]) - 1) < 1e-3
    assert recipe.steps(recipe.cells[0], flops) == 1000


def test_finished_stages_cost_nothing_more(done):
    _, config = done
    recipe = read_recipes(config.recipes)
    flops = study_cost.flops_of(recipe)
    left = study_cost.costs(recipe, Run(config.run), flops)
    assert all(c.finished == c.models for c in left)
    assert sum(c.flops for c in left) == 0


# ---- the page -------------------------------------------------------------------------------------


def test_the_page_has_every_model_claim_and_figure(done):
    folder, config = done
    text = (folder / "docs" / "study.md").read_text(encoding="utf-8")
    in_run = Run(config.run).stage("study", "small").path
    assert (in_run / "study.md").read_text(encoding="utf-8") == text
    for name in ("crate-2l-frozen", "crate-2l-equal-flops", "gpt2-2l-init"):
        assert f"| {name} |" in text
    for title in ("The paper's claims", "Loss and interpretability", "Seeds", "What this budget cannot tell", "Reproduce"):  # fmt: skip
        assert f"## {title}" in text
    assert "8.05 / 4.2" in text  # the paper's figures beside ours
    assert "{figure:" not in text
    assert (folder / "docs" / "study-frontier-2l.png").stat().st_size > 10_000
    assert "(study-frontier-2l.png)" in text


def test_the_figures_are_those_of_the_stages(done):
    folder, config = done
    figures = read_json(folder / "docs" / "study.json")["figures"]
    run = Run(config.run)
    losses = []
    for name in ("gpt2-2l", "gpt2-2l-seed1"):
        rows = [r for r in read_documents(run.stage("replacement", name).path) if r.replaced_by == "none"]  # fmt: skip
        losses.append(sum(r.loss for r in rows) / sum(r.n_tokens for r in rows))
    of = figures["gpt2-2l"]["loss"]
    assert np.allclose(of["by_seed"], losses)
    assert np.isclose(of["value"], np.mean(losses))
    assert of["low"] < of["value"] < of["high"]
    assert np.isclose(
        figures["gpt2-2l"]["loss_replaced"]["value"] - of["value"], figures["gpt2-2l"]["nats_lost"]["value"]
    )  # fmt: skip
    stored = read_json(run.stage("scores", "crate-2l").path / "summary.json")
    share = stored["all_tokens"]["token_share"]["mean"]["value"]
    assert np.isclose(figures["crate-2l"]["token_share"]["by_seed"][0], share)


def test_a_second_command_makes_nothing_and_writes_the_same_page(done):
    folder, config = done
    run = Run(config.run)
    before = {done.label: done.finished_at for done in run.completions() if done.stage != "study"}
    text = (folder / "docs" / "study.md").read_bytes()
    result = study(config)
    after = {done.label: done.finished_at for done in run.completions() if done.stage != "study"}
    assert after == before
    assert (folder / "docs" / "study.md").read_bytes() == text
    assert result.missing == ()


def test_a_model_of_other_options_is_not_on_the_page(done, tmp_path):
    _, config = done
    changed = recipe_file(tmp_path, stages=stages(train={"steps": 7}))
    again = StudyConfig(
        (changed,), run=config.run, corpus=config.corpus, only=("gpt2-2l-init",), resamples=100, jobs=1, quiet=True
    )  # fmt: skip
    with pytest.raises(InputError, match="no model of small is finished"):
        study(again)


def test_rates_are_searched_once_for_each_family_without_one(done):
    _, config = done
    run = Run(config.run)
    assert run.models("tuning") == ["gpt2-2l"]  # the recipe gives CRATE's
    best = run.stage("tuning", "gpt2-2l").require("tune").results["learning_rate"]
    assert best in (0.003, 0.03)
    for name in ("gpt2-2l", "gpt2-2l-seed1"):
        assert run.stage("model", name).require("train").config["learning_rate"] == best
    trained = run.stage("model", "crate-2l-frozen").require("train")
    assert trained.config["learning_rate"] == 0.01


def test_only_some_models_are_made_and_the_rest_is_named(corpus, tmp_path):
    path = recipe_file(tmp_path, controls=None, switches=None, equal_flops=None)
    config = StudyConfig(
        (path,), run=tmp_path / "run", corpus=str(corpus), only=("gpt2-2l",), resamples=100, jobs=1, quiet=True
    )  # fmt: skip
    result = study(config)
    assert Run(config.run).models("scores") == ["gpt2-2l"]
    assert set(result.missing) == {"crate-2l", "crate-2l-seed1", "gpt2-2l-seed1"}
    assert result.page is not None
    assert "Not finished, and so not on this page: crate-2l," in result.page.read_text("utf-8")


# ---- statistics -----------------------------------------------------------------------------------


def planted(
    effect: float, spread: float, n: int = 200, seeds: int = 3, seed: int = 0
) -> list[dict]:
    """Return values of two layers of neurons for each seed, whose means differ by `spread` between seeds."""
    rng = np.random.default_rng(seed)
    shifts = rng.normal(0, spread, seeds)
    return [{k: rng.normal(effect + shift, 1, n) for k in (0, 1)} for shift in shifts]


def test_a_figure_over_seeds_is_that_of_the_hierarchical_bootstrap():
    seeds = planted(1.0, 0.5)
    figure = SeedResamples(3, 4000, 0).of_neurons(seeds, "a")
    reference = mean_over_seeds(seeds, resamples=4000)
    assert np.isclose(figure.value, reference.value)
    assert np.allclose(figure.bounds, (reference.low, reference.high), atol=0.06)


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(1)
    shifts = rng.normal(0, 5, 3)  # seeds differ by far more than the models do
    a = [{0: rng.normal(shift + 1, 1, 500)} for shift in shifts]
    b = [{0: rng.normal(shift, 1, 500)} for shift in shifts]
    resamples = SeedResamples(3, 2000, 0)
    of_a, of_b = resamples.of_neurons(a, "a"), resamples.of_neurons(b, "b")
    difference = of_a - of_b
    low, high = difference.bounds
    assert 0.7 < low < 1 < high < 1.3
    assert high - low < 0.2 * (of_a.bounds[1] - of_a.bounds[0])
    assert difference.p_value < 0.01
    with pytest.raises(InputError, match="3 seeds are compared with 2"):
        of_a - SeedResamples(2, 2000, 0).of_neurons(b[:2], "b")


def test_losses_of_one_seed_are_those_of_the_bootstrap_over_documents():
    rng = np.random.default_rng(2)
    tokens = rng.integers(50, 500, 40)
    loss = tokens * rng.normal(4, 0.3, 40)
    figure = SeedResamples(1, 4000, 0).of_documents(tokens, lambda x: x, [loss])
    reference = DocumentResamples(tokens, 4000, 1).mean(loss)
    assert np.isclose(figure.value, reference.value)
    assert np.allclose(figure.bounds, (reference.low, reference.high), atol=0.02)


def test_two_models_on_the_same_documents_have_no_interval_if_their_losses_differ_by_a_constant():
    rng = np.random.default_rng(3)
    tokens = rng.integers(50, 500, 40)
    loss = [tokens * rng.normal(4, 0.3, 40) for _ in range(2)]
    resamples = SeedResamples(2, 500, 0)
    a = resamples.of_documents(tokens, lambda x: x, loss)
    b = resamples.of_documents(tokens, lambda x: x, [x + 0.5 * tokens for x in loss])
    assert np.allclose((b - a).bounds, 0.5)


def test_a_verdict_needs_an_interval_and_an_adjusted_p_value():
    def tested(value: float, width: float, p: float, sign: int) -> str:
        drawn = np.random.default_rng(0).normal(value, width, 1000)
        figure = Replicates(value, drawn, (value,))
        return Tested(Claim("", "2l", "loss", sign), figure, figure, figure, p).verdict

    assert tested(1, 0.1, 0.01, 1) == "holds"
    assert tested(1, 0.1, 0.01, -1) == "contradicted"
    assert tested(1, 0.1, 0.2, 1) == "undecided"
    assert tested(0.1, 1, 0.01, 1) == "undecided"


def test_the_bend_of_a_straight_curve_is_1_and_of_one_that_has_bent_less():
    def bend(late: float, whole: float) -> float | None:
        return Training(1, 10, 10, 0.1, "muon", 1.0, late, whole).bend

    assert bend(1.0, 5.0) == 1.0
    assert bend(0.1, 5.0) == pytest.approx(0.1)
    assert bend(0.1, 0.0) is None
