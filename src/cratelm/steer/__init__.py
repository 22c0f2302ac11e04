"""Steering: edit neurons while a model runs, and measure their effect on its output.

`steering` makes the edits, `steer` shows the effect of edits on one text, `effects` measures the effect of
single neurons on logits and loss, and `intervene` asks a language model whether steering changes texts as
explanations say.
"""

from cratelm.steer.edits import Edit, Positions

__all__ = ["Edit", "Positions"]
