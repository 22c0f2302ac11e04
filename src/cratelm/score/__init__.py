"""Score explanations on held-out excerpts, with null controls."""
