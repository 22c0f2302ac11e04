"""Corpora: documents from built-in sources, files, folders and the Hub."""
