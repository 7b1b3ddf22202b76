"""Read and write the lines of manifests: JSONL and CSV, with the keys of NeMo's manifests too."""

import csv
import gzip
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from moss_train.utils.errors import UserError
from moss_train.utils.files import parse_json

KEYS = ("path", "id", "domain", "text", "task", "language", "speaker")
TIMES = ("start_seconds", "end_seconds")
_MAX_LINE_BYTES = 2**22
NEMO_KEYS = ("audio_filepath", "offset", "duration")
_SURROGATE = re.compile("[\ud800-\udfff]")  # what stands for a byte that is not UTF-8
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
MANIFEST_SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES)
Entries = Iterator[tuple[str, dict[str, Any] | UserError]]
"""Place and content of every line, or what is wrong with it."""


def iterate_json(manifest: Path) -> Entries:
    opener = gzip.open if manifest.name.lower().endswith(".gz") else open
    with cast(BinaryIO, opener(manifest, "rb")) as file:
        for number, line in enumerate(_bounded_lines(file, manifest), start=1):
            if number == 1 and line.lstrip()[:1] == b"[":
                raise UserError(f"{manifest} is one list; write one JSON object per line: jq -c '.[]' {manifest}")
            if line.strip():
                where = f"{manifest}:{number}"
                yield where, _or_error(_parse_line, line, where)


def _bounded_lines(file: BinaryIO, manifest: Path) -> Iterator[bytes]:
    """Yield lines; of one without end only so much that it is named as what it is."""
    try:
        while line := file.readline(_MAX_LINE_BYTES):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(_MAX_LINE_BYTES)
            yield line
    except (OSError, EOFError) as error:  # of a damaged .gz
        raise UserError(f"{manifest} cannot be read ({error})") from error


def iterate_table(manifest: Path, delimiter: str) -> Entries:
    """Rows of a table with a header; empty cells are left out."""
    with manifest.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
        if rows.fieldnames is not None:
            rows.fieldnames = [name.strip() for name in rows.fieldnames]
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:  # the reader continues with the next line
                where = f"{manifest}:{rows.line_num + 1}"
                yield where, UserError(f"{where}: not a line of UTF-8 CSV ({error})")
                continue
            where = f"{manifest}:{rows.line_num}"
            yield where, _or_error(_parse_row, row, where)


def _or_error(parse: Callable[..., dict], line: Any, where: str) -> dict[str, Any] | UserError:
    try:
        return parse(line, where)
    except UserError as error:
        return error


def _parse_row(row: dict, where: str) -> dict:
    entry: dict[str, Any] = _with_our_keys({key: value for key, value in row.items() if key and value}, where)
    if None in row or not entry.get("path"):
        header = ", ".join(key for key in row if key)
        raise UserError(f"{where}: every row needs a 'path' and no more cells than the header has ({header})")
    if any(_SURROGATE.search(value) for value in entry.values() if isinstance(value, str)):
        raise UserError(f"{where}: not a line of UTF-8 CSV")
    return entry | {key: _number(entry[key], where) for key in TIMES if key in entry}


def _with_our_keys(entry: dict, where: str) -> dict:
    """An entry in which `audio_filepath`, `offset` and `duration`, as NeMo writes them, are `path` and times."""
    entry = {("path" if key == "audio_filepath" else key): value for key, value in entry.items()}
    start, seconds = entry.pop("offset", None), entry.pop("duration", None)
    if start is not None:
        entry.setdefault("start_seconds", start)
    if seconds is not None and "end_seconds" not in entry:
        entry["end_seconds"] = _number(entry.get("start_seconds") or 0, where) + _number(seconds, where)
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
    for key in KEYS:
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise UserError(f"{where}: {key!r} has to be a string, got {entry[key]!r}")
        if key != "path" and isinstance(entry.get(key), str) and _SURROGATE.search(entry[key]):
            raise UserError(f"{where}: {key!r} is not valid Unicode ({entry[key]!r})")
    entry.pop("row", None)
    if entry.get("end_seconds") == -1:  # as Kaldi writes the end of a recording
        entry["end_seconds"] = None
    return entry | {key: _number(entry[key], where) for key in TIMES if entry.get(key) is not None}


def write_manifest(path: Path, entries: Iterable[dict[str, Any]]) -> int:
    """Write a JSONL manifest, values that are None left out, and return the number of its lines."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for entry in entries:
            values = {key: value for key, value in entry.items() if value is not None}
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
            count += 1
    return count
