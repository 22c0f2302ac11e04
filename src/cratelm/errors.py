"""Errors whose one-line messages are meant for the user."""


class InputError(ValueError):
    """A mistake in the input. The message says what was found, what was expected, what to type next.

    The command line prints only this one-line message and exits with status 2; in Python it is an
    ordinary `ValueError`.

    The message repeats what was given, such as a path with a line break. Characters that are not
    printed stand in it as their codes (`\\n`), so that it is one line wherever it is shown.
    """

    def __init__(self, *args: object):
        super().__init__(*(in_one_line(arg) if isinstance(arg, str) else arg for arg in args))


class StorageError(OSError, InputError):
    """A fault of the disk or of a path, such as a full disk or a missing permission, said in one line.

    It is an `InputError`, because the user can mend it, and an `OSError` with the system's `errno`.
    """

    def __str__(self) -> str:
        return str(self.strerror)


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


def in_one_line(text: str) -> str:
    """Return `text` with every character that is not printed as its code, such as `\\n` or `\\x1b`."""
    if text.isprintable():  # nearly all texts: the loop below takes 10 times as long
        return text
    # `isprintable` is False for the categories Cc, Cf, Cs, Co, Cn, Zl, Zp and every space but " ".
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the message of an error of a library on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
