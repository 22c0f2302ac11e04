"""Backends: a local transformers model, or an OpenAI-compatible server."""
