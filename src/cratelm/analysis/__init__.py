"""White-box analysis: measure on held-out text the properties that the derivation of CRATE predicts."""
