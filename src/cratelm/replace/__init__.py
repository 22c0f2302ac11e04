"""Models that run on the explanations of their neurons."""
