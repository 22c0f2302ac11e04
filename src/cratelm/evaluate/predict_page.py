"""The page of `cratelm predict`: opens from disk, loads nothing, everything in it escaped."""

import bisect
from collections.abc import Sequence
from importlib import resources

import jinja2

from cratelm.evaluate.predict import Prediction, Text
from cratelm.text.display import laid_out, visible

LEVELS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.9)
"""least probability of each shade from 1 on; below the first a token has none"""


def level(probability: float) -> int:
    """Shade of a token, 0 to 7: steps of about 3, for probabilities span orders of magnitude."""
    return bisect.bisect_right(LEVELS, probability)


def percent(probability: float) -> str:
    """As people read it: 38%, 2.1%, 0.03%."""
    share = 100 * probability
    return "<0.01%" if share < 0.01 else f"{share:.{2 if share < 1 else 1 if share < 10 else 0}f}%"


def page(text: Text, predictions: Sequence[Prediction]) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        visible=visible, laid_out=laid_out, level=level, percent=percent, width=_width
    )
    template = resources.files("cratelm.evaluate") / "predict.html.j2"
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        title=f"Next-token predictions of {_listed([p.model for p in predictions])}",
        text=text,
        predictions=predictions,
        groups=_groups(predictions),
        levels=LEVELS,
    )


def _groups(predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """Models that read the text in the same tokens stand together: their places are the same."""
    groups: dict[tuple[str, ...], list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(tuple(s.token for s in prediction.steps), []).append(prediction)
    return list(groups.values())


def _width(probability: float) -> str:
    return f"{100 * probability:.1f}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
