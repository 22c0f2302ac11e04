"""Synthetic tasks: their answers by definition, what a model without attention can do, and the verb."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cratelm.probes.probe as verb
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.models import FAMILIES
from cratelm.probes import tasks, training
from cratelm.probes.config import ProbeConfig
from cratelm.probes.store import read_summary
from cratelm.probes.tasks import IGNORED, TASKS
from cratelm.runs import Run
from cratelm.stats.intervals import wilson


def drawn(task: str, n: int = 300, seed: int = 0) -> tasks.Sequences:
    return TASKS[task].draw(n, np.random.default_rng(seed))


def test_binding_asks_for_the_value_that_was_paired_with_the_key() -> None:
    of = drawn("binding")
    n, question = tasks.PAIRS, tasks.N_KEYS + tasks.N_VALUES
    for tokens, targets in zip(of.tokens.tolist(), of.targets.tolist(), strict=True):
        pairs = dict(zip(tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == n
        assert all(k < tasks.N_KEYS <= v < question for k, v in pairs.items())
        asked = tokens[2 * n + 1 :: 3]
        assert sorted(asked) == sorted(pairs)
        assert tokens[2 * n :: 3] == [question] * n
        expected = [IGNORED] * len(tokens)
        expected[2 * n + 1 :: 3] = [pairs[key] for key in asked]
        assert targets == expected
        assert tokens[2 * n + 2 :: 3] == [pairs[key] for key in asked]
        assert targets[of.first] == pairs[tokens[of.first]] != tokens[of.first]


def test_induction_goes_on_as_it_went_on_before() -> None:
    of = drawn("induction")
    m, starts = tasks.LENGTH, set()
    for tokens, targets in zip(of.tokens.tolist(), of.targets.tolist(), strict=True):
        follows = dict(pairwise(tokens[:m]))
        assert len(set(tokens[:m])) == m
        assert targets[:m] == [IGNORED] * m
        assert of.first == m
        assert targets[m] == follows[tokens[m]] != tokens[m]
        starts.add(tokens.index(tokens[m]))
        for place in range(m, len(tokens) - 1):
            asked = targets[place] != IGNORED
            assert asked == (tokens[place] in follows)
            assert not asked or targets[place] == tokens[place + 1] == follows[tokens[place]]
    assert starts == set(range(m - 1))


@pytest.mark.parametrize("task", TASKS)
def test_a_guess_among_the_possible_answers_is_right_at_the_stated_chance(task: str) -> None:
    of, rng = drawn(task, 40_000), np.random.default_rng(1)
    if task == "binding":
        choices = of.tokens[:, 1 : 2 * tasks.PAIRS : 2]
    else:  # every token that can follow another, but the one that asks
        choices = of.tokens[:, 1 : tasks.LENGTH]
    can_be = choices != of.tokens[:, [of.first]]
    ranks = np.where(can_be, rng.random(choices.shape), 2.0)
    guesses = choices[np.arange(len(choices)), ranks.argmin(1)]
    error = (TASKS[task].chance / len(choices)) ** 0.5
    assert abs((guesses == of.answers).mean() - TASKS[task].chance) < 4 * error
    assert TASKS[task].length == of.tokens.shape[1]
    assert of.tokens.max() < TASKS[task].vocabulary


def test_sequences_depend_on_the_seed_alone() -> None:
    for task in TASKS:
        assert (drawn(task).tokens == drawn(task).tokens).all()
        assert (drawn(task).tokens != drawn(task, seed=1).tokens).any()


def test_wilsons_interval() -> None:
    """Values of Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20."""
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):  # fmt: skip
        found = wilson(successes, n)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20).high == 1


# ---- models ---------------------------------------------------------------------------------------


def trained(name: str, task: str, steps: int, *, attention: bool = True) -> float:
    """The accuracy of a model after training, with attention that writes nothing if it is switched off."""
    model: Any = training.new_model(name, TASKS[task], 0)
    if not attention:
        for block in model.transformer.h:
            torch.nn.init.zeros_(block.attn.c_proj.weight).requires_grad_(False)
    recipe = training.recipe_of(name, steps, 64, None)
    training.train_on(model, TASKS[task], recipe, 0, lambda loss: None)
    return float(training.tested(model, TASKS[task], 1000, 0).mean())


@pytest.mark.slow  # 20 seconds
def test_gpt2_learns_induction_and_without_attention_it_does_not() -> None:
    assert trained("gpt2-2l", "induction", 300) > 0.9
    chance = TASKS["induction"].chance
    assert trained("gpt2-2l", "induction", 60, attention=False) < chance + 0.04


def test_every_family_can_be_trained_on_every_task() -> None:
    for family in FAMILIES:
        task = TASKS["induction"]
        model = training.new_model(f"{family}-1l", task, 0)
        recipe = training.recipe_of(f"{family}-1l", 2, 4, None)
        assert (recipe.optimizer == "adamw") == (family == "sparse-gpt")
        losses: list[float] = []
        training.train_on(model, task, recipe, 0, losses.append)
        assert len(losses) == 2
        assert training.tested(model, task, 10, 0).shape == (10,)
        other = training.tested(model, task, 10, 0)
        assert (training.tested(model, task, 10, 0) == other).all()


def test_a_training_that_diverges_is_one_line() -> None:
    model = training.new_model("gpt2-1l", TASKS["binding"], 0)
    recipe = training.recipe_of("gpt2-1l", 3, 4, None)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="lower --learning-rate"):
        training.train_on(model, TASKS["binding"], recipe, 0, lambda loss: None)


# ---- the verb -------------------------------------------------------------------------------------

FEW: dict[str, Any] = {"steps": 2, "batch_size": 4, "sequences": 50, "quiet": True}


def test_an_interrupted_command_resumes_with_the_training_it_was_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ProbeConfig(run=tmp_path, models=("crate-1l", "gpt2-1l"), seeds=2, **FEW)
    real, begun = verb.train_on, []

    def stops(model: Any, task: Any, *rest: Any) -> None:
        begun.append(task.name)
        if len(begun) == 4:
            raise KeyboardInterrupt
        real(model, task, *rest)

    monkeypatch.setattr(verb, "train_on", stops)
    with pytest.raises(KeyboardInterrupt):
        verb.probe(config)
    assert Run(tmp_path).models("probes") == []
    found = verb.probe(config)
    assert begun == ["binding"] * 2 + ["induction"] * 2 + ["induction"] + ["binding"] * 2 + ["induction"] * 2  # fmt: skip
    assert [s.model for s in found.models] == ["crate-1l", "gpt2-1l"]
    stored = read_summary(tmp_path / "probes" / "crate-1l")
    assert stored == found.models[0]
    assert [(t.task, t.seed) for t in stored.trainings] == [("binding", 0), ("binding", 1), ("induction", 0), ("induction", 1)]  # fmt: skip
    for of in stored.tasks:
        seeds = [t.accuracy for t in stored.trainings if t.task == of.task]
        assert of.accuracy.value == pytest.approx(np.mean(seeds))
        assert of.accuracy.n == 2
        assert of.accuracy.low is not None
    again = verb.probe(config)  # everything is finished
    assert len(begun) == 9
    assert again.table == found.table
    assert not [p for p in tmp_path.rglob("*") if p.name == "trainings"]
    with pytest.raises(InputError, match="steps=2, now 3"):
        verb.probe(ProbeConfig(run=tmp_path, models=("gpt2-1l",), seeds=2, **{**FEW, "steps": 3}))


def test_names_of_models() -> None:
    assert verb.model_names(("crate", "gpt2-solu-1l")) == ["crate-2l", "gpt2-solu-1l"]
    every = verb.model_names(())
    assert len(every) == len(FAMILIES) - 1  # gpt2-relu is gpt2
    assert "gpt2-relu-2l" not in every


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--models", "crat"), "did you mean crate?"),
        (("--models", "crate", "crate-2l"), "name each model once"),
        (("--models", "crate", "crate"), "name each once"),
        (("--tasks",), "--tasks is empty"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--seeds", "0"), "--seeds must be at least 1"),
        (("--learning-rate", "0"), "must be above 0"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--run", str(tmp_path / "run"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_damaged_summary_is_one_line(tmp_path: Path) -> None:
    verb.probe(ProbeConfig(run=tmp_path, models=("crate-1l",), tasks=("binding",), **FEW))
    folder = tmp_path / "probes" / "crate-1l"
    record = json.loads((folder / "summary.json").read_text())
    record["later"] = 1  # of a later version
    (folder / "summary.json").write_text(json.dumps(record))
    with pytest.raises(InputError) as error:  # its hash is another one
        read_summary(folder)
    assert "\n" not in str(error.value)
