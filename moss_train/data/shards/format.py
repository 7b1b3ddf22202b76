"""The shard format: webdataset tars of `<key>.flac` and `<key>.json`, and an index entry for each.

The index is always made by reading a finished tar, never from what was meant to be written.
"""

import json
import os
import re
import tarfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from moss_train.utils.errors import UserError
from moss_train.utils.files import add_path_to_error, parse_json, sha256_of

FORMAT_VERSION = 1

DOMAIN_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Pattern of domain names, which are part of the file names of shards."""

SAMPLE_ARRAYS = {
    "num_samples": np.dtype(np.int64),  # length of the clip, per channel
    "has_text": np.dtype(np.bool_),
    "audio_offset": np.dtype(np.int64),  # bytes from the start of the tar
    "audio_size": np.dtype(np.int64),
    "json_offset": np.dtype(np.int64),
    "json_size": np.dtype(np.int64),
    "json_crc32": np.dtype(np.uint32),  # FLAC has checksums of its own
}
"""What the index stores per clip of a shard, in the order of the tar."""

MAX_LABEL_BYTES = 2**20
"""Largest JSON of one clip; `pack` writes none that comes near it."""

LATER_ARRAYS = frozenset({"json_crc32"})
"""Arrays that folders of earlier versions lack."""


@dataclass(frozen=True)
class EncodedClip:
    """A clip as it is stored."""

    id: str
    flac: bytes
    num_samples: int
    remarks: tuple[str, ...] = ()  # what is worth reporting about it


@dataclass(frozen=True)
class ShardContents:
    """Content of one finished shard."""

    arrays: dict[str, np.ndarray]  # as in SAMPLE_ARRAYS, each [clips]
    labels: tuple[dict, ...]  # the JSON of every clip
    num_bytes: int
    sha256: str


class ShardWriter:
    """Writes one shard; the same clips give the same bytes."""

    def __init__(self, path: Path, sampling_rate: int) -> None:
        self.path = path
        self._sampling_rate = sampling_rate
        self._file = path.open("xb")
        self._tar = TarWriter(self._file, compress=False, encoder=False, mtime=0, user="", group="")
        self.num_bytes = 0
        self.num_clips = 0

    def write(self, key: str, clip: EncodedClip, labels: dict) -> None:
        """Append one clip; its JSON holds the labels together with id, length and rate."""
        facts = {"id": clip.id, "num_samples": clip.num_samples, "sampling_rate": self._sampling_rate}
        text = json.dumps(labels | facts, ensure_ascii=False, sort_keys=True).encode()
        with add_path_to_error(self.path):
            self.num_bytes += self._tar.write({"__key__": key, "flac": clip.flac, "json": text})
        self.num_clips += 1

    def close(self) -> None:
        """Finish the tar and sync it to disk."""
        with add_path_to_error(self.path):
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        """Close a shard that will not be finished; errors are ignored: a full disk has no room for its end either."""
        for part in (self._tar, self._file):
            with suppress(OSError):
                part.close()


def read_shard(path: Path, sampling_rate: int) -> ShardContents:
    """Read a finished shard's headers and JSON. Raises UserError for members that do not pair up as clips."""
    rows, labels = [], []
    try:
        with tarfile.open(path, "r:") as tar:
            members = iter(tar)
            for audio in members:
                text = next(members, None)
                key = audio.name.removesuffix(".flac")
                if text is None or audio.name != f"{key}.flac" or text.name != f"{key}.json":
                    raise ValueError(f"{audio.name} is not a <key>.flac followed by its <key>.json")
                file = tar.extractfile(text) if audio.isreg() and text.isreg() else None
                if file is None:
                    raise ValueError(f"{audio.name} or {text.name} is not a file, but a link, folder or device")
                if text.size > MAX_LABEL_BYTES:
                    raise ValueError(f"{text.name} has {text.size} bytes, more than {MAX_LABEL_BYTES}")
                raw = file.read()
                content = parse_json(raw, text.name)
                if not isinstance(content, dict) or not isinstance(content.get("num_samples"), int):
                    raise ValueError(f"{text.name} does not describe a clip")
                if content.get("sampling_rate") != sampling_rate:
                    raise ValueError(f"{audio.name} is at {content.get('sampling_rate')} Hz, not {sampling_rate}")
                offsets = (audio.offset_data, audio.size, text.offset_data, text.size)
                rows.append((content["num_samples"], "text" in content, *offsets, zlib.crc32(raw)))
                labels.append(content)
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from error
    table = np.array(rows, list(SAMPLE_ARRAYS.items()))
    arrays = {name: table[name].copy() for name in SAMPLE_ARRAYS}
    return ShardContents(arrays, tuple(labels), path.stat().st_size, sha256_of(path))
