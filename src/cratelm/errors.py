"""Errors that a user is meant to read, each one line."""


class InputError(ValueError):
    """A user's mistake, told in one line: what was found, what was expected, what to type next.

    The command line prints the message alone and exits with status 2; from Python it is an
    ordinary `ValueError`.
    """


class BudgetReached(Exception):
    """A limit that the user set was reached: all is kept, and the same command goes on later.

    The command line prints the message alone and exits with status 3.
    """


def missing_extra(extra: str, feature: str, package: str, otherwise: str = "") -> InputError:
    """Return the error for a feature whose optional package is not installed.

    `extra` is the extra of `pyproject.toml` that brings `package`; `feature` opens the sentence, and
    `otherwise` ends it with what can be done without the package.
    """
    return InputError(
        f"{feature} needs the package {package}, which is not installed: type"
        f" `pip install '.[{extra}]'` in the clone of cratelm{otherwise}"
    )
