"""White-box analysis: measure on held-out text what the derivation of CRATE promises."""
