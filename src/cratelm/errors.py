"""Errors whose one-line messages are meant for the user."""


class InputError(ValueError):
    """A mistake in the input. The message says what was found, what was expected, what to type next.

    The command line prints only this one-line message and exits with status 2; in Python it is an
    ordinary `ValueError`.
    """


class BudgetReached(Exception):
    """A limit set by the user was reached: all results are kept, and the same command resumes later.

    The command line prints only the message and exits with status 3.
    """


def missing_extra(extra: str, feature: str, package: str, otherwise: str = "") -> InputError:
    """Return the error for a feature whose optional package is not installed.

    `extra` is the extra of `pyproject.toml` that installs `package`; `feature` begins the message, and
    `otherwise` ends it with an alternative that does not need the package.
    """
    return InputError(
        f"{feature} needs the package {package}, which is not installed: type"
        f" `pip install '.[{extra}]'` in the clone of cratelm{otherwise}"
    )
