"""The one exception class that means: the person at the keyboard has to change something."""


class UserError(ValueError):
    """Report input or configuration that the user has to change.

    The command line prints the message as one line and exits with status 2, without a traceback. A message says what is
    wrong, where (path, line, or configuration key with its value) and what to do about it.
    """
