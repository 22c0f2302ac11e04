"""Sparse autoencoders on the activations of a model: trained and measured, with SAELens."""
