"""Harvest: one pass over tokens -> excerpts and statistics of every neuron, in bounded memory."""
