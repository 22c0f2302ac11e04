"""Every family through the verbs: trained, harvested, explained, scored, replaced, edited, analysed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import SMALL, T, make_run, one_thread  # noqa: F401 (a fixture)

import cratelm
from cratelm.models import FAMILIES, capture, load, site_of
from cratelm.models.partial_forward import PartialForward
from cratelm.runs import Run
from cratelm.score.store import read_scores

NEURONS = 4
"""explained in each layer"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("verbs"))


@pytest.mark.slow  # 4 seconds for each family
@pytest.mark.parametrize("family", FAMILIES)
def test_every_verb_takes_it_as_it_takes_crate(run: Path, family: str) -> None:
    name = f"{family}-2l"
    trained: dict[str, Any] = {**SMALL, "steps": 20}
    cratelm.api.train(run=run, model=name, **trained)
    model: Any = load(run / "model" / name)
    site = site_of(model)
    harvested = cratelm.api.harvest(
        run=run,
        model=name,
        polarity="positive",
        tokens=2000,
        top=10,
        random=10,
        per_bin=4,
        quiet=True,
    )
    assert harvested.neurons == site.n_neurons
    cratelm.api.explain(run=run, model=name, neurons=NEURONS, quiet=True)
    cratelm.api.score(run=run, model=name, quiet=True)
    scores = read_scores(Run(run).stage("scores", name).path)
    values = [s.score.value for s in scores if s.score.value is not None]
    assert len({s.neuron for s in scores}) == 2 * NEURONS
    assert values
    assert all(-1 <= v <= 1 for v in values)
    replaced = cratelm.api.replace(
        run=run, model=name, fit_tokens=2000, tokens=1000, neuron_tokens=64, curve_tokens=500,
        resamples=50, quiet=True,
    )  # fmt: skip
    assert replaced is not None
    cratelm.api.effects(run=run, model=name, neurons=2, tokens=256, positions=4, quiet=True)
    cratelm.api.analyze(run=run, model=name, tokens=500, quiet=True)
    cratelm.api.predict(run=run, models=(name,), text="red river", quiet=True)
    cratelm.api.steer(run=run, model=name, neurons=("0:3",), set=5.0, text="red", generate=4)
    check_partial_passes(model, site)


def check_partial_passes(model: Any, site: Any) -> None:
    """A neuron that is edited by running only the blocks after it gives the logits of a hook."""
    ids = torch.arange(8)[None]
    partial = PartialForward(model, site)
    trace = partial.trace(ids)
    assert np.allclose(partial.plain(trace), model(ids).logits.detach(), atol=1e-4)
    for place in range(site.n_layers):
        size = torch.full((1, 8), float(capture(model, site, ids)[place].abs().max()) + 1)
        row, neuron = torch.tensor([0]), torch.tensor([3])
        found = partial.edited(trace, place, row, neuron, size)
        by_hook = partial._edited_by_hook(trace, place, row, neuron, size, partial._logits)
        assert torch.allclose(found, by_hook, atol=1e-3)
        assert (found - partial.plain(trace)).abs().max() > 0
