"""How many inputs a fuzz test tries: a few in CI, always the same; `CRATELM_FUZZ=10000` others, and more."""

import os

import hypothesis
from hypothesis import HealthCheck


def settings(few: int) -> hypothesis.settings:
    """Settings of a fuzz test that tries `few` inputs in CI."""
    return hypothesis.settings(
        max_examples=int(os.environ.get("CRATELM_FUZZ", few)),
        deadline=None,
        derandomize="CRATELM_FUZZ" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
