"""Measure the cost of reading audio: processor time per minute of audio, ours and libsndfile's alone, in one run.

python tools/bench_read.py [minutes]
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from moss_train.audio import io
from moss_train.audio.io import audio_info, read_audio

RATE = 24000
CLIP_SECONDS, NUM_CLIPS = 5, 40
SEGMENT_SECONDS = 30
FORMATS = {
    "wav": {"format": "WAV"},
    "flac": {"format": "FLAC"},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3"},
}


def processor_seconds(work: Callable[[], object]) -> float:
    """Return the processor time of the fastest of three runs, each without cached file scans."""
    times = []
    for _ in range(3):
        io._scan_file.cache_clear()
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def write(path: Path, samples: np.ndarray, options: dict[str, str]) -> None:
    """Write a file in blocks: libsndfile's Vorbis encoder overflows its stack if it gets minutes of audio at once."""
    with soundfile.SoundFile(path, "w", RATE, 1, **options) as file:
        for start in range(0, len(samples), RATE):
            file.write(samples[start : start + RATE])


def segments(path: Path) -> None:
    """Read a file in parts, as `pack` does."""
    total = audio_info(path).num_samples
    for start in range(0, total, SEGMENT_SECONDS * RATE):
        read_audio(path, start=start, num_samples=min(SEGMENT_SECONDS * RATE, total - start))


def measure(paths: list[Path], minutes: float) -> list[float]:
    """Return processor seconds per minute of audio: of libsndfile alone, and ours."""
    alone = processor_seconds(lambda: [soundfile.read(path, dtype="float32") for path in paths])
    return [alone / minutes, processor_seconds(lambda: [read_audio(path) for path in paths]) / minutes]


def main() -> None:
    """Print one row per format."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    noise = np.random.default_rng(0).standard_normal(int(minutes * 60 * RATE))
    long = (np.convolve(noise, np.hanning(64), "same") * 0.02).astype(np.float32)
    print(f"milliseconds of processor per minute of audio; clips of {CLIP_SECONDS} s, one file of {minutes:g} min")
    print("format  clips: libsndfile  ours | file: libsndfile  ours  in parts")
    with tempfile.TemporaryDirectory() as folder:
        for name, options in FORMATS.items():
            clips = [Path(folder, f"{name}-{number}") for number in range(NUM_CLIPS)]
            for number, path in enumerate(clips):
                write(path, long[number * RATE :][: CLIP_SECONDS * RATE], options)
            whole = Path(folder, name)
            write(whole, long, options)
            row = measure(clips, NUM_CLIPS * CLIP_SECONDS / 60) + measure([whole], minutes)
            row.append(processor_seconds(partial(segments, whole)) / minutes)
            print(name.ljust(8), "  ".join(f"{1000 * value:8.2f}" for value in row))


if __name__ == "__main__":
    main()
