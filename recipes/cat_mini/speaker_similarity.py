"""A metric of your own, in use: does a reconstruction sound like the same speaker? By the GE2E encoder of Resemblyzer.

    pip install resemblyzer 'setuptools<81'     # webrtcvad, which it needs, asks for pkg_resources
    PYTHONPATH=recipes/cat_mini python -m moss_train evaluate plugins=[speaker_similarity] out=out/same \\
        'metrics=[{_target_: speaker_similarity.SpeakerSimilarity}]' model=recipes/cat_mini data=clips.jsonl

Its weights come with the package, so that it needs no download; the paper's table uses WavLM
(`metrics=[speaker] speaker_model=...`), whose values are not comparable.
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
    """Cosine of the angle between the speaker embeddings of a recording and of its reconstruction (Wan et al. 2018)."""

    columns = (Column("speaker_similarity", "Speaker sim. (GE2E)", is_higher_better=True),)

    @property
    def description(self) -> str:
        """Name the encoder: only values of equal descriptions are compared."""
        return f"GE2E of Resemblyzer {package_version('resemblyzer')}"

    def missing(self) -> str | None:
        """Return what has to be installed first, if anything."""
        return missing_package("resemblyzer", "pip install resemblyzer 'setuptools<81'")

    def score(self, pair: Pair) -> dict[str, float]:
        """Embed both clips [T] at 16 kHz and compare."""
        reference, degraded = (embed(clip) for clip in pair.at(SAMPLING_RATE))
        return {"speaker_similarity": float(reference @ degraded)}


def embed(clip: Tensor) -> np.ndarray:
    """Return the unit vector [256] of a clip [T] at 16 kHz."""
    vector: np.ndarray = load_encoder().embed_utterance(clip.numpy())
    return vector


@lru_cache(maxsize=1)
def load_encoder() -> Any:
    """Load the encoder once per process."""
    from resemblyzer import VoiceEncoder

    return VoiceEncoder("cpu", verbose=False)
