"""Formats of lists of clips: lines of JSONL and CSV (also NeMo's), Kaldi folders, datasets saved with `datasets`."""

import csv
import gzip
import json
import math
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from moss_train.audio.io import NamedBytes
from moss_train.utils.errors import UserError
from moss_train.utils.files import parse_json, read_json

KEYS = ("path", "id", "domain", "text", "task", "language", "speaker")
LICENCE_KEYS = ("licence", "license")
TIMES = ("start_seconds", "end_seconds")
_MAX_LINE_BYTES = 2**22
NEMO_KEYS = ("audio_filepath", "offset", "duration")
_SURROGATE = re.compile("[\ud800-\udfff]")  # stands for a byte that is not UTF-8
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
MANIFEST_SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES)
Entries = Iterator[tuple[str, dict[str, Any] | UserError]]
"""Place and content of every line, or the error in it."""


def iterate_json(manifest: Path) -> Entries:
    opener = gzip.open if manifest.name.lower().endswith(".gz") else open
    with cast(BinaryIO, opener(manifest, "rb")) as file:
        for number, line in enumerate(_bounded_lines(file, manifest), start=1):
            if number == 1 and line.lstrip()[:1] == b"[":
                raise UserError(f"{manifest} is one list; write one JSON object per line: jq -c '.[]' {manifest}")
            if line.strip():
                where = f"{manifest}:{number}"
                try:
                    yield where, _parse_line(line, where)
                except UserError as error:
                    yield where, error


def _bounded_lines(file: BinaryIO, manifest: Path) -> Iterator[bytes]:
    """Yield lines, at most _MAX_LINE_BYTES of each: an overlong line is then reported as invalid."""
    try:
        while line := file.readline(_MAX_LINE_BYTES):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(_MAX_LINE_BYTES)
            yield line
    except (OSError, EOFError) as error:  # of a damaged .gz
        raise UserError(f"{manifest} cannot be read ({error})") from error


def iterate_table(manifest: Path, delimiter: str) -> Entries:
    """Yield the rows of a table with a header; empty cells are left out."""
    with manifest.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _with_balanced_quotes(file) if delimiter == "\t" else file
        rows = csv.DictReader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
        if rows.fieldnames is not None:
            rows.fieldnames = [name.strip() for name in rows.fieldnames]
        while True:
            try:
                row = next(rows)
                where = f"{manifest}:{rows.line_num}"
                entry = _with_our_keys({key: value for key, value in row.items() if key and value}, where)
                if None in row or not entry.get("path"):
                    header = ", ".join(key for key in row if key)
                    raise UserError(
                        f"{where}: every row needs a 'path' and no more cells than the header has ({header})"
                    )
                if any(_SURROGATE.search(value) for value in entry.values() if isinstance(value, str)):
                    raise UserError(f"{where}: not a line of UTF-8 CSV")
                yield where, entry | {key: _number(entry[key], where) for key in TIMES if key in entry}
            except StopIteration:
                return
            except csv.Error as error:  # the reader continues with the next line
                where = f"{manifest}:{rows.line_num + 1}"
                yield where, UserError(f"{where}: not a line of UTF-8 CSV ({error})")
            except UserError as error:
                yield where, error


def _with_balanced_quotes(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a TSV file; where a quotation mark opens a cell and does not end it, all of them are text.

    Many TSV files, such as Common Voice's, do not quote their cells; a text that begins with a quotation mark would
    otherwise swallow the lines after it.
    """
    for line in lines:
        try:
            list(csv.reader([line], delimiter="\t", strict=True, skipinitialspace=True))
        except csv.Error:
            cells = (cell.replace('"', '""') for cell in line.rstrip("\r\n").split("\t"))
            line = "\t".join(f'"{cell}"' for cell in cells) + "\n"
        yield line


def _with_our_keys(entry: dict, where: str) -> dict[str, Any]:
    """Return an entry in which NeMo's keys `audio_filepath`, `offset` and `duration` are replaced by path and times.

    An end of -1, as in Kaldi, means the end of the recording. The key `row` is only for saved datasets.
    """
    entry = {("path" if key == "audio_filepath" else key): value for key, value in entry.items()}
    start, seconds = entry.pop("offset", None), entry.pop("duration", None)
    if start is not None:
        entry.setdefault("start_seconds", start)
    if seconds is not None and "end_seconds" not in entry:
        entry["end_seconds"] = _number(entry.get("start_seconds") or 0, where) + _number(seconds, where)
    if str(entry.get("end_seconds")) in ("-1", "-1.0"):
        del entry["end_seconds"]
    entry.pop("row", None)
    return entry


def _number(value: object, where: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{where}: a time has to be a number of seconds, 0 or more, got {value!r}")
    return number


def _parse_line(line: bytes, where: str) -> dict:
    try:
        entry = parse_json(line, "line")
    except UserError as error:
        raise UserError(f"{where}: not a line of JSON ({error})") from error
    if isinstance(entry, dict):
        entry = _with_our_keys(entry, where)
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        found = f", this one has {', '.join(map(repr, entry))}" if isinstance(entry, dict) and entry else ""
        raise UserError(f"{where}: every line has to be a JSON object with a 'path'{found}")
    for key in (*KEYS, *LICENCE_KEYS):
        if key in KEYS and entry.get(key) is not None and not isinstance(entry[key], str):
            raise UserError(f"{where}: {key!r} has to be a string, got {entry[key]!r}")
        if key != "path" and isinstance(entry.get(key), str) and _SURROGATE.search(entry[key]):
            raise UserError(f"{where}: {key!r} is not valid Unicode ({entry[key]!r})")
    return entry | {key: _number(entry[key], where) for key in TIMES if entry.get(key) is not None}


def write_manifest(path: Path, entries: Iterable[dict[str, Any]]) -> int:
    """Write a JSONL manifest without values that are None, and return the number of its lines."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for entry in entries:
            values = {key: value for key, value in entry.items() if value is not None}
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
            count += 1
    return count


WAV_FILE = "wav.scp"
_LABEL_FILES = {"text": ("text", "trans.txt"), "speaker": ("utt2spk",), "language": ("utt2lang",)}


def is_kaldi(source: Path) -> bool:
    """Return whether the path is a `.scp` file or a folder with a `wav.scp`."""
    return source.suffix == ".scp" or (source / WAV_FILE).is_file()


def iterate_utterances(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the entry of every utterance, in the form of a manifest line.

    Raises UserError, with file and line, for lines that are not `id value`, and for commands, which are never run.
    """
    scp = source / WAV_FILE if source.is_dir() else source
    labels = {}
    for key, names in _LABEL_FILES.items():
        if path := next((scp.parent / name for name in names if (scp.parent / name).is_file()), None):
            labels[key] = _read_table(path)
    recordings = _read_table(scp)
    for name, (where, value) in recordings.items():
        if value.endswith("|"):
            raise UserError(
                f"{where}: {name} is a command ({value!r}); commands are not run, write the audio to a file"
            )
    segments = scp.parent / "segments"
    is_cut = segments.is_file()
    for name, (where, value) in (_read_table(segments) if is_cut else recordings).items():
        entry: dict[str, Any] = {"id": name} | {key: table[name][1] for key, table in labels.items() if name in table}
        if not is_cut:
            yield where, entry | {"path": value}
            continue
        try:
            recording, start, end = value.split()
            entry |= {"path": recordings[recording][1], "start_seconds": float(start), "end_seconds": float(end)}
        except (ValueError, KeyError) as error:
            raise UserError(f"{where}: not `utterance recording start end` of a known recording ({error})") from error
        if entry["end_seconds"] == -1:  # to the end of the recording
            entry["end_seconds"] = None
        yield where, entry


def _read_table(path: Path) -> dict[str, tuple[str, str]]:
    """Read lines `id value` and return id -> (place, value). Raises UserError."""
    table: dict[str, tuple[str, str]] = {}
    try:
        lines = path.read_text("utf-8").split("\n")  # not splitlines: U+2028 in a text ends no line
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
    """Return whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def iterate_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the entry of every row, in the form of a manifest line with `path` (Arrow file) and `row`.

    Raises UserError when pyarrow is not installed, or a file is damaged or has no column `audio` with bytes.
    """
    splits = [("", folder)]
    if (path := folder / "dataset_dict.json").is_file():
        try:
            names = [str(name) for name in read_json(path)["splits"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} does not describe a saved dataset ({error})") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{path}: the split {outside[0]!r} is not the plain name of a folder")
        splits = [(f"{name}/", folder / name) for name in names]
    for split, split_folder in splits:
        number = 0
        for file in _data_files(split_folder):
            table = _table(str(file))
            text = next((name for name in _TEXT_COLUMNS if name in table.column_names), None)
            keys = {name: name for name in _LABEL_COLUMNS if name in table.column_names}
            keys |= {text: "text"} if text else {}  # column -> key of a manifest
            for row in range(table.num_rows):
                name = f"{split}{number:09d}"
                entry = {key: table.column(column)[row].as_py() for column, key in keys.items()}
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
    """Map an Arrow file into memory; nothing is read before it is used. Raises UserError."""
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
