"""Files of codes and of audio: names, formats, the list of files to encode or decode, and the final report."""

import hashlib
import io
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast
from zipfile import BadZipFile, ZipFile

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from moss_train.data.pack.manifest import AUDIO_SUFFIXES, is_list, list_clips
from moss_train.utils.errors import UserError
from moss_train.utils.files import MAX_NAME_BYTES, atomic_write, pluralize, printable

Item = TypeVar("Item")
Result = TypeVar("Result")

_CONTROL = re.compile("[\x00-\x1f\x7f]")

MAX_EXPANDED_BYTES = 2**28
"""Largest array of a compressed .npz file: 23 hours of codes at 12.5 Hz with 32 levels as 64-bit numbers."""

CODES_FORMATS = ("safetensors", "npz")


@dataclass(frozen=True)
class CodesInfo:
    """The metadata of a codes file."""

    model: str  # where the model came from, as given to `encode`
    sampling_rate: int  # Hz, of the waveform that the codes stand for
    frame_rate: float  # Hz
    num_channels: int
    num_samples: int  # per channel, before padding to whole frames
    fingerprint: str  # of the encoder and quantizer weights and the precision; equal fingerprints make equal codes
    precision: str = "fp32"  # of the encoder's computation; older files do not state it and have float32


def write_codes(path: Path, codes: Tensor, info: CodesInfo) -> None:
    """Write codes [N, frames], as int16 if they fit, with `info`, in the format of the suffix: all or no file."""
    small = codes.numel() == 0 or int(codes.max()) < 2**15
    tensor = codes.detach().cpu().to(torch.int16 if small else torch.int64).contiguous()
    with atomic_write(path) as temporary:
        if path.suffix == ".npz":
            np.savez(temporary, codes=tensor.numpy(), **asdict(info))
        else:
            metadata = {key: str(value) for key, value in asdict(info).items()}
            # Not save_file: other users cannot read the file it makes, and it raises no OSError for a full disk.
            temporary.write_bytes(save({"codes": tensor}, metadata))


def read_codes(path: Path) -> tuple[Tensor, CodesInfo]:
    """Read codes [N, frames] as int64 with their metadata. Raises UserError when `path` is not a codes file."""
    if path.suffix == ".npz":
        arrays = _read_npz(path)
        codes, metadata = arrays.pop("codes"), arrays
        if not np.issubdtype(codes.dtype, np.integer):
            raise UserError(f"{path} holds codes of type {codes.dtype}, not integers")
        tensor = torch.from_numpy(codes.astype(np.int64))
    else:
        with _open(path) as file:
            tensor, metadata = file.get_tensor("codes").to(torch.int64), file.metadata()
    return tensor, _info(path, tuple(tensor.shape), metadata)


def read_codes_header(path: Path) -> tuple[tuple[int, int], CodesInfo]:
    """Read the shape (N, frames) and the metadata, as `read_codes` does; without the codes where the format allows."""
    if path.suffix == ".npz":
        codes, info = read_codes(path)
        return (codes.shape[0], codes.shape[1]), info
    with _open(path) as file:
        shape = tuple(file.get_slice("codes").get_shape())
        return shape, _info(path, shape, file.metadata())


def _read_npz(path: Path) -> dict[str, Any]:
    """Read the arrays of a codes file and nothing else of it.

    A compressed file may expand to any size, so an array may not exceed the size of the file or `MAX_EXPANDED_BYTES`,
    whichever is larger.
    """
    arrays: dict[str, Any] = {}
    try:
        limit = max(path.stat().st_size, MAX_EXPANDED_BYTES)
        with ZipFile(path) as archive:
            members = set(archive.namelist())
            for name in ("codes", *(field.name for field in fields(CodesInfo))):
                if f"{name}.npy" not in members:
                    continue
                with archive.open(f"{name}.npy") as member:
                    content = member.read(limit + 1)
                if len(content) > limit:
                    raise UserError(f"{path} unfolds to more than {limit} bytes; it is no codes file")
                arrays[name] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile, RuntimeError, MemoryError, OverflowError, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} is not a readable codes file ({reason})") from error
    if "codes" not in arrays:
        raise UserError(f"{path} is an npz file without codes; give files that encode wrote")
    return arrays


def _open(path: Path) -> "safetensors.safe_open":
    try:
        file = safetensors.safe_open(path, framework="pt")
        names = list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable codes file ({error})") from error
    if "codes" not in names:
        raise UserError(f"{path} is a safetensors file without codes; give files that encode wrote")
    return file


def _info(path: Path, shape: tuple[int, ...], metadata: Mapping[str, Any] | None) -> CodesInfo:
    if len(shape) != 2:
        raise UserError(f"{path} holds codes of shape {shape}, not [levels, frames]")
    found = {"precision": "fp32", **(metadata or {})}
    try:
        return CodesInfo(**{field.name: cast(Any, field.type)(found[field.name]) for field in fields(CodesInfo)})
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} lacks the metadata of a codes file ({error}); encode the audio again") from error


@dataclass(frozen=True)
class Work:
    """One file to encode or decode, and the file to write below the output folder."""

    source: Path
    target: Path


source_of: Callable[[Work], Path] = attrgetter("source")


@dataclass
class Report:
    """The result for a corpus: number of files written and of files already there, and (file, reason) for failures."""

    num_written: int
    num_present: int
    failures: list[tuple[Path, str]]

    def successes(
        self, outcomes: Iterable[tuple[Item, Result | Exception]], source: Callable[[Item], Path]
    ) -> list[tuple[Item, Result]]:
        """Note the failures of a group, each with the file it comes from, and return the others."""
        good = []
        for item, result in outcomes:
            if isinstance(result, Exception):
                self.failures.append((source(item), str(result)))
            else:
                good.append((item, result))
        return good


def find_audio(
    inputs: Sequence[str], out: Path, suffix: str = ".safetensors"
) -> tuple[list[Work], list[tuple[Path, str]]]:
    """List the audio of files, folders and JSONL manifests; targets keep relative paths and end in `suffix`.

    Returns the files to encode, and (file or line, reason) for entries that are not clips.

    Raises UserError if an input does not exist, nothing is found, or two files would get the same target.
    """
    pairs: list[tuple[Path, str]] = []
    failures: list[tuple[Path, str]] = []
    for text in inputs:
        path = Path(text).expanduser()
        prefix = f"{path.name}/" if len(inputs) > 1 and path.is_dir() else ""
        if path.is_file() and not is_list(path):
            pairs.append((path, path.name))
            continue
        found = list_clips(path, domain="audio")
        if any(clip.start_seconds or clip.end_seconds is not None or clip.row is not None for clip in found.clips):
            raise UserError(f"input={path} names parts of files; pack it and give shards= instead")
        pairs += [(clip.path, prefix + clip.id) for clip in found.clips]
        failures += [(Path(bad.name), bad.reason) for bad in found.invalid]
    return _with_targets(pairs, out, suffix, AUDIO_SUFFIXES), failures


def find_codes(inputs: Sequence[str], out: Path, suffix: str) -> list[Work]:
    """List the codes files of files and folders; targets keep relative paths and end in `suffix`.

    Raises UserError as `find_audio` does.
    """
    pairs: list[tuple[Path, str]] = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files = (file for suffix in CODES_FORMATS for file in path.rglob(f"*.{suffix}"))
            found = sorted(file for file in files if not file.name.startswith("."))
            if not found:
                raise UserError(f"input={path} has no .safetensors or .npz files; give a folder that encode wrote")
            prefix = f"{path.name}/" if len(inputs) > 1 else ""
            pairs += [(file, prefix + file.relative_to(path).as_posix()) for file in found]
        elif path.is_file():
            pairs.append((path, path.name))
        else:
            raise UserError(f"input={path} does not exist; give a codes file or a folder that encode wrote")
    return _with_targets(pairs, out, suffix, frozenset(f".{name}" for name in CODES_FORMATS))


def targets_of(names: Sequence[str], suffix: str, stripped: Collection[str] = AUDIO_SUFFIXES) -> list[PurePosixPath]:
    """Return the paths of clips relative to the output folder.

    Suffixes of audio are replaced by `suffix`, but if two clips would get one name, as `same.wav` and `same.flac`, both
    keep theirs before it. Absolute names and `..` cannot lead out of the folder.

    Args:
        names: ids or relative paths of all the clips.
        stripped: suffixes that are replaced.
    """
    short = [_relative(name, suffix, stripped) for name in names]
    counts = Counter(short)
    return [
        place if counts[place] == 1 else _relative(name, suffix, ()) for place, name in zip(short, names, strict=True)
    ]


def _relative(name: str, suffix: str, stripped: Collection[str]) -> PurePosixPath:
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..", ".")]
    if not parts:
        raise UserError(f"cannot make a file name from the clip id {name!r}")
    found = PurePosixPath(parts[-1]).suffix
    if found.lower() in stripped:
        parts[-1] = parts[-1].removesuffix(found)
    return PurePosixPath(*(_possible(part, "") for part in parts[:-1]), _possible(parts[-1], suffix))


def _possible(name: str, suffix: str) -> str:
    """Return a valid file name: control characters escaped; if too long, cut and completed with its hash."""
    with suppress(UnicodeError):
        name = os.fsencode(name).decode("utf-8")  # the text in its bytes, even if the system's file names are ASCII
    content = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", name).encode("utf-8", "backslashreplace")
    room = MAX_NAME_BYTES - len(suffix)
    if len(content) > room:
        digest = hashlib.sha256(content).hexdigest()[:12]
        content = content[: room - 13].decode("utf-8", "ignore").encode() + f"-{digest}".encode()
    return os.fsdecode(content) + suffix  # even if the system's names are not UTF-8


def _with_targets(pairs: list[tuple[Path, str]], out: Path, suffix: str, stripped: Collection[str]) -> list[Work]:
    places = targets_of([name for _, name in pairs], suffix, stripped)
    works = [Work(source, out / place) for (source, _), place in zip(pairs, places, strict=True)]
    twice = next((target for target, count in Counter(item.target for item in works).items() if count > 1), None)
    if twice is not None:
        first, second = [item.source for item in works if item.target == twice][:2]
        raise UserError(f"{first} and {second} would both become {twice}; rename one or give them in separate runs")
    return works


_SHOWN_FAILURES = 20


def print_report(report: Report, out: Path, command: str, unit: str = "file") -> int:
    """Print the failures to stderr and the counts to stdout. Returns the exit status: 1 when anything failed.

    `unit` names what was written; failures are counted in clips.
    """
    for path, reason in report.failures[:_SHOWN_FAILURES]:
        text = reason if str(path) in reason else f"{path}: {reason}"
        print(printable(f"moss_train {command}: skipped: {text}"), file=sys.stderr)
    if len(report.failures) > _SHOWN_FAILURES:
        print(f"moss_train {command}: and {len(report.failures) - _SHOWN_FAILURES} more", file=sys.stderr)
    written, failed = pluralize(report.num_written, unit), pluralize(len(report.failures), "clip")
    print(printable(f"{command}: {written} written to {out}, {report.num_present} already there, {failed} failed"))
    return 1 if report.failures else 0
