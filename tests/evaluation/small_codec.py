"""A trivial codec, so that tests of the evaluation do not need a model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moss_train.batch import ListedClip
from moss_train.evaluation.metrics.signal import PROFILES, SiSdr, SpectralDistances
from moss_train.evaluation.reconstruct import CodecReconstructor
from moss_train.evaluation.report.write import Evaluation
from moss_train.evaluation.results import Results
from moss_train.evaluation.runner import evaluate
from moss_train.utils.errors import UserError

RATE = 24_000


class BitCodec:
    """Level n adds the n-th bit of the amplitude: 24 kHz, eight levels with two codes each."""

    name = "bits"
    sampling_rate = output_sampling_rate = RATE
    num_channels = 1
    frame_rate = float(RATE)
    codebook_sizes = (2,) * 8
    fingerprint = "1"

    def __init__(self) -> None:
        self.num_encoded = 0

    def encode(self, audio: Tensor) -> Tensor:
        self.num_encoded += 1
        level = ((audio[0].clamp(-1, 0.999) + 1) * 128).long()
        return torch.stack([(level >> shift) & 1 for shift in range(7, -1, -1)])

    def decode(self, codes: Tensor) -> Tensor:
        weights = 2.0 ** -torch.arange(len(codes))[:, None]
        return ((codes * weights).sum(0) - 1 + 0.5 * weights[-1])[None]


def clip_of(audio: Tensor, name: str, domain: str = "speech", **labels: str) -> ListedClip:
    """Return a clip [C, T] at 24 kHz that is held in memory."""
    return ListedClip(name, domain, lambda: (audio, RATE), labels)


def unreadable(name: str) -> ListedClip:
    """Return a clip that raises an error when it is read."""

    def read() -> tuple[Tensor, int]:
        raise UserError(f"{name} is damaged")

    return ListedClip(name, "speech", read)


def tones(count: int) -> Sequence[ListedClip]:
    """Return clips of one second, each with different tones."""
    time = torch.arange(RATE) / RATE
    waves = [
        0.4 * torch.sin(2 * torch.pi * (200 + 70 * i) * time) * torch.sin(2 * torch.pi * time) for i in range(count)
    ]
    return [clip_of(wave[None], f"tone {index}") for index, wave in enumerate(waves)]


METRICS = {"spectral": SpectralDistances(PROFILES["official"]), "si_sdr": SiSdr()}
SETTINGS = {"codec": "bits"}


def run(folder: Path, clips: Sequence[ListedClip], levels: Sequence[int] = (1, 4, 8), **options):
    """Evaluate the codec in a folder; return the evaluation and the codec."""
    codec = BitCodec()
    reconstructor = CodecReconstructor(codec, levels, clips)
    results = Results(folder, SETTINGS)
    rows = evaluate(clips, reconstructor, METRICS, results, **options)
    evaluation = Evaluation(tuple(rows), reconstructor.conditions, METRICS, {}, results, PROFILES["official"], codec)
    return evaluation, codec
