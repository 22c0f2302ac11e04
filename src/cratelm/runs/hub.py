"""The Hub's client without its messages about retries: without a network it prints six lines for each file."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Hide what huggingface_hub logs below errors, while open; errors are raised all the same."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
