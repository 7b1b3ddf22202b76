"""Access to parts of audio files: bytes by position in bounded memory, and pieces that behave like separate files."""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, BinaryIO

BLOCK_BYTES = 2**18


class DamagedError(ValueError):
    """A file is incomplete, or the length of its audio is unknown; the message says which, as in "is cut off"."""


class Remark(StrEnum):
    """Oddities of files that could be read nevertheless, as the user is told of them."""

    NO_END_MARK = "without an end mark (recorded by a program that was stopped, or cut between two pages)"
    STARTS_INSIDE = "beginning inside an MP3 frame"
    LENGTH_UNKNOWN = "with a header that does not know the length: read to the end"
    JOINED = "made of several files joined together, all of them read"
    CLAMPED = "with an end a few samples behind their recording: taken to its end"


@dataclass(frozen=True)
class Piece:
    """A part of a file that libsndfile reads as one file: `head`, the file's bytes from `begin` to `end`, `tail`."""

    begin: int
    end: int
    head: bytes = b""
    tail: bytes = b""
    remark: Remark | None = None
    num_samples: int | None = None  # per channel, if it is known and libsndfile might guess it wrong
    # If libsndfile cannot seek exactly: maps a sample to the piece to read in full from its start, and to the number of
    # samples of that piece before it.
    piece_at: "Callable[[int], tuple[Piece, int]] | None" = None


class Window:
    """Random access to the bytes of a file, a block in memory at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        self._begin, self._block = 0, b""

    def at(self, position: int, count: int) -> bytes:
        """Return `count` bytes from a position on; fewer at the end of the file, none before its start."""
        offset = position - self._begin
        if offset >= 0 and offset + count <= len(self._block):
            return self._block[offset : offset + count]
        if position < 0 or position >= self.size:
            return b""
        self._file.seek(position)
        self._begin, self._block = position, self._file.read(max(BLOCK_BYTES, count))
        return self._block[:count]

    def find_all(self, pattern: bytes, begin: int, end: int) -> Iterator[int]:
        """Yield every position of a pattern between `begin` and `end`, in ascending order."""
        for position in range(begin, end, BLOCK_BYTES):
            # Blocks overlap as far as a pattern may reach into the next one.
            block = self.at(position, min(BLOCK_BYTES + len(pattern) - 1, end - position))
            found = block.find(pattern)
            while found >= 0:
                yield position + found
                found = block.find(pattern, found + 1)


class PartFile(io.RawIOBase):
    """Base class of parts of a file that behave like files of `_size` bytes; subclasses add `readinto`."""

    _size: int
    _position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position


class PieceFile(PartFile):
    """A piece as a file object, to be wrapped in `io.BufferedReader`."""

    def __init__(self, file: BinaryIO, piece: Piece) -> None:
        self._file, self._piece = file, piece
        self._size = len(piece.head) + piece.end - piece.begin + len(piece.tail)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        inner = self._position - len(self._piece.head)
        length = self._piece.end - self._piece.begin
        if inner < 0:
            content = self._piece.head[self._position : self._position + len(view)]
        elif inner < length:
            self._file.seek(self._piece.begin + inner)
            content = self._file.read(min(len(view), length - inner))
        else:
            content = self._piece.tail[inner - length : inner - length + len(view)]
        count = len(content)
        view[:count] = content
        self._position += count
        return count
