"""Run EleutherAI's lm-eval on CRATE models.

    python -m cratelm.interop.lm_eval run --model hf --model_args pretrained=FOLDER --tasks TASKS

runs `lm_eval` with CRATE registered in `transformers`, and accepts all options of `lm_eval`. For a folder written
by `cratelm export model`, plain `lm_eval` with trust_remote_code=True is sufficient.
"""

import importlib.util
import sys

from cratelm.errors import InputError, missing_extra


def main() -> None:
    """Run the command line of lm-eval. Raises `InputError` if lm-eval is not installed."""
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
