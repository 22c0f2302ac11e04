"""Statistics shared by the rooms: intervals, ratios, scores by layer; pure NumPy and SciPy."""
