"""Explain neurons from their excerpts, with or without a language model."""
