"""Reports and pages without their figures, for tests of something else: nearly all of a report's time is drawing."""

from pathlib import Path

import pytest
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas

from cratelm.report import drawing
from cratelm.report.drawing import Figure, Panel


def leave_out_drawing(patch: pytest.MonkeyPatch) -> None:
    """Make files of figures empty and pages without pictures; the lines and points are still made from the data."""

    def write(self: Figure, folder: Path) -> None:
        for kind in ("png", "pdf"):
            (folder / f"{self.name}.{kind}").touch()

    def svg(self: Panel, name: str, label: str) -> Markup:
        drawing._draw(Canvas().subplots(), self)
        return Markup()

    patch.setattr(Figure, "write", write)
    patch.setattr(Panel, "svg", svg)
    patch.setattr(Figure, "_swatch", lambda self, number, series: Markup())
