"""Audit of metrics: the published known answers, and changed explanations of a run."""

import pytest

from cratelm.score.audit import CHANGES, METRICS, RATES, passes, planted_audit, table


@pytest.fixture(scope="module")
def audits():
    return planted_audit(n_tokens=100_000, trials=10)


def test_metrics_pass_and_fail_as_published(audits):
    """Oikarinen, Yan & Weng 2025: which metrics notice missing and extra labels."""
    expected = {
        "correlation": (True, True),
        "cosine": (True, True),
        "average precision": (True, True),
        "F1": (True, True),
        "IoU": (True, True),
        "AUC": (True, False),
        "recall": (True, False),
        "precision": (False, True),
        "top and random": (True, False),
    }
    found = {m: tuple(passes(audits, m, change) for change in CHANGES) for m in METRICS}
    assert found == expected


def test_auc_misses_extra_labels_where_few_tokens_are_active(audits):
    noticed = {a.rate: a.noticed for a in audits if a.metric == "AUC" and a.change == "extra"}
    assert noticed[0.1] == noticed[0.01] == 1
    assert noticed[0.001] == noticed[0.0001] == 0


def test_top_and_random_misses_extra_labels_as_often_as_published():
    """Shares of trials in which it falls: .93, .20, .023 and .002 at rates of .1, .01, .001 and .0001."""
    audits = planted_audit(n_tokens=20_000, trials=400, seed=1, metrics=["top and random"])
    noticed = {
        a.rate: a.noticed for a in audits if a.metric == "top and random" and a.change == "extra"
    }
    assert noticed[0.1] == pytest.approx(0.93, abs=0.05)
    assert noticed[0.01] == pytest.approx(0.20, abs=0.07)
    assert noticed[0.001] == pytest.approx(0.023, abs=0.025)
    assert noticed[0.0001] == pytest.approx(0.002, abs=0.01)


def test_the_table_has_a_row_per_metric_and_change(audits):
    lines = table(audits)
    assert len(lines) == 1 + 2 * len(METRICS)
    assert lines[0].split() == ["metric", "change", *(f"{r:g}" for r in RATES), "passes"]
    assert next(line for line in lines if line.startswith("precision")).endswith("no")
