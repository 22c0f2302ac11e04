"""The search of a learning rate: what is best, what lies at an edge, what diverges, and training with the result."""

from pathlib import Path
from typing import Any

import pytest
from test_train import SMALL, make_run, one_thread  # noqa: F401 (a fixture)

import cratelm.train.tune as verb
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.runs import Run
from cratelm.train.config import TrainConfig
from cratelm.train.loop import DivergedError, train
from cratelm.train.tune_config import TuneConfig
from cratelm.train.tuned import read_tuning, with_tuned_rate

SHARED = {
    key: SMALL[key]
    for key in ("batch_size", "sequence_length", "validation_sequences", "model_overrides")
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("tune"))


def faked(monkeypatch: pytest.MonkeyPatch, losses: dict[float, float | None]) -> list[float]:
    """Trainings that give these losses, or diverge; returns the rates in the order of the trainings."""
    rates: list[float] = []

    def figures(config: TrainConfig, folder: Path, label: str) -> dict[str, Any]:
        assert config.learning_rate is not None
        rates.append(config.learning_rate)
        loss = losses[config.learning_rate]
        if loss is None:
            raise DivergedError("the loss is nan")
        return {"validation_loss": loss, "validation_standard_error": 0.1}

    monkeypatch.setattr(verb, "train_briefly", figures)
    return rates


def config(run: Path, name: str, **options: Any) -> TuneConfig:
    fields = {"model": "crate-1l", "steps": 4, "quiet": True, **SHARED}
    return TuneConfig(run=run, name=name, **{**fields, **options})


@pytest.mark.parametrize(
    ("losses", "best", "edge"),
    [
        ({0.1: 4.0, 0.2: 3.0, 0.4: 3.5}, 0.2, ""),
        ({0.1: 2.0, 0.2: 3.0, 0.4: 3.5}, 0.1, "lowest"),
        ({0.1: 4.0, 0.2: 3.0, 0.4: 2.5}, 0.4, "highest"),
        ({0.1: 4.0, 0.2: 3.0, 0.4: None}, 0.2, ""),
        ({0.1: 4.0, 0.2: None, 0.4: None}, 0.1, "lowest"),
    ],
)
def test_the_best_rate_and_whether_it_is_at_an_edge(
    run: Path,
    losses: dict[float, float | None],
    best: float,
    edge: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = faked(monkeypatch, losses)
    found = verb.tune(config(run, "faked", rates=(0.4, 0.1, 0.2), force=True))
    assert rates == [0.1, 0.2, 0.4]
    assert (found.learning_rate, found.edge) == (best, edge)
    assert found.tokens == 3 * 4 * SMALL["batch_size"] * SMALL["sequence_length"]
    assert ("may lie beyond" in str(found)) == bool(edge)
    assert ("diverged" in str(found)) == (None in losses.values())
    assert str(found).count("best\n") <= 1
    if edge == "highest":
        assert "--rates 0.2 0.4 0.8 1.6 --force" in found.advice


def test_all_rates_that_diverge_are_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, {0.5: None, 1.0: None})
    with pytest.raises(InputError, match=r"diverged at every rate, 0\.5, 1: give lower --rates"):
        verb.tune(config(run, "lost", rates=(0.5, 1.0)))
    assert Run(run).stage("tuning", "lost").completion() is None


def test_an_interrupted_search_resumes_with_the_rate_it_was_at(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[float, float | None] = {0.1: 4.0, 0.2: 3.0, 0.4: 3.5}
    rates = faked(monkeypatch, losses)
    working = verb.train_briefly

    def stops(training: TrainConfig, *rest: Any) -> dict[str, Any]:
        if training.learning_rate == 0.4:
            raise KeyboardInterrupt
        return working(training, *rest)

    monkeypatch.setattr(verb, "train_briefly", stops)
    with pytest.raises(KeyboardInterrupt):
        verb.tune(config(run, "stopped", rates=tuple(losses)))
    monkeypatch.setattr(verb, "train_briefly", working)
    verb.tune(config(run, "stopped", rates=tuple(losses)))
    verb.tune(config(run, "stopped", rates=tuple(losses)))  # finished
    assert rates == [0.1, 0.2, 0.4]


def test_rates_around_that_of_the_recipe() -> None:
    muon = TuneConfig(model="crate-2l").all_rates()
    assert muon == (0.00375, 0.0075, 0.015, 0.03, 0.06)
    adamw = TuneConfig(model="sparse-gpt-2l", count=3, factor=3).all_rates()
    assert adamw == (0.001, 0.003, 0.009)


def test_a_search_and_a_training_with_what_it_found(run: Path) -> None:
    """Real trainings: a rate of 0.00001 learns nothing, and one of 0.03 does."""
    options = {"model": "gpt2-1l", "name": "real", "optimizer": "adamw"}
    searched = verb.tune(config(run, **options, steps=12, rates=(1e-5, 0.03)))
    assert searched.learning_rate == 0.03
    losses = [trial.validation_loss for trial in read_tuning(searched.path).trials]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[1] < losses[0] - 3 * searched.validation_standard_error
    same = {**SMALL, "model": "gpt2-1l", "name": "real", "optimizer": "adamw"}
    result = train(TrainConfig(run=run, tuned=True, **same))
    done = Run(run).stage("model", "real").completion()
    assert done is not None
    assert done.config["learning_rate"] == 0.03
    assert "--learning-rate" in done.options
    by_hand = train(TrainConfig(run=run, **{**same, "name": "by-hand"}, learning_rate=0.03))
    # The search used the recipe of the training: with the same steps it ends where the training ends.
    assert by_hand.validation_loss == result.validation_loss == searched.validation_loss
    with pytest.raises(
        InputError, match="a search with optimizer adamw, but the training has muon"
    ):
        with_tuned_rate(TrainConfig(run=run, tuned=True, **{**same, "optimizer": "muon"}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tune", "--rates", "0.1"), "at least two different rates"),
        (("tune", "--rates", "0.1", "0.1"), "at least two different rates"),
        (("tune", "--rates", "0.1", "-1"), "must be above 0"),
        (("tune", "--count", "4"), "must be odd"),
        (("tune", "--factor", "1"), "must be above 1"),
        (("tune", "--steps", "0"), "--steps must be at least 1"),
        (("tune", "--name", "a@b"), "--name"),
        (("train", "--tuned", "--learning-rate", "1e-3"), "cannot be combined"),
        (("train", "--tuned", "--model", "crate-1l"), "type `cratelm tune --run"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
