"""Turn `data.path`, a folder of audio or a manifest, into packed folders."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_train.config.fit_schema import DataConfig, FitConfig
from moss_train.data.pack.on_the_fly import PackedSource, pack_cached
from moss_train.data.pack.preprocess import PackOptions
from moss_train.utils.checkpoint import list_checkpoints
from moss_train.utils.errors import UserError
from moss_train.utils.files import atomic_write, printable, read_json

RECORD_FILE = "packed.json"
CACHE_FOLDER = "packed"


@dataclass(frozen=True)
class DataFolders:
    """The packed folders of a run.

    Attributes:
        train: to learn from.
        held_out: for validation, unless `validation.data` names others.
    """

    train: list[str]
    held_out: list[str]


def find_data(config: FitConfig, tokenizer: Any, directory: Path) -> DataFolders:
    """Return the folders of `data.train`, or those into which `data.path` is packed here.

    A run that has begun keeps the shards it began with, also when its files are gone by now.

    Args:
        tokenizer: configuration of the tokenizer, for sampling rate and channels.
        directory: of the run.

    Raises:
        UserError: nothing can be packed, or the files of a run changed.
    """
    data = config.data
    if data.path is None:
        return DataFolders(data.train, [])
    record = read_record(directory)
    if record is not None and record.train.exists() and not Path(data.path).exists():
        print(printable(f"data.path={data.path} is gone, continuing with {record.train.parent}"), file=sys.stderr)
        packed = record
    else:
        packed = pack_for_run(data.path, data, tokenizer, directory)
        if record is not None and record.key != packed.key and not config.allow_config_changes:
            raise UserError(
                f"the files of data.path={data.path} are not those that {directory} was started with: use another "
                "name=, or allow_config_changes=true to continue with them"
            )
        write_record(directory, packed)
    if packed.is_silent:
        warn_of_silence(directory, data.path)
    heldout = [] if packed.heldout is None else [str(packed.heldout)]
    return DataFolders([str(packed.train)], heldout)


def warn_of_silence(directory: Path, source: str) -> None:
    """Say that there is nothing to learn, now and in the summary of the run."""
    message = f"update 0: every clip of data.path={source} is digital silence: nothing can be learned from them"
    print(printable(f"warning: {message}"), file=sys.stderr)
    path = directory / "warnings.txt"
    if not path.exists() or message not in path.read_text("utf-8", errors="replace"):
        with path.open("a", encoding="utf-8") as file:
            file.write(message + "\n")


def pack_for_run(path: str, data: DataConfig, tokenizer: Any, directory: Path) -> PackedSource:
    """Pack `data.path` in the tokenizer's format into `data.cache`, by default with the run."""
    options = PackOptions(
        sampling_rate=tokenizer.output_sampling_rate,
        num_channels=tokenizer.number_channels,
        max_invalid_fraction=data.max_invalid_fraction,
    )
    cache = directory / CACHE_FOLDER if data.cache is None else Path(data.cache)
    source = Path(path).expanduser()
    return pack_cached(
        source, cache, options, domain=data.domain, heldout_fraction=data.heldout_fraction, key="data.path"
    )


def read_record(directory: Path) -> PackedSource | None:
    """What a run that has begun was started with; None for a new one."""
    path = directory / RECORD_FILE
    if not path.exists() or not list_checkpoints(directory / "checkpoints"):
        return None
    record = read_json(path)
    heldout = record["heldout"]
    return PackedSource(record["key"], Path(record["train"]), None if heldout is None else Path(heldout))


def write_record(directory: Path, packed: PackedSource) -> None:
    """Note in the run directory which shards it learns from."""
    heldout = None if packed.heldout is None else str(packed.heldout)
    with atomic_write(directory / RECORD_FILE) as path:
        path.write_text(
            json.dumps({"key": packed.key, "train": str(packed.train), "heldout": heldout}, indent=1) + "\n"
        )
