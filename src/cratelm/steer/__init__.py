"""Steering: edit neurons while a model runs, and measure what they do to its output.

`steering` edits, `steer` shows one edit on one text, `effects` measures what single neurons do to logits and
loss, `intervene` asks a language model whether steering changes texts as explanations say.
"""

from cratelm.steer.edits import Edit, Positions

__all__ = ["Edit", "Positions"]
