"""Compare the mel distance of reconstructions with three baselines: silence, noise and a low-pass filter.

A distance alone means little. An untrained or collapsed model outputs silence. The noise has the average spectrum of
the training set and only the level of the clip. The low-pass filter keeps everything below 2 kHz.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.audio.stft import normalized_stft
from moss_train.losses.reconstruction import multi_scale_mel_distance

BASELINES = ("silence", "noise", "low_pass")


@dataclass(frozen=True)
class Reconstructions:
    """A clip and its reconstructions by several systems, for example one per number of quantizer levels."""

    clip_id: str
    original: Tensor  # [C, T]
    outputs: Mapping[str, Tensor]  # name -> [C, T]


@dataclass(frozen=True)
class ClipDistances:
    """Mel distances between one clip and its reconstructions."""

    clip_id: str
    distances: Mapping[str, float]  # name of a system or baseline -> distance; 0 means identical


@dataclass(frozen=True)
class MelReport:
    """Mel distances of a set of clips. Every clip has the same columns."""

    clips: tuple[ClipDistances, ...]

    def means(self) -> dict[str, float]:
        """Return the mean of every system and baseline over clips; each clip counts once, whatever its length."""
        return {name: fmean(clip.distances[name] for clip in self.clips) for name in self.clips[0].distances}


def mel_report(
    clips: Iterable[Reconstructions], *, noise_spectrum: Tensor, sampling_rate: int, seed: int = 0
) -> MelReport:
    """Return the mel distance of every output and of the three baselines from the original, clip by clip.

    noise_spectrum [bins]: `mean_power_spectrum` of the training clips. The noise of a clip depends only on the seed
    and on the clip's place in the sequence. Raises ValueError if there is no clip or if the clips' columns differ.
    """
    results: list[ClipDistances] = []
    for index, clip in enumerate(clips):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        candidates = {
            **clip.outputs,
            "silence": torch.zeros_like(clip.original),
            "noise": shaped_noise(clip.original, noise_spectrum, generator),
            "low_pass": low_pass(clip.original, sampling_rate),
        }
        reference, length = clip.original[None], torch.tensor([clip.original.shape[-1]], device=clip.original.device)
        distances = {
            name: multi_scale_mel_distance(reference, audio.to(reference.device)[None], length, sampling_rate).item()
            for name, audio in candidates.items()
        }
        if results and distances.keys() != results[0].distances.keys():
            raise ValueError(f"clip {clip.clip_id} has {list(distances)}, expected {list(results[0].distances)}")
        results.append(ClipDistances(clip.clip_id, distances))
    if not results:
        raise ValueError("a mel report needs at least one clip, got none")
    return MelReport(tuple(results))


def mean_power_spectrum(clips: Iterable[Tensor], window_length: int = 2048) -> Tensor:
    """Return the mean power per frequency over all frames and channels of all clips [C, T].

    Returns [window_length // 2 + 1] float64. Raises ValueError if there is no clip.
    """
    total, num_frames = torch.zeros(window_length // 2 + 1, dtype=torch.float64), 0
    for clip in clips:
        power = normalized_stft(clip.cpu(), window_length, window_length // 4).abs().double().square()
        total += power.sum(dim=(0, 2))
        num_frames += power.shape[0] * power.shape[2]
    if num_frames == 0:
        raise ValueError("a mean spectrum needs at least one clip, got none")
    return total / num_frames


def shaped_noise(clip: Tensor, power_spectrum: Tensor, generator: torch.Generator) -> Tensor:
    """Return Gaussian noise, shaped by a power spectrum, with the RMS level of every channel of a clip [C, T]."""
    num_samples = clip.shape[-1]
    white = torch.fft.rfft(torch.randn(clip.shape, generator=generator))
    gain = F.interpolate(
        power_spectrum.float().sqrt().view(1, 1, -1), size=white.shape[-1], mode="linear", align_corners=True
    )
    noise = torch.fft.irfft(white * gain[0], n=num_samples).to(clip.device)
    level, own_level = (x.square().mean(-1, keepdim=True).sqrt() for x in (clip.float(), noise))
    return noise * (level / own_level.clamp(min=1e-12))


def low_pass(clip: Tensor, sampling_rate: int, cutoff_hz: float = 2000.0) -> Tensor:
    """Remove everything above `cutoff_hz` exactly: a brick wall on the Fourier transform of the whole clip [C, T].

    The Fourier transform treats the clip as periodic, so a jump between its two ends causes ringing at both.
    """
    spectrum = torch.fft.rfft(clip.float())
    frequencies = torch.fft.rfftfreq(clip.shape[-1], 1 / sampling_rate, device=clip.device)
    return torch.fft.irfft(spectrum.masked_fill(frequencies > cutoff_hz, 0), n=clip.shape[-1])
