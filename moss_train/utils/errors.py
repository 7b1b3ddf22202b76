"""Exceptions that are no bugs: something has to be changed at the keyboard, or the machine was taken away."""


class UserError(ValueError):
    """Report input or configuration that the user has to change.

    The command line prints the message as one line and exits with status 2, without a traceback. A message says what is
    wrong, where (path, line, or configuration key with its value) and what to do about it.
    """


class PreemptedError(Exception):
    """The run was told by a signal to make room and has written a checkpoint; the exit status is 128 + the signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
