"""Show in which frequencies a reconstruction sounds unnatural: level, match and pitch pulses by band.

    python recipes/cat_mini/bands.py recipes/cat_mini data/cc0_voices/heldout.jsonl
    python recipes/cat_mini/bands.py noise data/cc0_voices/heldout.jsonl    # noise in place of a model's output

- level: energy of the reconstruction over that of the recording, in dB.
- correlation: of the two waveforms in the band; 1 if the phase is preserved.
- pulses: how much the envelope of the band fluctuates at 80 to 400 Hz, the rates of the vocal folds, relative to the
  recording, in dB (the metric `pulses`).
- DistillMOS of the recording with this band and all above it (or all below its upper end) taken from the
  reconstruction, if the package distillmos is installed.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from moss_train.audio.io import read_audio
from moss_train.evaluation.metrics.base import Pair
from moss_train.evaluation.metrics.pitch import VoicePulses
from moss_train.evaluation.metrics.signal import DistillMos
from moss_train.model import MossAudioTokenizerModel

PEAK = 0.7  # the peak level that cat_mini was trained at
EVERY = 5  # every fifth clip of the manifest is measured
NOISE_RATE = 24000  # Hz
EDGES = (0, 500, 1000, 2000, 4000, 6000, 8000)  # Hz


@torch.inference_mode()
def main(folder: str, manifest: Path) -> None:
    """Print one line per band, as means over clips."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = None if folder == "noise" else MossAudioTokenizerModel.from_pretrained(folder).eval()
    rate = NOISE_RATE if model is None else model.sampling_rate
    mos = None if DistillMos().missing() else DistillMos()
    rows: dict[tuple[int, int], list[dict[str, float]]] = {band: [] for band in pairwise(EDGES)}
    for entry in map(json.loads, manifest.read_text("utf-8").splitlines()[::EVERY]):
        audio, _ = read_audio(manifest.parent / entry["path"], sampling_rate=rate, num_channels=1)
        audio = audio * (PEAK / audio.abs().max())
        if model is None:
            restored = noise_like(audio)
        else:
            codes = model.encode(audio[None], return_dict=True).audio_codes
            restored = model.decode(codes, return_dict=True).audio[0, :, : audio.shape[1]]
        for (low, high), values in rows.items():
            real, got = (band_pass(clip, rate, low, high) for clip in (audio, restored))
            row = {
                "level": 10 * torch.log10(got.square().sum() / real.square().sum()).item(),
                "correlation": ((real * got).sum() / (real.norm() * got.norm())).item(),
                "pulses": VoicePulses((low, high)).score(Pair(audio, restored, rate))["pulses"],
            }
            if mos is not None:
                above = band_pass(audio, rate, 0, low) + band_pass(restored, rate, low, rate)
                below = band_pass(restored, rate, 0, high) + band_pass(audio, rate, high, rate)
                row["mos_above"] = mos.score(Pair(audio, above, rate))["distillmos"]
                row["mos_below"] = mos.score(Pair(audio, below, rate))["distillmos"]
            values.append(row)
    names = list(rows[EDGES[:2]][0])
    print("| Hz | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for (low, high), values in rows.items():
        print(f"| {low}-{high} | " + " | ".join(f"{fmean(row[name] for row in values):.2f}" for name in names) + " |")


def band_pass(clip: Tensor, rate: int, low: float, high: float) -> Tensor:
    """Keep the frequencies from `low` to below `high` Hz of a clip [C, T]."""
    spectrum = torch.fft.rfft(clip)
    frequency = torch.fft.rfftfreq(clip.shape[-1], 1 / rate)
    return torch.fft.irfft(spectrum * ((frequency >= low) & (frequency < high)), n=clip.shape[-1])


def noise_like(audio: Tensor) -> Tensor:
    """Return noise with the spectrum of a clip [1, T], averaged over 25 ms: windows of 20 ms, five frames at a time."""
    length = NOISE_RATE // 50
    window = torch.hann_window(length)
    spectrum = torch.stft(audio, length, length // 4, window=window, return_complex=True)
    power = torch.nn.functional.avg_pool1d(spectrum.abs().square(), 5, 1, 2, count_include_pad=False)
    noise = torch.stft(torch.randn_like(audio), length, length // 4, window=window, return_complex=True)
    noise = noise * (power / noise.abs().square().mean()).sqrt()
    return torch.istft(noise, length, length // 4, window=window, length=audio.shape[1])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
