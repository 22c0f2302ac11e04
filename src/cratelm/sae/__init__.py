"""Sparse autoencoders: the authors' files read and kept in an open format."""
