"""Speaker similarity by the GE2E encoder whose weights lie in the Resemblyzer package, which need not be importable.

The encoder is that of generalized end-to-end loss (arXiv 1710.10467). Different speakers score 0.5 to 0.8 with it, so
the column is not comparable with the published SIM, which is WavLM's.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moss_train.audio.stft import mel_bank
from moss_train.evaluation.metrics.base import Column, MetricError, Pair, package_version

SAMPLING_RATE = 16_000
WINDOW_LENGTH = 400
HOP_LENGTH = 160
NUM_MELS = 40
PARTIAL_FRAMES = 160  # 1.6 s
PARTIAL_STEP = 77  # frames; 1.3 windows per second
MIN_COVERAGE = 0.75  # of the last window
SMALLEST_SECONDS = 0.3


@dataclass(frozen=True)
class Ge2eSimilarity:
    """Cosine of GE2E embeddings of reference and reconstruction, at 16 kHz."""

    weights: str | None = None  # path of pretrained.pt, None for the one in the Resemblyzer package
    columns = (Column("sim_ge2e", "SIM-GE2E", True, is_speech_only=True, decimals=3),)

    @property
    def description(self) -> str:
        """See `Metric`."""
        return f"GE2E, {Path(self.weights).name if self.weights else 'Resemblyzer ' + package_version('Resemblyzer')}"

    def missing(self) -> str | None:
        """See `Metric`."""
        path = self._path()
        if path is None:
            return "package Resemblyzer is not installed (pip install --no-deps Resemblyzer is enough)"
        return None if path.is_file() else f"there is no {path}"

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for silence and for less than 0.3 s."""
        path = self._path()
        assert path is not None
        encoder = load_ge2e(str(path))
        wanted, got = pair.at(SAMPLING_RATE)
        if len(wanted) < SMALLEST_SECONDS * SAMPLING_RATE:
            raise MetricError(f"less than {SMALLEST_SECONDS} seconds")
        if not wanted.any() or not got.any():
            raise MetricError("reference or reconstruction is silent")
        return {"sim_ge2e": min(1.0, F.cosine_similarity(encoder.embed(wanted), encoder.embed(got), dim=0).item())}

    def _path(self) -> Path | None:
        if self.weights is not None:
            return Path(self.weights)
        # Asking where the package lies does not import it: its own imports fail beside a new setuptools.
        spec = find_spec("resemblyzer")
        folders = list(spec.submodule_search_locations or []) if spec is not None else []
        return Path(folders[0]) / "pretrained.pt" if folders else None


class Ge2eEncoder(nn.Module):
    """Three LSTM layers over 40 mel powers; names of the parts are those of the weights."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.lstm = nn.LSTM(NUM_MELS, width, num_layers=3, batch_first=True)
        self.linear = nn.Linear(width, width)

    def forward(self, mels: Tensor) -> Tensor:
        """Mel powers [B, frames, 40] -> unit embeddings [B, width]."""
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(F.relu(self.linear(hidden[-1])), dim=1)

    @torch.no_grad()
    def embed(self, audio: Tensor) -> Tensor:
        """Unit embedding [width] of audio [T]: the mean over windows of 1.6 s."""
        starts = partial_starts(len(audio))
        end = (starts[-1] + PARTIAL_FRAMES) * HOP_LENGTH
        mels = mel_powers(F.pad(audio, (0, max(0, end - len(audio)))))
        windows = torch.stack([mels[start : start + PARTIAL_FRAMES] for start in starts])
        return F.normalize(self(windows).mean(0), dim=0)


def partial_starts(num_samples: int) -> list[int]:
    """First frame of every window; the last one is kept when audio covers three quarters of it."""
    frames = math.ceil((num_samples + 1) / HOP_LENGTH)
    starts = list(range(0, max(1, frames - PARTIAL_FRAMES + PARTIAL_STEP + 1), PARTIAL_STEP))
    covered = (num_samples - starts[-1] * HOP_LENGTH) / (PARTIAL_FRAMES * HOP_LENGTH)
    return starts[:-1] if covered < MIN_COVERAGE and len(starts) > 1 else starts


def mel_powers(audio: Tensor) -> Tensor:
    """Audio [T] -> Slaney mel powers [frames, 40], without logarithm."""
    spectrum = torch.stft(
        audio,
        WINDOW_LENGTH,
        HOP_LENGTH,
        window=torch.hann_window(WINDOW_LENGTH),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = spectrum.abs().square().T
    return power @ mel_bank(SAMPLING_RATE, WINDOW_LENGTH, NUM_MELS, torch.device("cpu"))


@lru_cache(maxsize=2)
def load_ge2e(path: str) -> Ge2eEncoder:
    """The encoder with the weights of a file."""
    weights = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
    encoder = Ge2eEncoder()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return encoder.eval()
