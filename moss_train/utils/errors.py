"""Exceptions that are not bugs: mistakes in input or configuration, data that cannot be used, and preemption."""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple


class UserError(ValueError):
    """Report input or configuration that the user has to change.

    The command line prints the message as one line and exits with status 2, without a traceback. A message says what is
    wrong, where (path, line, or configuration key with its value) and what to do about it.
    """


class PreemptedError(Exception):
    """The run was stopped by a signal and has written a checkpoint; the exit status is 128 + the signal's number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class ConfigError(UserError):
    """Report a mistake in one value of a configuration: its kind, the key, and the value found there.

    Code and tests read the attributes; the sentence of the message is made only here.

    Attributes:
        kind: "unknown_key", "required", "type" (wrong type), "value" (out of range, not one of the choices),
            "conflict" (with another key), "missing" (a path that does not exist), or "syntax".
        path: dotted place in the configuration, as `stages.0.batch_seconds`.
        value: the value found there; None if there is none.
        expected: the rest of the sentence: what is wanted, or what to do.
    """

    def __init__(self, kind: str, path: str, value: object = None, expected: str = "") -> None:
        super().__init__(kind, path, value, expected)
        self.kind = kind
        self.path = path
        self.value = value
        self.expected = expected

    def within(self, parent: str) -> "ConfigError":
        """Return the same error with `parent` in front of its path."""
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


class Fault(StrEnum):
    """Kinds of bad samples, as they are counted in logs, summaries and checkpoints."""

    MISSING_FILE = "missing file"
    SPECIAL_FILE = "special file"  # a pipe, a device, a broken link
    REPEATED_ID = "repeated id"
    LINE = "line"  # of a manifest
    TAR_HEADER = "tar header"
    FILE = "file"  # the system could not read it
    JSON = "JSON"
    TEXT = "text"
    VALUES = "values"  # NaN, infinity, far above full scale
    INDEX = "index"  # differs from what the index states
    AUDIO = "audio"  # not audio, cut off, damaged
    LENGTH = "length"  # its headers do not state how much audio there is
    OTHER = "other"


class SampleError(UserError):
    """One file, clip or line cannot be used; the others can."""

    def __init__(self, fault: Fault, reason: str, clip_id: str = "") -> None:
        super().__init__(fault, reason, clip_id)  # all arguments, so that a worker process can pickle it
        self.fault = fault
        self.reason = reason
        self.clip_id = clip_id

    def __str__(self) -> str:
        return self.reason


class InvalidSample(NamedTuple):
    """A clip, file or line that was skipped."""

    name: str  # id of the clip, or place of the line
    reason: str
    fault: Fault = Fault.OTHER


def fault_of(error: Exception) -> Fault:
    """Return the kind of fault that an exception stands for."""
    if isinstance(error, SampleError):
        return error.fault
    return Fault.FILE if isinstance(error, OSError) else Fault.OTHER


def count_faults(bad: Iterable[InvalidSample]) -> str:
    """Return the number of faults of each kind as text, the most frequent first: "3 audio, 1 line"."""
    return ", ".join(f"{count} {fault}" for fault, count in Counter(item.fault for item in bad).most_common())


def first_line(error: BaseException | None) -> str:
    """Return the first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
