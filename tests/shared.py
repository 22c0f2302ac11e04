"""Where the shared oracle data lie; tests that need them skip with a reason where they are absent."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("CRATELM_SHARED") or Path(__file__).parents[2] / "shared")

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"shared data not found at {SHARED}: set CRATELM_SHARED"
)
