"""The number of inputs that a fuzz test tries: few and always the same by default, `CRATELM_FUZZ` of them if it is set."""

import os

import hypothesis


def settings(few: int) -> hypothesis.settings:
    """Return the settings of a fuzz test that tries `few` inputs by default."""
    return hypothesis.settings(
        max_examples=int(os.environ.get("CRATELM_FUZZ", few)),
        deadline=None,
        derandomize="CRATELM_FUZZ" not in os.environ,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
