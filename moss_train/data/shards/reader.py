"""Read clips from shards by offset, from local files or the cache of remote ones."""

import io
import os
import tarfile
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from moss_train.audio.io import NamedBytes
from moss_train.audio.window import PartFile
from moss_train.data.shards.index import ClipLocation
from moss_train.data.shards.remote import is_remote, open_shard
from moss_train.utils.errors import Fault, SampleError

SPAN_BYTES = 2**22
"""A clip of at most this size in its tar is read as a whole; of a larger one, only the part that is needed is read."""

GIVEN_UP_SECONDS = 600.0
"""A remote shard that could not be fetched is tried again after this time."""

_OPEN_REMOTE = 8  # few, because an open file takes disk space even after the cache has deleted it


@dataclass(frozen=True)
class _Span:
    """One clip as it lies in its tar, with both headers."""

    location: ClipLocation
    begin: int  # offset in the tar in bytes
    content: bytes


class OpenShard:
    """A file descriptor that is closed once nobody refers to it any more.

    A shard that `ShardFiles` drops may still be read by another thread; a closed descriptor would fail there or, worse,
    be that of another shard by then.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def read(self, size: int, offset: int) -> bytes:
        """Return `size` bytes; fewer if the shard ends. Raises OSError."""
        return os.pread(self.descriptor, size, offset)

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardFiles:
    """Keeps the last few shards open; reads by offset, so threads, and processes after a fork, may share them."""

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._shards: OrderedDict[str, OpenShard] = OrderedDict()
        self._span: _Span | None = None
        self._given_up: dict[str, tuple[float, tuple]] = {}  # remote shard -> time of next try, arguments of the error

    def read(self, location: ClipLocation, offset: int, size: int) -> bytes:
        """Return `size` bytes of a clip or its headers; fewer if the shard ends. Raises OSError or SampleError."""
        span = self._span
        if span is None or span.location is not location:
            return self.open(location).read(size, offset)
        return span.content[offset - span.begin : offset - span.begin + size]

    def open_audio(self, location: ClipLocation) -> BinaryIO:
        """Return the audio of a clip as a file object. Raises OSError or SampleError."""
        name = f"{location.shard} at byte {location.audio_offset}"
        if self.fetch(location) is not None:
            return NamedBytes(self.read(location, location.audio_offset, location.audio_size), name)
        member = _Member(self.open(location), location.audio_offset, location.audio_size, name)
        return io.BufferedReader(member, 2**18)

    def fetch(self, location: ClipLocation) -> "_Span | None":
        """Read a whole clip into memory, where `read` then finds it; return None for a clip above SPAN_BYTES."""
        span = self._span
        if span is not None and span.location is location:
            return span
        begin = min(location.audio_offset, location.json_offset) - tarfile.BLOCKSIZE
        end = max(location.audio_offset + location.audio_size, location.json_offset + location.json_size)
        self._span = span = None
        if begin >= 0 and end - begin <= SPAN_BYTES:
            self._span = span = _Span(location, begin, self.open(location).read(end - begin, begin))
        return span

    def open(self, location: ClipLocation) -> OpenShard:
        """Return a clip's shard, open. Raises OSError, or SampleError for a shard of the wrong size."""
        path = location.shard
        shard = self._shards.get(path)
        if shard is None:
            remote = is_remote(path)
            if not remote:
                shard = OpenShard(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                found = os.fstat(shard.descriptor).st_size
                if found != location.shard_bytes:
                    raise SampleError(Fault.INDEX, f"{path} has {found} bytes, the index says {location.shard_bytes}")
            elif time.monotonic() < self._given_up.get(path, (0.0, ()))[0]:
                raise OSError(*self._given_up[path][1])  # no new attempt for each of its clips
            else:
                try:
                    shard = OpenShard(open_shard(path, location.shard_bytes, location.shard_sha256))
                except OSError as error:
                    self._given_up[path] = (time.monotonic() + GIVEN_UP_SECONDS, error.args)
                    raise
            shard = self._shards.setdefault(path, shard)  # of several threads that open it, one stays
            if len(self._shards) > (min(self._capacity, _OPEN_REMOTE) if remote else self._capacity):
                self._shards.popitem(last=False)
        with suppress(KeyError):  # another thread has dropped it
            self._shards.move_to_end(path)
        return shard

    def close(self) -> None:
        """Close every file that nobody is reading from."""
        self._shards.clear()

    def __getstate__(self) -> dict:
        return {"_capacity": self._capacity, "_shards": OrderedDict(), "_span": None, "_given_up": {}}


class _Member(PartFile):
    """One member of a tar as a file object."""

    def __init__(self, shard: OpenShard, offset: int, size: int, name: str) -> None:
        self._shard, self._offset, self._size = shard, offset, size
        self.name = name

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        count = os.preadv(self._shard.descriptor, [view], self._offset + self._position)
        self._position += count
        return count
