"""Read Kaldi data folders and datasets saved with `datasets` as sources of clips."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from moss_train.audio.io import NamedBytes
from moss_train.utils.errors import UserError
from moss_train.utils.files import read_json

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
            times: dict[str, float | None] = {"start_seconds": float(start), "end_seconds": float(end)}
            if times["end_seconds"] == -1:  # to the end of the recording
                times["end_seconds"] = None
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


AUDIO_COLUMN = "audio"
_TEXT_COLUMNS = ("text", "transcription", "sentence", "transcript", "caption")
_LABEL_COLUMNS = ("id", "domain", "task", "language", "speaker")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def iterate_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the entry of every row, as of a manifest line with `path` (the Arrow file) and `row`.

    Raises UserError when pyarrow is not installed, or a file is damaged or has no column `audio` with bytes.
    """
    for split, split_folder in _splits(folder):
        number = 0
        for file in _data_files(split_folder):
            table = _table(str(file))
            names = _label_names(table)
            for row in range(table.num_rows):
                name = f"{split}{number:09d}"
                entry = {key: table.column(column)[row].as_py() for column, key in names.items()}
                entry = {key: str(value) for key, value in entry.items() if value is not None}
                yield f"{file} row {row}", {"id": name} | entry | {"path": str(file.absolute()), "row": row}
                number += 1


def open_row(path: Path, row: int) -> NamedBytes:
    """Return the audio file in one row of an Arrow file. Raises UserError when there is none."""
    value = _table(str(path)).column(AUDIO_COLUMN)[row].as_py()
    content = value.get("bytes") if isinstance(value, dict) else None
    if content is None:
        inner = value.get("path") if isinstance(value, dict) else None
        if not inner or not Path(inner).is_file():
            raise UserError(f"{path} row {row} has neither the bytes of its audio nor an existing path ({inner})")
        content = Path(inner).read_bytes()
    return NamedBytes(content, f"{path} row {row}")


def _splits(folder: Path) -> list[tuple[str, Path]]:
    if not (folder / "dataset_dict.json").is_file():
        return [("", folder)]
    path = folder / "dataset_dict.json"
    try:
        names = [str(name) for name in read_json(path)["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe a saved dataset ({error})") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{path}: the split {outside[0]!r} is not the plain name of a folder")
    return [(f"{name}/", folder / name) for name in names]


def _data_files(folder: Path) -> list[Path]:
    try:
        state = read_json(folder / "state.json")
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'} does not describe a saved dataset ({error})") from error
    if state.get("_indices_data_files"):
        raise UserError(f"{folder} has an order of its own (indices); save it after `flatten_indices()`")
    return files


@lru_cache(maxsize=8)
def _table(path: str) -> Any:
    """An Arrow file mapped into memory: nothing is read before it is used."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        mapped = pa.memory_map(path)
        try:
            table = pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            table = pa.ipc.open_file(mapped).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is not an Arrow file that can be read ({error})") from error
    if AUDIO_COLUMN not in table.column_names:
        raise UserError(f"{path} has no column {AUDIO_COLUMN!r}, it has {', '.join(table.column_names)}")
    return table


def _label_names(table: Any) -> dict[str, str]:
    """Column -> manifest key, for the columns that are there; the first text column counts."""
    text = next((name for name in _TEXT_COLUMNS if name in table.column_names), None)
    names = {name: name for name in _LABEL_COLUMNS if name in table.column_names}
    return names | ({text: "text"} if text else {})
