"""How a command ends when it cannot do what was asked."""

from __future__ import annotations


class Failure(Exception):
    """A command ends with this line on standard error and this exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.message, self.code = message, code


class UsageError(Failure):
    """The command line itself is wrong; the user is pointed to the help text."""
