"""Evaluation: loss, perplexity, bits per byte and accuracy of a model on a run's tokens."""
