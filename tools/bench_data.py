"""Measure how many seconds of audio one core reads per second of CPU time: plain decoding and the whole pipeline.

    python tools/bench_data.py recipes/quickstart/audio               # --seconds: how much audio to make, 1800
    python tools/bench_data.py recipes/quickstart/audio --output-sampling-rate 48000    # batches with a target

Joins the recordings of a folder into clips of 10 s, writes them as FLAC, Ogg Opus and WAV, packs them, and reads them
as files, as training batches from local shards, and as training batches through a local HTTP server, first with an
empty cache and then with a full one. Each number is the median of five runs, except for steps that are done once. CPU
time is measured because other work on the machine affects it less. With an output rate, all audio is stored at that
rate, and training batches hold the clips at both rates, as for a decoder with another rate than the encoder.
"""

import argparse
import functools
import http.server
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import soundfile
import torch

from moss_train.audio.io import read_audio
from moss_train.config.schema import PackConfig
from moss_train.data.pack.manifest import list_clips
from moss_train.data.pack.pack import pack
from moss_train.data.shards.remote import CACHE_VARIABLE
from moss_train.data.stream.loader import make_loader
from moss_train.data.stream.stream import AudioStream, ClipFormat

RATE = 24000  # of the encoder, in Hz
CLIP_SECONDS = 10
TIMES = 5
FORMATS = {"flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS"), "wav": ("WAV", "PCM_16")}


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A file server that does not log requests."""

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


def make_clips(folder: Path, seconds: int, rate: int) -> Iterator[torch.Tensor]:
    """Yield clips of real audio, repeating the recordings as often as needed."""
    files = sorted(folder.rglob("*.flac")) + sorted(folder.rglob("*.wav"))
    audio = torch.cat([read_audio(file, sampling_rate=rate, num_channels=1)[0] for file in files], dim=1)
    length = rate * CLIP_SECONDS
    for number in range(seconds // CLIP_SECONDS):
        yield audio.roll(-number * length // 2, dims=1)[:, :length]


def measure(name: str, seconds: float, action: Callable[[], object], times: int = TIMES) -> None:
    """Print one line of results: the median over `times` repetitions."""
    speeds = []
    for _ in range(times):
        begin = time.process_time()
        action()
        speeds.append(seconds / (time.process_time() - begin))
    print(f"{name:<36} {statistics.median(speeds):>8,.0f} audio seconds per CPU second", flush=True)


def read_stream(source: str, seconds: float, rate: int) -> None:
    """Read at least `seconds` of training batches in this process, from shards at the decoder's rate."""
    clip_format = ClipFormat(RATE, 1, 1920, output_sampling_rate=rate)
    stream = AudioStream([source], clip_format, crop_seconds=CLIP_SECONDS)
    updates = [(number, 60.0) for number in range(int(seconds) // 60)]
    loader = make_loader(stream, text_encoder=None, position=0, updates=updates, micro_batch_seconds=60.0)
    found = sum(int(batch.reference_lengths.sum()) for update in loader for batch in update.micro_batches)
    assert found == len(updates) * 60 * rate, found


def bench_files(folder: Path, clips: list[torch.Tensor], rate: int) -> None:
    """Decode single files of every format and print the speeds."""
    for suffix, (container, subtype) in FORMATS.items():
        place = folder / suffix
        place.mkdir()
        for number, clip in enumerate(clips):
            soundfile.write(place / f"{number}.{suffix}", clip[0].numpy(), rate, format=container, subtype=subtype)
        measure(f"files, {suffix}", len(clips) * CLIP_SECONDS, functools.partial(read_files, place, rate))


def read_files(folder: Path, rate: int) -> None:
    """Decode every file of a folder."""
    for path in sorted(folder.iterdir()):
        read_audio(path, sampling_rate=rate, num_channels=1)


def bench_remote(shards: Path, folder: Path, seconds: float, rate: int) -> None:
    """Read training batches through a local HTTP server, with an empty and with a full cache."""
    os.environ[CACHE_VARIABLE] = str(folder / "cache")
    handler = functools.partial(QuietHandler, directory=str(shards))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    measure("training batches, remote, first", seconds, lambda: read_stream(url, seconds, rate), times=1)
    measure("training batches, remote, cached", seconds, lambda: read_stream(url, seconds, rate))
    server.shutdown()


def pack_clips(folder: Path, rate: int) -> None:
    """Pack the FLAC files."""
    config = PackConfig(str(folder / "flac"), str(folder / "shards"), "audio", sampling_rate=rate, num_workers=1)
    pack(list_clips(folder / "flac", "audio"), config)


def main() -> None:
    """Run every measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--seconds", type=int, default=1800, help="of audio to make")
    parser.add_argument("--output-sampling-rate", type=int, default=RATE, help="of the decoder, a multiple of 24000")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds, rate = options.seconds, options.output_sampling_rate
    clips = list(make_clips(options.recordings, seconds, rate))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_files(folder, clips, rate)
        measure("pack, flac to flac", len(clips) * CLIP_SECONDS, functools.partial(pack_clips, folder, rate), times=1)
        local = str(folder / "shards")
        measure("training batches, local", seconds, lambda: read_stream(local, seconds, rate))
        bench_remote(folder / "shards", folder, seconds, rate)


if __name__ == "__main__":
    main()
