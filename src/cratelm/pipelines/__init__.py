"""Pipelines: run several stages with one command."""
