"""The finding of a run in one sentence, its figures, and its picture."""

from dataclasses import replace
from typing import Any

import pytest
from viewer_runs import Parsed

from cratelm.records import Interval
from cratelm.replace.store import ReplacementRow
from cratelm.results.finding import finding
from cratelm.results.views import MetricCard, ModelCard, RunCard
from cratelm.viewer.finding_drawing import finding_picture


def metric(mean: float | None, look_up: float | None = None, name: str = "top_and_random") -> MetricCard:  # fmt: skip
    def around(value: float | None) -> Interval | None:
        return None if value is None else Interval(value, value - 1, value + 1)

    return MetricCard(name, around(mean), {}, None, 10, 0, 0, 0, around(look_up))


def model(name: str, *metrics: MetricCard, null_of: str = "", **fields: Any) -> ModelCard:
    family = "crate" if name.startswith("crate-") else "gpt2" if name.startswith("gpt2-") else ""
    return ModelCard(name, family, "", {0: 4}, null_of, None, None, None, "trie" if metrics else "", metrics, {}, {}, (), **fields)  # fmt: skip


def run(*models: ModelCard) -> RunCard:
    return RunCard("run", "runs/run", models, ())


TWINS = (
    model("crate-2l", metric(78.7, 78.5)),
    model("gpt2-2l", metric(68.5, 68.0)),
    model("crate-2l-init", metric(59.5), null_of="crate-2l"),
    model("gpt2-2l-init", metric(58.0), null_of="gpt2-2l"),
)


def losses(true: float, replaced: float, mean: float) -> ReplacementRow:
    def around(value: float) -> Interval:
        return Interval(value, value - 0.1, value + 0.1)

    of_true, of_replaced, of_mean = map(around, (true, replaced, mean))
    return ReplacementRow(
        explainer="trie", layers="all", control="none", loss_true=of_true, loss_mean=of_mean, loss_zero=of_mean,
        loss_replaced=of_replaced, nats_lost=around(replaced - true), carried=around(mean - true),
        carried_zero=around(mean - true), given_back=around(mean - replaced), recovered_mean=None,
        recovered_unigram=None,
    )  # fmt: skip


def with_losses(**rows: ReplacementRow) -> tuple[ModelCard, ...]:
    """The twins with rows by family."""
    return tuple(replace(m, replaced=None if m.null_of else rows.get(m.family)) for m in TWINS)


def test_scores_of_twins_with_their_references() -> None:
    found = finding(run(*TWINS))
    assert found is not None
    assert found.sentence == (
        "CRATE's neurons are explained better than GPT-2's: a score of 78.7 against 68.5; untrained, they reach 59.5"
        " and 58.0; a look-up of the last token alone reaches 78.5 and 68.0."
    )
    assert [(s.model, s.place) for s in found.scores] == [("crate-2l", 0), ("gpt2-2l", 1)]
    assert (found.metric, found.explainer) == ("top_and_random", "trie")


@pytest.mark.parametrize(
    ("crate", "words"),
    [
        (60.0, "worse than"),
        (68.0, "about as well as"),
        (69.0, "about as well as"),
        (70.6, "better than"),
    ],
)
def test_neither_is_called_better_where_the_intervals_overlap(crate: float, words: str) -> None:
    found = finding(run(model("crate-2l", metric(crate)), TWINS[1]))
    assert found is not None
    assert f"explained {words} GPT-2's" in found.sentence
    assert "untrained" not in found.sentence
    assert "look-up" not in found.sentence  # not known for both


def test_losses_come_before_scores() -> None:
    rows = {"crate": losses(3.774, 4.31, 10.65), "gpt2": losses(3.51, 4.36, 12.18)}
    found = finding(run(*with_losses(**rows)))
    assert found is not None
    assert found.sentence == (
        "On their explanations CRATE reaches a loss of 4.31 (3.77 without) and GPT-2 4.36 (3.51 without);"
        " the codes carry 6.88 and 8.67 nats, the explanations give back 6.34 and 7.82 of them."
    )
    assert not found.scores
    one = finding(run(*with_losses(gpt2=rows["gpt2"])))
    assert one is not None
    assert one.sentence.startswith(
        "On its explanations GPT-2 reaches a loss of 4.36 (3.51 without)"
    )
    assert one.sentence.endswith(
        "the codes carry 8.67 nats, the explanations give back 7.82 of it."
    )
    assert [row.place for row in one.losses] == [1]  # the colour that it has in the table


def test_one_model_several_models_and_none() -> None:
    one = finding(run(TWINS[0], TWINS[2]))
    assert one is not None
    assert one.sentence == (
        "The neurons of CRATE are explained with a score of 78.7; untrained, they reach 59.5; a look-up of the last"
        " token alone reaches 78.5."
    )
    others = [model(f"pythia-{n}", metric(50.0 + n)) for n in range(5)]
    several = finding(run(*others))
    assert several is not None
    assert several.sentence == (
        "The neurons of pythia-0, pythia-1 and pythia-2 are explained with scores of 50.0, 51.0 and 52.0."
    )
    assert len(several.scores) == 5
    assert finding(run(model("crate-2l"))) is None
    assert finding(run(model("crate-2l", metric(None)))) is None
    assert finding(run()) is None


def test_twins_are_named_by_model_where_families_are_ambiguous() -> None:
    more = (model("crate-4l", metric(80.0)), *TWINS)
    found = finding(run(*more))
    assert found is not None
    assert found.sentence.startswith(
        "crate-2l's neurons are explained better than GPT-2's: a score of 78.7"
    )


def test_models_whose_results_are_stale_are_left_out() -> None:
    def stale(card: ModelCard, *stages: str) -> ModelCard:
        return replace(card, stale=("outdated",), stale_stages=tuple(f"{s}/{card.name}" for s in stages))  # fmt: skip

    found = finding(run(stale(TWINS[0], "scores"), *TWINS[1:]))
    assert found is not None
    assert [s.model for s in found.scores] == ["gpt2-2l"]
    assert found.sentence.startswith("The neurons of GPT-2")
    found = finding(run(TWINS[0], stale(TWINS[2], "scores")))
    assert found is not None
    assert "untrained" not in found.sentence
    other = run(stale(TWINS[0], "analysis", "replacement"), *TWINS[1:])
    assert finding(other) == finding(run(*TWINS))  # what is stale is not what is shown
    both = with_losses(crate=losses(3.77, 4.31, 10.65), gpt2=losses(3.51, 4.36, 12.18))
    found = finding(run(stale(both[0], "analysis", "replacement"), *both[1:]))
    assert found is not None
    assert [row.model for row in found.losses] == ["gpt2-2l"]


def test_scores_of_a_language_model_alone_have_other_metrics() -> None:
    found = finding(run(model("crate-2l", metric(71.0, name="detection"))))
    assert found is not None
    assert found.metric == "detection"


def test_pictures_show_every_figure_and_say_it_in_words() -> None:
    rows = {"crate": losses(3.77, 4.31, 10.65), "gpt2": losses(3.51, 4.36, 12.18)}
    found = finding(run(*with_losses(**rows)))
    assert found is not None
    drawn = Parsed(finding_picture(found))
    label = next(a["aria-label"] for tag, a in drawn.tags if tag == "svg")
    assert label == (
        "loss in nats per token. CRATE: 3.77 with its own codes, 4.31 on its explanations, 10.65 with codes at their"
        " means; GPT-2: 3.51 with its own codes, 4.36 on its explanations, 12.18 with codes at their means"
    )
    for figure in ("3.77", "4.31", "10.65", "3.51", "4.36", "12.18"):
        assert figure in drawn.words
    dots = [float((a["cx"] or "").rstrip("%")) for _, a in drawn.tags if a.get("class") == "own"]
    ticks = [float((a["x1"] or "").rstrip("%")) for _, a in drawn.tags if a.get("class") == "mark" and a["x1"] == a["x2"]]  # fmt: skip
    assert dots[1] < dots[0] < ticks[0] < ticks[1] == 94  # places are in the order of the losses
    share = (dots[0] - dots[1]) / (ticks[1] - dots[1])
    assert share == pytest.approx((3.77 - 3.51) / (12.18 - 3.51), abs=2e-3)
    found = finding(run(*TWINS))
    assert found is not None
    drawn = Parsed(finding_picture(found))
    label = next(a["aria-label"] for tag, a in drawn.tags if tag == "svg")
    assert label == (
        "mean scores × 100. CRATE: 78.7, untrained 59.5, look-up of the last token 78.5;"
        " GPT-2: 68.5, untrained 58.0, look-up of the last token 68.0"
    )
    assert not any("style" in a for _, a in drawn.tags)  # the pages' policy forbids it


def test_a_name_is_escaped() -> None:
    found = finding(run(model("<b>x", metric(50.0))))
    assert found is not None
    assert "<b>" not in finding_picture(found)


def test_variants_have_their_own_names():
    """Only the plain models are called CRATE and GPT-2."""
    from cratelm.runs.names import is_variant

    assert [is_variant(n) for n in ("crate-2l", "gpt2-12l", "crate-2l-seed1", "elsewhere")] == [False] * 4  # fmt: skip
    assert all(is_variant(n) for n in ("crate-tssa-2l", "gpt2-solu-1l", "gpt2-topk-2l-seed1"))
