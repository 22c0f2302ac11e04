"""Steering: neurons edited while a model runs, and what that does to its output."""
