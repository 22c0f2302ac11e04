"""Tokens: tokenizers, and documents as token shards with their boundaries and splits."""
