"""Evaluation: loss, perplexity, bits per byte and accuracy of models; their predictions side by side."""
