"""How many seconds of audio per second one core reads: plain decoding by format, and the whole training pipeline.

    python tools/bench_data.py recipes/quickstart/audio [seconds of audio to make, 1800 by default]

Joins the recordings of a folder to clips of 10 s, writes them as FLAC, Ogg Opus and WAV, packs them, and reads them as
files, as training batches from local shards, and from shards behind a local HTTP server, first and cached.
"""

import functools
import http.server
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import soundfile
import torch

from moss_train.audio import read_audio
from moss_train.data.clips import PackOptions
from moss_train.data.loader import make_loader
from moss_train.data.manifest import list_clips
from moss_train.data.packing import pack
from moss_train.data.remote import CACHE_VARIABLE
from moss_train.data.stream import AudioStream, ClipFormat

RATE = 24000
CLIP_SECONDS = 10
FORMATS = {"flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS"), "wav": ("WAV", "PCM_16")}


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A file server that does not write a line per request."""

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def make_clips(folder: Path, seconds: int) -> Iterator[torch.Tensor]:
    """Yield clips of real audio, repeating the recordings as often as needed."""
    files = sorted(folder.rglob("*.flac")) + sorted(folder.rglob("*.wav"))
    audio = torch.cat([read_audio(file, sampling_rate=RATE, num_channels=1)[0] for file in files], dim=1)
    length = RATE * CLIP_SECONDS
    for number in range(seconds // CLIP_SECONDS):
        yield audio.roll(-number * length // 2, dims=1)[:, :length]


def report(name: str, seconds: float, begin: float) -> None:
    """Print one line of the result."""
    elapsed = time.perf_counter() - begin
    print(f"{name:<44} {seconds / elapsed:>8,.0f} audio seconds per second")


def read_stream(source: str, seconds: float) -> Iterable:
    """Read so many seconds of training batches in this process."""
    stream = AudioStream([source], ClipFormat(RATE, 1, 1920), crop_seconds=CLIP_SECONDS)
    updates = [(number, 60.0) for number in range(int(seconds) // 60)]
    return make_loader(stream, text_encoder=None, position=0, updates=updates, micro_batch_seconds=60.0)


def bench_files(folder: Path, clips: list[torch.Tensor]) -> None:
    """Decode single files of every format."""
    for suffix, (container, subtype) in FORMATS.items():
        place = folder / suffix
        place.mkdir()
        for number, clip in enumerate(clips):
            soundfile.write(place / f"{number}.{suffix}", clip[0].numpy(), RATE, format=container, subtype=subtype)
        begin = time.perf_counter()
        for path in sorted(place.iterdir()):
            read_audio(path, sampling_rate=RATE, num_channels=1)
        report(f"files, {suffix}", len(clips) * CLIP_SECONDS, begin)


def bench_stream(name: str, source: str, seconds: float) -> None:
    """Read training batches."""
    begin = time.perf_counter()
    found = sum(
        int(batch.audio_lengths.sum()) for update in read_stream(source, seconds) for batch in update.micro_batches
    )
    report(name, found / RATE, begin)


def bench_remote(shards: Path, folder: Path, seconds: float) -> None:
    """Read training batches through a local HTTP server, with an empty and with a full cache."""
    os.environ[CACHE_VARIABLE] = str(folder / "cache")
    handler = functools.partial(QuietHandler, directory=str(shards))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    bench_stream("training batches, remote, first", url, seconds)
    bench_stream("training batches, remote, cached", url, seconds)
    server.shutdown()


def main() -> None:
    """Run every measurement."""
    torch.set_num_threads(1)
    recordings, seconds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1800
    clips = list(make_clips(recordings, seconds))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_files(folder, clips)
        begin = time.perf_counter()
        pack(list_clips(folder / "flac", "audio"), folder / "shards", PackOptions(), num_workers=1)
        report("pack, flac to flac", len(clips) * CLIP_SECONDS, begin)
        bench_stream("training batches, local, first", str(folder / "shards"), seconds)
        bench_stream("training batches, local, again", str(folder / "shards"), seconds)
        bench_remote(folder / "shards", folder, seconds)


if __name__ == "__main__":
    main()
