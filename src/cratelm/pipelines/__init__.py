"""Pipelines: several verbs in one command."""
