"""Encode packed shards to shards of codes, and decode them to audio files."""

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from moss_train.audio.io import resample
from moss_train.config.schema import EncodeConfig
from moss_train.data.pack.pack import check_target
from moss_train.data.pack.resume import JOURNAL_FILE, resumable_directory
from moss_train.data.shards.codes import (
    CodedClip,
    CodeShards,
    CodesSource,
    is_code_folder,
    write_code_index,
    write_code_shard,
)
from moss_train.data.shards.index import ARRAYS_FILE, ShardIndex
from moss_train.data.stream.sample_reader import ClipReader
from moss_train.inference.batching import group_by_length, load_model, read_ahead
from moss_train.inference.decode import Decoder, decode_group
from moss_train.inference.encode import Encoder
from moss_train.inference.files import Report, targets_of
from moss_train.utils.errors import UserError
from moss_train.utils.files import sha256_of
from moss_train.utils.progress import progress
from moss_train.utils.workers import num_cores, ray_pool, worker_pool


def encode_shards(options: EncodeConfig, devices: Sequence[torch.device]) -> Report:
    """Encode a packed folder into a folder of codes of the same shards, one process per device, or on a Ray cluster.

    The folder appears when it is complete; after a kill the next call continues after the finished shards, and with a
    complete folder there is nothing left to do. Clips that cannot be read are reported and skipped. Raises UserError if
    `out` is something else or was made or started with other weights or options, or the model does not fit the audio.
    """
    assert options.shards is not None
    source_folder, target = Path(options.shards), Path(options.out)
    is_complete = is_code_folder(target)
    if not is_complete:
        check_target(target, overwrite=None)
    index = ShardIndex.load(source_folder)
    encoder = make_encoder(options, devices[0] if len(devices) == 1 else torch.device("cpu"))
    config = encoder.model.config
    rate, channels = config.sampling_rate, config.number_channels
    if index.num_channels != channels or index.sampling_rate % rate:
        raise UserError(
            f"shards={source_folder} have {index.sampling_rate} Hz and {index.num_channels} channels, the model takes "
            f"{rate} Hz (or a multiple) and {channels}; pack the audio again with sampling_rate={rate} "
            f"num_channels={channels}"
        )
    source = CodesSource(
        model=options.model,
        fingerprint=encoder.fingerprint,
        num_levels=encoder.num_levels,
        sampling_rate=rate,
        frame_rate=config.frame_rate,
        num_channels=channels,
        audio_sha256=sha256_of(source_folder / ARRAYS_FILE),
    )
    if is_complete:
        made_with = CodeShards(target).source
        if replace(made_with, model=source.model) != source:  # one model may have several names
            raise UserError(
                f"out={target} was made with another model (model={made_with.model}), other options or other audio; "
                "choose another out="
            )
        skipped = missing_clips(index, range(len(index.shards)), target, "was skipped before")
        return Report(0, len(index.shards), skipped)
    with resumable_directory(target) as folder:
        journal, content = folder / JOURNAL_FILE, json.dumps(asdict(source), sort_keys=True)
        if not journal.exists():
            journal.write_text(content, encoding="utf-8")
        elif journal.read_text("utf-8") != content:
            raise UserError(
                f"{folder} was begun with another model, other options or other audio; remove it to begin anew"
            )
        todo = [number for number, shard in enumerate(index.shards) if not (folder / shard.file).exists()]
        finished = sorted(set(range(len(index.shards))) - set(todo))
        skipped = missing_clips(index, finished, folder, "was skipped before the interruption")
        report = Report(0, len(finished), skipped)
        with progress("encoding", total=sum(index.shards[number].num_clips for number in todo)) as bar:
            if options.executor == "local" and len(devices) == 1:
                for number in todo:
                    report.failures += encode_shard(encoder, options, index, number, folder, bar.advance)
            else:
                for number, failures in encode_in_processes(options, todo, devices, folder):
                    report.failures += failures
                    bar.advance(index.shards[number].num_clips)
        report.num_written = len(todo)
        write_code_index(folder, [(shard.file, shard.domain) for shard in index.shards], source)
    return report


def make_encoder(options: EncodeConfig, device: torch.device) -> Encoder:
    """Load the model onto a device, with the options of `encode`."""
    model, chunk_duration = load_model(options, device)
    return Encoder(
        model,
        options.model,
        num_quantizers=options.num_quantizers,
        chunk_duration=chunk_duration,
        batch_invariant=options.batch_invariant,
        loudness=options.loudness,
        peak=options.peak,
    )


def encode_shard(
    encoder: Encoder,
    options: EncodeConfig,
    index: ShardIndex,
    number: int,
    folder: Path,
    on_clips: Callable[[int], None] = lambda count: None,
) -> list[tuple[Path, str]]:
    """Encode one shard, clips of similar length together, and return (shard, reason) of clips that were skipped."""
    shard = index.shards[number]
    rows = index.shards.rows_of(number)
    reader = ClipReader(index.sampling_rate, index.num_channels)
    seconds = [int(index.arrays["num_samples"][row]) / index.sampling_rate for row in rows]
    sampling_rate = encoder.model.config.sampling_rate

    def read(row: int) -> tuple[Tensor, dict]:
        """Read audio [C, T] at the model's rate, as the stream of `fit` does, and labels."""
        location = index.locate(row)
        reader.check_headers(location)
        audio, labels = reader.read_audio(location, 0, location.num_samples), reader.read_labels(location)
        if index.sampling_rate == sampling_rate:
            return audio, labels
        audio = resample(audio, index.sampling_rate, sampling_rate)
        return audio, labels | {"sampling_rate": sampling_rate, "num_samples": audio.shape[1]}

    clips: dict[int, CodedClip] = {}
    report = Report(0, 0, [])
    for outcomes in read_ahead(group_by_length(rows, seconds, options.batch_seconds), read):
        good = report.successes(outcomes, lambda row: index.folder / shard.file)
        if good:
            codes = encoder.codes([audio for _, (audio, _) in good])
            for (row, (_, labels)), clip_codes in zip(good, codes, strict=True):
                clips[row] = CodedClip(f"{row - rows.start:09d}", clip_codes, labels)
        on_clips(len(outcomes))
    write_code_shard(folder / shard.file, [clips[row] for row in sorted(clips)])
    return report.failures


def missing_clips(index: ShardIndex, numbers: Iterable[int], folder: Path, reason: str) -> list[tuple[Path, str]]:
    """Return (shard, reason) of the clips of shards of audio that their finished shards of codes in `folder` lack."""
    missing = []
    for number in numbers:
        shard = index.shards[number]
        clips = sorted(set(range(shard.num_clips)) - stored_clips(folder / shard.file))
        missing += [(index.folder / shard.file, f"clip {clip} {reason}") for clip in clips]
    return missing


def stored_clips(path: Path) -> set[int]:
    """Return which clips of a shard of audio, numbered from 0, are in its finished shard of codes."""
    with tarfile.open(path, "r:") as tar:
        return {int(Path(name).stem) for name in tar.getnames()}


def encode_in_processes(
    options: EncodeConfig, todo: list[int], devices: Sequence[torch.device], folder: Path
) -> Iterator[tuple[int, list[tuple[Path, str]]]]:
    """Encode shards in one process per device, or on a Ray cluster; yield their numbers and failures as they are done.

    A Ray task gets a GPU if the first device is one.
    """
    if is_ray := options.executor == "ray":
        pool = ray_pool(num_gpus=int(devices[0].type == "cuda"))
    else:
        setup = partial(_use_device, [str(device) for device in devices])
        pool = worker_pool(len(devices), __name__, setup, max(1, num_cores() // len(devices)))
    with pool as map_ordered:
        yield from map_ordered(_encode_number, todo, options, devices[0].type if is_ray else None, folder)


_OWN_DEVICE: list[str] = []  # the device of this process of `encode_in_processes`


def _use_device(devices: Sequence[str], worker: int) -> None:
    _OWN_DEVICE[:] = [devices[worker]]


def _encode_number(number: int, options: EncodeConfig, device: str | None, folder: Path) -> list[tuple[Path, str]]:
    encoder, index = _loaded(json.dumps(options.to_plain()), device or _OWN_DEVICE[0])
    return encode_shard(encoder, options, index, number, folder)


@lru_cache(maxsize=1)
def _loaded(content: str, device: str) -> tuple[Encoder, ShardIndex]:
    options = EncodeConfig.parse(json.loads(content))
    return make_encoder(options, torch.device(device)), ShardIndex.load(Path(str(options.shards)))


def decode_shards(decoder: Decoder, folder: Path, out: Path, suffix: str, batch_seconds: float) -> Report:
    """Decode a folder of code shards into audio files named by the clips' ids; existing files are kept.

    Raises UserError when the codes do not fit the model or two ids make the same file name.
    """
    shards = CodeShards(folder)
    source, num_samples = shards.source, shards.arrays["num_samples"]
    decoder.check_format(folder, source.sampling_rate, source.num_channels, source.num_levels)
    ids = []
    for row in range(len(shards)):
        try:
            ids.append(str(shards.labels(row)["id"]))
        except (UserError, KeyError, TypeError):
            ids.append(f"row {row} of {len(shards)}")  # reading it will fail again, and then it is reported
    targets = [out / place for place in targets_of(ids, suffix)]
    if twice := next((target for target, count in Counter(targets).items() if count > 1), None):
        raise UserError(f"{folder}: two clips would become {twice}")
    todo = [row for row, target in enumerate(targets) if not target.exists()]
    seconds = (shards.arrays["num_frames"][todo] / source.frame_rate).tolist()
    report = Report(0, len(shards) - len(todo), [])

    def read(row: int) -> Tensor:
        """Read the codes [n, frames] of one clip."""
        return decoder.check(f"clip {row}", shards.read(row)[0], int(num_samples[row]))

    with progress("decoding", total=len(todo)) as bar:
        for outcomes in read_ahead(group_by_length(todo, seconds, batch_seconds), read):
            clips = report.successes(outcomes, lambda row: folder)
            decode_group(decoder, [(targets[row], codes, int(num_samples[row])) for row, codes in clips], report)
            bar.advance(len(outcomes), note=f"{len(report.failures)} failed" if report.failures else None)
    return report
