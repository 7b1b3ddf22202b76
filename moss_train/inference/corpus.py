"""Finds what to encode or decode, and where each result goes."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moss_train.data.manifest import list_clips
from moss_train.inference.codes import CODES_FORMATS
from moss_train.utils.errors import UserError


@dataclass(frozen=True)
class Work:
    """One file and its place below the output folder."""

    source: Path
    target: Path


@dataclass
class Report:
    """What became of a corpus: files written, files that were there already, and (file, reason) for the others."""

    num_written: int
    num_present: int
    failures: list[tuple[Path, str]]


def find_audio(inputs: Sequence[str], out: Path, suffix: str = ".safetensors") -> list[Work]:
    """List the audio of files, folders and JSONL manifests; targets keep relative paths and end in `suffix`.

    Raises UserError when something does not exist, nothing is found, or two files would get the same target.
    """
    pairs: list[tuple[Path, str]] = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_file() and path.suffix.lower() not in (".jsonl", ".ndjson"):
            pairs.append((path, path.name))
        else:
            prefix = f"{path.name}/" if len(inputs) > 1 and path.is_dir() else ""
            clips = list_clips(path, domain="audio").clips
            if any(clip.start_seconds or clip.end_seconds is not None or clip.row is not None for clip in clips):
                raise UserError(f"input={path} names parts of files; pack it and give shards= instead")
            pairs += [(clip.path, prefix + clip.id) for clip in clips]
    return _with_targets(pairs, out, suffix)


def find_codes(inputs: Sequence[str], out: Path, suffix: str) -> list[Work]:
    """List the codes files of files and folders; targets keep relative paths and end in `suffix`. Errors as above."""
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
    return _with_targets(pairs, out, suffix)


def relative_target(name: str, suffix: str) -> PurePosixPath:
    """Return the place of a clip below the output folder; absolute names and `..` cannot lead out of it."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..", ".")]
    if not parts:
        raise UserError(f"cannot make a file name from the clip id {name!r}")
    parts[-1] = re.sub(r"\.[A-Za-z0-9]{1,11}$", "", parts[-1]) or parts[-1]
    return PurePosixPath(*parts[:-1], parts[-1] + suffix)


def _with_targets(pairs: list[tuple[Path, str]], out: Path, suffix: str) -> list[Work]:
    work = [Work(source, out / relative_target(name, suffix)) for source, name in pairs]
    counts = Counter(item.target for item in work)
    twice = next((target for target, count in counts.items() if count > 1), None)
    if twice is not None:
        first, second = [item.source for item in work if item.target == twice][:2]
        raise UserError(f"{first} and {second} would both become {twice}; rename one or give them in separate runs")
    return work
