"""Hugging Face datasets that were saved with `save_to_disk`, read from their Arrow files."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from moss_train.audio import NamedBytes
from moss_train.utils.errors import UserError

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
    splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
    return [(f"{name}/", folder / name) for name in splits]


def _data_files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
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
