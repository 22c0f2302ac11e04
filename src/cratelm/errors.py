"""The one error a user is meant to read."""


class InputError(ValueError):
    """A user's mistake, told in one line: what was found, what was expected, what to type next.

    The command line prints the message alone and exits with status 2; from Python it is an
    ordinary `ValueError`.
    """


class BudgetReached(Exception):
    """A limit that the user set was reached: all is kept, and the same command goes on later.

    The command line prints the message alone and exits with status 3.
    """
