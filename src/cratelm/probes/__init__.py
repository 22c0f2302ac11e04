"""Synthetic tasks that show what an architecture can do: models are trained on them, and tested on fresh sequences."""
