"""Tokens: tokenizers, and documents as token shards with their borders and splits."""
