"""Pack a folder or manifest on the fly, once per set of files and format; later runs find the result."""

import hashlib
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from moss_train.config.schema import PackConfig
from moss_train.data.pack.manifest import SourceList, list_clips
from moss_train.data.pack.pack import NothingToPackError, content_settings, pack
from moss_train.data.pack.preprocess import SILENT
from moss_train.data.shards.index import INDEX_FILE
from moss_train.utils.files import file_lock, pluralize, printable
from moss_train.utils.progress import progress

LOCK_FILE = ".lock"
SILENT_FILE = "all_silent"  # lies beside the shards if all clips in them are silent
LONGEST_WAIT_SECONDS = 7 * 24 * 3600.0  # for another process that packs the same files
NUM_SHOWN = 3


@dataclass(frozen=True)
class PackedSource:
    """Where the packed clips of a source are.

    Attributes:
        key: hash of everything that determines the shards: names, labels, sizes and times of the files, and the format.
        train, heldout: packed folders; `heldout` is None when nothing was held out.
    """

    key: str
    train: Path
    heldout: Path | None

    @property
    def is_silent(self) -> bool:
        """Whether every training clip is digital silence."""
        return (self.train.parent / SILENT_FILE).exists()


def pack_cached(options: PackConfig, heldout_fraction: float, key: str = "input") -> PackedSource:
    """Pack `options.input` into a folder in `options.out`, or find it packed there; prints which, and where.

    Packing that was interrupted continues after its last finished shard. Of several processes, one packs and the others
    wait.

    Raises:
        UserError: there is nothing to pack, or too many files are unreadable.
    """
    cache = Path(options.out)
    sources = list_clips(Path(options.input), options.domain, key)
    heldout, train = split(sources, heldout_fraction)
    key = listing_key(sources, options, heldout_fraction)
    folder = cache / key[:16]
    found = PackedSource(key, folder / "train", folder / "heldout" if heldout.clips else None)
    cache.mkdir(parents=True, exist_ok=True)
    with file_lock(cache / LOCK_FILE, str(cache), LONGEST_WAIT_SECONDS):
        parts = [(train, found.train)] + ([(heldout, found.heldout)] if found.heldout is not None else [])
        todo = [(part, target) for part, target in parts if not (target / INDEX_FILE).exists()]
        for part, target in todo:
            folder.mkdir(parents=True, exist_ok=True)
            with progress(f"packing {target.name}", total=len(part.clips)) as bar:
                to_target = options.replace(out=str(target))
                try:
                    report = pack(part, to_target, on_clip=lambda seconds, bar=bar: bar.advance())  # type: ignore[misc]
                except NothingToPackError as error:
                    if part is train:
                        raise
                    print(printable(f"nothing is held out: {error}"), file=sys.stderr)
                    found = replace(found, heldout=None)
                    continue
            kinds = [f"{count} {kind}" for kind, count in sorted(report.skipped.items())]
            if report.invalid:
                reasons = "; ".join(bad.reason for bad in report.invalid[:NUM_SHOWN])
                kinds.append(f"{len(report.invalid)} unreadable ({reasons})")
            if kinds:
                print(printable(f"skipped: {', '.join(kinds)}"), file=sys.stderr)
            for remark, number in sorted(report.remarks.items()):
                print(f"{pluralize(number, 'clip')} {remark}", file=sys.stderr)
            if part is train and report.remarks.get(SILENT) == report.index["num_samples"]:
                (folder / SILENT_FILE).touch()
    num_heldout = len(heldout.clips) if found.heldout is not None else 0
    count = f"{pluralize(len(train.clips), 'file')} to learn from, {num_heldout} held out"
    done = "packed into" if todo else "found packed in"
    print(printable(f"{options.input}: {count}, {done} {folder}"), file=sys.stderr)
    return found


def listing_key(sources: SourceList, options: PackConfig, heldout_fraction: float) -> str:
    """Return a hash of the files (name, size, time and labels) and of the format in which they are packed."""
    # Hashed under the former names of these keys, so that older runs find their folders.
    shares = {"heldout_share": heldout_fraction, "max_bad_share": options.max_invalid_fraction}
    content = content_settings(options) | shares
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for clip in sources.clips:
        status = clip.path.stat()
        part = (clip.start_seconds, clip.end_seconds, clip.row)
        # Without the licence, which does not affect what is learned, so that runs from before it was stored can resume.
        labels = {key: value for key, value in clip.labels().items() if key != "licence"}
        line = [clip.id, labels, part, status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def split(sources: SourceList, heldout_fraction: float) -> tuple[SourceList, SourceList]:
    """Split the clips into (held out, training); which ones are held out depends on their ids alone.

    The number of clips held out is rounded up; of a single clip, nothing is held out. What was skipped while listing
    stays with the training clips.
    """
    count = math.ceil(heldout_fraction * len(sources.clips)) if len(sources.clips) > 1 else 0
    order = sorted(sources.clips, key=lambda clip: hashlib.sha256(clip.id.encode()).digest())
    chosen = {clip.id for clip in order[:count]}
    heldout = tuple(clip for clip in sources.clips if clip.id in chosen)
    train = tuple(clip for clip in sources.clips if clip.id not in chosen)
    total = sources.total
    return replace(sources, clips=heldout, invalid=(), whole=total), replace(sources, clips=train, whole=total)
