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


class ConfigError(UserError):
    """Report one value of a configuration: what kind of mistake it is, at which key, and the value found there.

    Code and tests read the fields; the sentence is made here and nowhere else.

    Attributes:
        kind: "unknown_key", "required", "type" (wrong type), "value" (out of range, not one of the choices),
            "conflict" (with another key), "missing" (a path that does not exist), or "syntax".
        path: dotted place in the configuration, as `stages.0.batch_seconds`.
        value: what stands there; None where nothing does.
        expected: the rest of the sentence: what is wanted, or what to do.
    """

    def __init__(self, kind: str, path: str, value: object = None, expected: str = "") -> None:
        super().__init__(kind, path, value, expected)
        self.kind = kind
        self.path = path
        self.value = value
        self.expected = expected

    def within(self, parent: str) -> "ConfigError":
        """Return the same error with its path below another one."""
        return ConfigError(self.kind, f"{parent}.{self.path}" if self.path else parent, self.value, self.expected)

    def __str__(self) -> str:
        value = self.value
        found = f"{value:g}" if isinstance(value, float) and value.is_integer() and abs(value) < 1e6 else f"{value}"
        found = {"None": "null", "True": "true", "False": "false"}.get(found, found)
        return {
            "unknown_key": f"unknown key {self.path!r}: {self.expected}",
            "required": f"{self.path} is required: {self.expected}",
            "type": f"{self.path}={found} has to be {self.expected}",
            "value": f"{self.path}={found} has to be {self.expected}",
            "conflict": f"{self.path}={found} {self.expected}",
            "missing": f"{self.path}={found} does not exist{self.expected}",
            "syntax": f"{self.path}: {self.expected}",
        }[self.kind]
