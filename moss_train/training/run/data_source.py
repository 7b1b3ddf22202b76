"""Turn `data.path`, a folder of audio or a manifest, into packed folders."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moss_train.config.fit_schema import FitConfig
from moss_train.config.schema import PackConfig
from moss_train.data.pack.on_the_fly import PackedSource, pack_cached
from moss_train.utils.checkpoint import list_checkpoints
from moss_train.utils.errors import UserError
from moss_train.utils.files import atomic_write, printable, read_json

RECORD_FILE = "packed.json"
CACHE_FOLDER = "packed"


def find_data(config: FitConfig, tokenizer: Any, directory: Path) -> tuple[list[str], list[str]]:
    """Return the packed folders to learn from and those held out, for validation unless `validation.data` names others.

    They are those of `data.train`, or those into which `data.path` is packed here in the tokenizer's format. A run that
    has begun keeps the shards it began with, also when its files are gone by now.

    Args:
        tokenizer: configuration of the tokenizer, for sampling rate and channels.
        directory: of the run.

    Raises:
        UserError: nothing can be packed, or the files of a run changed.
    """
    data = config.data
    if data.path is None:
        return data.train, []
    path, begun = directory / RECORD_FILE, None
    if path.exists() and list_checkpoints(directory / "checkpoints"):
        record = read_json(path)
        heldout = record["heldout"]
        begun = PackedSource(record["key"], Path(record["train"]), None if heldout is None else Path(heldout))
    if begun is not None and begun.train.exists() and not Path(data.path).exists():
        print(printable(f"data.path={data.path} is gone, continuing with {begun.train.parent}"), file=sys.stderr)
        packed = begun
    else:
        packed = pack_cached(
            PackConfig(
                data.path,
                str(directory / CACHE_FOLDER) if data.cache is None else data.cache,
                data.domain,
                sampling_rate=tokenizer.output_sampling_rate,
                num_channels=tokenizer.number_channels,
                max_invalid_fraction=data.max_invalid_fraction,
            ),
            data.heldout_fraction,
            key="data.path",
        )
        if begun is not None and begun.key != packed.key and not config.allow_config_changes:
            raise UserError(
                f"the files of data.path={data.path} are not those that {directory} was started with: use another "
                "name=, or allow_config_changes=true to continue with them"
            )
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(packed), indent=1, default=str) + "\n")
    if packed.is_silent:
        warn_of_silence(directory, data.path)
    return [str(packed.train)], [] if packed.heldout is None else [str(packed.heldout)]


def warn_of_silence(directory: Path, source: str) -> None:
    """Say that there is nothing to learn, now and in the summary of the run."""
    message = f"update 0: every clip of data.path={source} is digital silence: nothing can be learned from them"
    print(printable(f"warning: {message}"), file=sys.stderr)
    path = directory / "warnings.txt"
    if not path.exists() or message not in path.read_text("utf-8", errors="replace"):
        with path.open("a", encoding="utf-8") as file:
            file.write(message + "\n")
