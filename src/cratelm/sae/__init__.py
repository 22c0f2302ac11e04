"""Sparse autoencoders on the activations of a model: training and evaluation with SAELens."""
