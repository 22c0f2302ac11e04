"""White-box reading: what the derivation of CRATE promises, measured."""
