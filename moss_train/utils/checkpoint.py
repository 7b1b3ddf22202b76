"""Write checkpoint directories atomically, verify them by hash, and find the newest valid one.

A checkpoint is a directory `update-00001000` with the payload files and a `manifest.json` of their sizes and SHA-256.
It is written under another name on the same file system, synced, read back, and renamed last. (Lightning's own writer
goes through $TMPDIR, and when killed in a test it destroyed the previous file.)
"""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moss_train.config.old_names import present_column
from moss_train.utils.errors import UserError, first_line
from moss_train.utils.files import atomic_write, read_json, sha256_of

CHECKPOINT_FILE = "checkpoint.ckpt"
MANIFEST = "manifest.json"
BEST_FILE = "best.json"
PREFIX = "update-"
PARTIAL = ".partial-"


def checkpoint_name(update: int) -> str:
    """Return the directory name of the checkpoint after `update` generator updates; sorts by update."""
    return f"{PREFIX}{update:08d}"


def write_checkpoint(directory: Path, write: Callable[[Path], None], info: Mapping[str, Any]) -> Path:
    """Write a checkpoint directory so that it is either complete or not there at all.

    Args:
        directory: final path; must not exist.
        write: called with the directory to put the payload files into.
        info: plain data to store in the manifest, beside the file list.

    Raises:
        OSError: the disk is full, read-only or returned other bytes than were written; nothing is left behind. It names
            the checkpoint, even if a library has wrapped the original error.
    """
    directory = Path(directory)
    partial = directory.parent / f"{PARTIAL}{directory.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        files = {path.name: describe_file(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"info": dict(info), "files": files}, indent=1))
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        if problem := find_damage(partial):
            raise OSError(f"the checkpoint {directory} could not be read back: {problem}")
        partial.rename(directory)
        sync(directory.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause: BaseException | None = error  # the system's error behind it, if there is one
        while cause is not None and not (isinstance(cause, OSError) and cause.errno):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, OSError):
            what = f"{cause.strerror}, the checkpoint could not be written; the earlier ones are intact"
            raise OSError(cause.errno, what, str(directory)) from error
        raise
    return directory


def describe_file(path: Path) -> dict[str, Any]:
    """Return the size in bytes and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the `info` of a valid checkpoint's manifest."""
    return read_json(directory / MANIFEST)["info"]


def read_payload(directory: Path, **options: Any) -> dict[str, Any]:
    """Return the content of a checkpoint, tensors and plain data only: an untrusted file cannot run code.

    Args:
        options: of `torch.load`; `map_location` is the CPU unless given.

    Raises:
        UserError: it holds anything else, or is not a checkpoint.
    """
    path = directory / CHECKPOINT_FILE
    try:
        content = torch.load(path, **{"map_location": "cpu", **options, "weights_only": True})
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be loaded as tensors and plain data: {first_line(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} is not a checkpoint of a training")
    return content


def weights_under(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights whose names begin with `prefix`, with the prefix removed from the names."""
    return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}


def find_damage(directory: Path) -> str | None:
    """Return what is wrong with a checkpoint directory, None when every file has its recorded size and hash."""
    try:
        manifest = read_json(directory / MANIFEST)
        files = manifest["files"]
        if not files or not isinstance(manifest["info"], dict):
            return f"{MANIFEST} lists no files or no progress"
        for name, recorded in files.items():
            if Path(name).name != name or not (directory / name).is_file():
                return f"{name} is not a file of the checkpoint"
            if describe_file(directory / name) != recorded:
                return f"{name} differs from its manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint directories in a run's checkpoint folder, oldest first, valid or not; [] without a folder.

    Raises:
        OSError: the folder cannot be read, which does not mean that it is empty.
    """
    if not Path(directory).is_dir():
        return []
    return sorted(path for path in Path(directory).iterdir() if path.name.startswith(PREFIX) and path.is_dir())


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest valid checkpoint, with a warning for each damaged one that is skipped; None when there is none.

    Raises:
        UserError: there are checkpoints and all are damaged. Training never silently starts from scratch beside them.
    """
    checkpoints = list_checkpoints(directory)
    for path in reversed(checkpoints):
        problem = find_damage(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged ({problem}), trying the one before it", stacklevel=2)
    if checkpoints:
        raise UserError(
            f"all {len(checkpoints)} checkpoints in {directory} are damaged; restore one, or move the run directory "
            "away to start from scratch"
        )
    return None


def resume_checkpoint(directory: Path) -> Path | None:
    """Return `newest_checkpoint`, and rename damaged newer ones, so that `prune_checkpoints` does not count them.

    Raises:
        UserError: as `newest_checkpoint`; nothing is renamed then.
    """
    found = newest_checkpoint(directory)
    for path in list_checkpoints(directory):
        if found is not None and path > found:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return found


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint with the best validation so far, as recorded in `best.json` beside the checkpoints."""

    name: str  # of its directory
    update: int
    metric: str
    value: float
    clips: str = ""  # digest of the clips of the validation; in records of older versions empty


def record_best(directory: Path, best: BestCheckpoint) -> None:
    """Write `best.json` of a checkpoint folder; from then on the checkpoint is not pruned."""
    with atomic_write(Path(directory) / BEST_FILE) as path:
        path.write_text(json.dumps(asdict(best), indent=1) + "\n")


def read_best(directory: Path) -> BestCheckpoint | None:
    """Return the record in a checkpoint folder; None if there is none or its checkpoint no longer exists."""
    try:
        best = BestCheckpoint(**read_json(Path(directory) / BEST_FILE))
        best = replace(best, metric=present_column(best.metric))
        is_there = Path(best.name).name == best.name and (Path(directory) / best.name).is_dir()
    except (OSError, ValueError, TypeError):
        return None
    return best if is_there else None


def best_checkpoint(directory: Path) -> Path | None:
    """Return the checkpoint with the best validation in a checkpoint folder; None if no validation has chosen one.

    Raises:
        UserError: it is damaged.
    """
    best = read_best(directory)
    if best is None:
        return None
    path = Path(directory) / best.name
    if problem := find_damage(path):
        raise UserError(f"the best checkpoint {path} is damaged ({problem}); the newest one may still be valid")
    return path


def prune_checkpoints(directory: Path, keep: int, is_kept: Callable[[int], bool] = lambda update: False) -> None:
    """Delete the remains of interrupted writes, and all checkpoints but the best and the `keep` newest.

    Args:
        is_kept: whether the checkpoint after a number of updates stays for good. Folders with other names always stay.
    """
    best = read_best(directory)
    own = [path for path in list_checkpoints(directory) if path.name.removeprefix(PREFIX).isdigit()]
    spared = [path for path in own if is_kept(int(path.name.removeprefix(PREFIX))) or (best and path.name == best.name)]
    old = [path for path in own[:-keep] if path not in spared]
    for path in [*old, *Path(directory).glob(f"{PARTIAL}*")]:
        shutil.rmtree(path, ignore_errors=True)
