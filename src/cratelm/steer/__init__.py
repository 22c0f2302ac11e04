"""Steering: neurons edited while a model runs, and what that does to its output."""

from cratelm.steer.config import Edit, Positions

__all__ = ["Edit", "Positions"]
