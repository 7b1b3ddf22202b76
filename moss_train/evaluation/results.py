"""The folder of an evaluation: rows appended as they are computed, codes, times, audio for the report."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moss_train.audio.io import write_audio
from moss_train.batch import ListedClip
from moss_train.config.old_names import present_column
from moss_train.evaluation.reconstruct import ClipReconstructions, Condition, Reconstruction
from moss_train.utils.errors import UserError
from moss_train.utils.files import atomic_write, parse_json, read_json

ROWS_FILE = "per_clip.jsonl"
SETTINGS_FILE = "settings.json"
TIMES_FILE = "times.json"
CODES_FOLDER = "codes"
AUDIO_FOLDER = "audio"


@dataclass(frozen=True)
class ConditionRow:
    """Values of one clip under one condition."""

    condition: Condition
    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)  # by metric: why it has no value
    official: dict[str, float] = field(default_factory=dict)  # what the released code counts instead
    failure: str | None = None  # why there is no reconstruction


@dataclass(frozen=True)
class ClipRow:
    """All values of one clip."""

    clip: str
    domain: str
    key: str  # hash of its audio, its id and its labels
    seconds: float
    conditions: tuple[ConditionRow, ...]
    failure: str | None = None  # why the clip could not be used at all

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "ClipRow":
        """Read the line back. Raises ValueError, KeyError or TypeError if it is incomplete."""
        entry = parse_json(line, "a row")
        for item in entry["conditions"]:
            item["condition"] = Condition(**item["condition"])
            item["values"] = {present_column(key): value for key, value in item["values"].items()}
        return cls(**entry | {"conditions": tuple(ConditionRow(**item) for item in entry["conditions"])})


@dataclass
class Times:
    """Seconds of computing and seconds of audio, over the clips that were reconstructed, in earlier runs too."""

    audio: float = 0.0  # encoded audio
    encode: float = 0.0
    decode: dict[int, float] = field(default_factory=dict)  # by number of levels
    decoded_audio: dict[int, float] = field(default_factory=dict)  # by number of levels; some may be added later

    def factor(self, levels: int) -> float | None:
        """Return the computing time of encoding and of decoding some levels, per second of audio; None if untimed."""
        if not self.audio or not self.decoded_audio.get(levels):
            return None
        return self.encode / self.audio + self.decode[levels] / self.decoded_audio[levels]

    def add(self, made: ClipReconstructions) -> None:
        """Count one clip that was encoded."""
        if made.codes is not None:
            self.audio += made.seconds
            self.encode += made.encode_seconds
            for levels, seconds in made.decode_seconds.items():
                self.decode[levels] = self.decode.get(levels, 0.0) + seconds
                self.decoded_audio[levels] = self.decoded_audio.get(levels, 0.0) + made.seconds


class Results:
    """The folder of an evaluation: settings, rows, codes, the audio of the report."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open a new folder or one with the same settings. Raises UserError with the difference for other settings."""
        self.folder = folder
        self.times = Times()
        if (path := folder / TIMES_FILE).is_file():
            entry = read_json(path)
            decode = {int(key): value for key, value in entry["decode"].items()}
            # In older files all encoded audio was also decoded.
            decoded_audio = entry.get("decoded_audio") or dict.fromkeys(decode, entry["audio"])
            decoded_audio = {int(key): value for key, value in decoded_audio.items()}
            self.times = Times(entry["audio"], entry["encode"], decode, decoded_audio)
        wanted = json.loads(json.dumps(dict(settings)))
        if (path := folder / SETTINGS_FILE).is_file():
            found = read_json(path)
            found.pop("num_quantizers", None)  # in older folders, which did not allow other numbers of levels
            if keys := [key for key in wanted | found if wanted.get(key) != found.get(key)]:
                first = f"{keys[0]} was {found.get(keys[0])} and is {wanted.get(keys[0])}"
                raise UserError(f"out={folder} holds results of other settings ({first}): give another out")
        else:
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(wanted, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        path = folder / ROWS_FILE
        if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")  # a row appended to the torn line of a killed run would be lost with it
        self.rows = {row.key: row for row in read_rows(path)}

    def add(self, row: ClipRow) -> None:
        """Store a row at once, merged with further conditions of an earlier row of the clip, by number of levels."""
        if row.key in self.rows and row.failure is None:
            measured = {entry.condition for entry in row.conditions}
            kept = [entry for entry in self.rows[row.key].conditions if entry.condition not in measured]
            if kept:
                # Anchors first, as they are made.
                depths = sorted((*kept, *row.conditions), key=lambda entry: entry.condition.num_quantizers or 0)
                row = replace(row, conditions=tuple(depths))
        self.rows[row.key] = row
        with (self.folder / ROWS_FILE).open("a", encoding="utf-8") as file:
            file.write(row.to_json() + "\n")

    def keep_codes(self, key: str, codes: Tensor) -> None:
        """Keep the codes [N, frames] of a clip, for the statistics of the codebooks."""
        with atomic_write(self.folder / CODES_FOLDER / f"{key}.npy") as path:
            np.save(path, codes.numpy().astype(np.int32))

    def codes(self, row: ClipRow) -> Tensor | None:
        """Return the codes [N, frames] of a clip; None if none are stored."""
        path = self.folder / CODES_FOLDER / f"{row.key}.npy"
        return torch.from_numpy(np.load(path)).long() if path.is_file() else None

    def keep_audio(self, key: str, reconstructions: Sequence[Reconstruction]) -> None:
        """Keep reference and reconstructions of a clip as FLAC for the report."""
        stem = self.folder / AUDIO_FOLDER / key
        for item in reconstructions:
            stem.mkdir(parents=True, exist_ok=True)
            paths = {stem / f"{file_name(item.condition)}.flac": item.degraded}
            if item.condition.num_quantizers is not None or not (stem / "original.flac").exists():
                paths[stem / "original.flac"] = item.reference
            for path, audio in paths.items():
                write_audio(path, audio.nan_to_num(), item.sampling_rate)

    def finish(self, order: Sequence[ClipRow]) -> None:
        """Rewrite the rows, only those of the evaluation set and in its order, and write the times."""
        with atomic_write(self.folder / ROWS_FILE) as path:
            path.write_text("".join(row.to_json() + "\n" for row in order), encoding="utf-8")
        with atomic_write(self.folder / TIMES_FILE) as path:
            path.write_text(json.dumps(asdict(self.times), indent=1) + "\n", encoding="utf-8")


def all_conditions(wanted: Sequence[Condition], rows: Sequence[ClipRow]) -> tuple[Condition, ...]:
    """Return the wanted conditions and those of earlier runs that every clip has, by number of levels."""
    of_rows = [{entry.condition for entry in row.conditions} for row in rows if row.failure is None]
    more = set.intersection(*of_rows) - set(wanted) if of_rows else set()
    if not more:
        return tuple(wanted)
    depths = [condition for condition in (*wanted, *more) if condition.num_quantizers is not None]
    others = [condition for condition in wanted if condition.num_quantizers is None]
    return (*sorted(depths, key=lambda condition: (condition.system, condition.num_quantizers)), *others)


def clip_key(clip: ListedClip, audio: Tensor | None = None, rate: int = 0, other: str = "") -> str:
    """Return a hash of everything about a clip that its row depends on, for a given folder of results."""
    digest = hashlib.sha256(json.dumps([clip.id, clip.domain, clip.labels, rate, other], sort_keys=True).encode())
    if audio is not None:
        digest.update(audio.contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def file_name(condition: Condition) -> str:
    """Return a condition as a file name."""
    return "".join(char if char.isalnum() or char in "-." else "_" for char in condition.label)


def read_rows(path: Path) -> list[ClipRow]:
    """Return all whole rows of a file; the torn last line of an interrupted run is skipped."""
    rows = []
    # Not splitlines: a name may hold other separators, such as U+2028.
    for line in path.read_text("utf-8").split("\n") if path.is_file() else []:
        try:
            rows.append(ClipRow.from_json(line))
        except (ValueError, KeyError, TypeError):
            continue
    return rows
