"""Data that cannot be used: what kind of fault it is, and the sentence about it, as separate fields."""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from moss_train.utils.errors import UserError


class Fault(StrEnum):
    """Kinds of bad samples, as they are counted in logs, summaries and checkpoints."""

    MISSING_FILE = "missing file"
    SPECIAL_FILE = "special file"  # a pipe, a device, a link into nowhere
    REPEATED_ID = "repeated id"
    LINE = "line"  # of a manifest
    TAR_HEADER = "tar header"
    FILE = "file"  # the system could not read it
    JSON = "JSON"
    TEXT = "text"
    VALUES = "values"  # NaN, infinity, far above full scale
    INDEX = "index"  # not what the index says
    AUDIO = "audio"  # not audio, cut off, damaged
    LENGTH = "length"  # its headers do not tell how much audio there is
    OTHER = "other"


class SampleError(UserError):
    """One file, clip or line cannot be used; the others can."""

    def __init__(self, fault: Fault, reason: str, clip_id: str = "") -> None:
        super().__init__(fault, reason, clip_id)  # all of them, so that a worker process can send the error
        self.fault = fault
        self.reason = reason
        self.clip_id = clip_id

    def __str__(self) -> str:
        return self.reason


class BadSample(NamedTuple):
    """A clip, file or line that was left out."""

    name: str  # id of the clip, or place of the line
    reason: str
    fault: Fault = Fault.OTHER


def fault_of(error: Exception) -> Fault:
    """Return the kind of fault that an exception stands for."""
    if isinstance(error, SampleError):
        return error.fault
    return Fault.FILE if isinstance(error, OSError) else Fault.OTHER


def count_faults(bad: Iterable[BadSample]) -> str:
    """Return how many there are of every kind as text, the most frequent first: "3 audio, 1 line"."""
    return ", ".join(f"{count} {fault}" for fault, count in Counter(item.fault for item in bad).most_common())
