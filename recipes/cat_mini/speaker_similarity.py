"""Example of a custom metric: speaker similarity of original and reconstruction, with Resemblyzer's GE2E encoder.

    pip install resemblyzer 'setuptools<81'     # its dependency webrtcvad imports pkg_resources
    PYTHONPATH=recipes/cat_mini python -m moss_train evaluate plugins=[speaker_similarity] out=out/same \\
        'metrics=[{_target_: speaker_similarity.SpeakerSimilarity}]' model=recipes/cat_mini data=clips.jsonl

The encoder's weights are part of the package, so nothing else is downloaded. The table of the paper uses WavLM
(`metrics=[speaker] speaker_model=...`); its values are not comparable with these.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from moss_train.evaluation.metrics.base import Column, Pair, missing_package
from moss_train.utils.files import package_version

SAMPLING_RATE = 16000


@dataclass(frozen=True)
class SpeakerSimilarity:
    """Cosine similarity of the speaker embeddings of a recording and of its reconstruction (Wan et al. 2018)."""

    columns = (Column("speaker_similarity", "Speaker sim. (GE2E)", is_higher_better=True),)

    @property
    def description(self) -> str:
        """Return the name of the encoder: only values with equal descriptions are compared."""
        return f"GE2E of Resemblyzer {package_version('resemblyzer')}"

    def missing(self) -> str | None:
        """Return what has to be installed first, or None."""
        return missing_package("resemblyzer", "pip install resemblyzer 'setuptools<81'")

    def score(self, pair: Pair) -> dict[str, float]:
        """Embed both clips [T] at 16 kHz and return their similarity."""
        reference, degraded = (embed(clip) for clip in pair.at(SAMPLING_RATE))
        return {"speaker_similarity": float(reference @ degraded)}


def embed(clip: Tensor) -> np.ndarray:
    """Return the embedding [256] of a clip [T] at 16 kHz, of unit length."""
    vector: np.ndarray = load_encoder().embed_utterance(clip.numpy())
    return vector


@lru_cache(maxsize=1)
def load_encoder() -> Any:
    """Load the encoder once per process."""
    from resemblyzer import VoiceEncoder

    return VoiceEncoder("cpu", verbose=False)
