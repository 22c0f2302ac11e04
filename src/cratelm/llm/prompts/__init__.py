"""Prompts: the exact texts that are sent to language models."""
