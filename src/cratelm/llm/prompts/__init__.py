"""Prompts: what language models are asked, word for word."""
