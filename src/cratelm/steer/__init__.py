"""Steering: neurons edited while a model runs, and what that does to its output."""

from cratelm.steer.edits import Edit, Positions

__all__ = ["Edit", "Positions"]
