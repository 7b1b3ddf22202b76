"""Kaldi data folders: `wav.scp`, and beside it where they are `text`, `utt2spk`, `utt2lang` and `segments`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moss_train.utils.errors import UserError

WAV_FILE = "wav.scp"
_LABEL_FILES = {"text": ("text", "trans.txt"), "speaker": ("utt2spk",), "language": ("utt2lang",)}


def is_kaldi(source: Path) -> bool:
    """Whether the path is a `.scp` file or a folder with a `wav.scp`."""
    return source.suffix == ".scp" or (source / WAV_FILE).is_file()


def iterate_utterances(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the entry of every utterance, as of a manifest line.

    Raises UserError, with file and line, for lines that are not `id value`, and for commands: those are never run.
    """
    scp = source / WAV_FILE if source.is_dir() else source
    labels = {key: _first_table(scp.parent, names) for key, names in _LABEL_FILES.items()}
    recordings = _read_table(scp)
    for name, (where, path) in recordings.items():
        if path.endswith("|"):
            raise UserError(f"{where}: {name} is a command ({path!r}); commands are not run, write the audio to a file")
    segments = scp.parent / "segments"
    utterances = _cut(segments, recordings) if segments.is_file() else _whole(recordings)
    for where, name, entry in utterances:
        known = {key: table[name][1] for key, table in labels.items() if name in table}
        yield where, {"id": name} | known | entry


def _whole(recordings: dict[str, tuple[str, str]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, (where, path) in recordings.items():
        yield where, name, {"path": path}


def _cut(segments: Path, recordings: dict[str, tuple[str, str]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, (where, value) in _read_table(segments).items():
        try:
            recording, start, end = value.split()
            times = {"start_seconds": float(start), "end_seconds": float(end)}
            path = recordings[recording][1]
        except (ValueError, KeyError) as error:
            raise UserError(f"{where}: not `utterance recording start end` of a known recording ({error})") from error
        yield where, name, {"path": path} | times


def _first_table(folder: Path, names: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    return _read_table(path) if path is not None else {}


def _read_table(path: Path) -> dict[str, tuple[str, str]]:
    """Lines `id value` as id -> (place, value)."""
    table: dict[str, tuple[str, str]] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        name, _, value = line.strip().replace("\t", " ", 1).partition(" ")
        if not value.strip() and path.name not in ("text", "trans.txt"):
            raise UserError(f"{where}: not a line `id value`: {line.strip()!r}")
        if name in table:
            raise UserError(f"{where}: {name!r} is there twice, first at {table[name][0]}")
        table[name] = (where, value.strip())
    return table
