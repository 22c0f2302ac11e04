"""EleutherAI's lm-eval on our models.

    python -m cratelm.interop.lm_eval run --model hf --model_args pretrained=FOLDER --tasks TASKS

is `lm_eval` itself, with CRATE known to `transformers`; it takes all of its options. A folder written
by `cratelm export model` needs no more than plain `lm_eval` and trust_remote_code=True.
"""

import importlib.util
import sys

from cratelm.errors import InputError, missing_extra


def main() -> None:
    """Runs lm-eval's own command line. Raises `InputError` where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("lm-eval", "this command", "lm-eval")
    from lm_eval.__main__ import cli_evaluate

    import cratelm.models  # noqa: F401 (registers CRATE with the Auto classes)

    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"lm_eval: {error}", file=sys.stderr)
        sys.exit(2)
