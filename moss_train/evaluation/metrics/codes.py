"""Metrics of codes: codebook use level by level, and how well the trained text LM predicts the text from them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moss_train.batch import TASKS
from moss_train.config.build import build
from moss_train.evaluation.metrics.base import Column, Metric, Pair
from moss_train.model import MossAudioTokenizerModel
from moss_train.semantic import TextLM
from moss_train.utils.checkpoint import weights_under

RELIABLE_FRAMES = 10_000
"""With fewer frames entropies are estimated too low: at 500, a true entropy of 8.9 bits gives 8.0 (8.4 corrected)."""


@dataclass(frozen=True)
class CodebookUsage:
    """Statistics of one level over all frames."""

    level: int  # 1 is the first
    codebook_size: int
    num_frames: int
    usage: float  # share of codes that occur at all
    active_fraction: float  # share of codes that occur at least a tenth as often as in uniform use
    entropy: float  # bits, with the correction of Miller and Madow (1955) for the finite sample
    perplexity: float  # 2 ** entropy
    max_probability: float  # share of the most frequent code
    expected_usage: float  # usage that this many frames give when every code is equally likely

    @property
    def relative_entropy(self) -> float:
        """Entropy over log2 of the codebook's size: 1 is uniform use."""
        return self.entropy / math.log2(self.codebook_size) if self.codebook_size > 1 else 0.0


def count_codes(clips: Iterable[Tensor], codebook_sizes: Sequence[int]) -> list[Tensor]:
    """Return how often every code occurs: clips of codes [N, frames] -> for each level counts [V] int64."""
    counts = [torch.zeros(size, dtype=torch.int64) for size in codebook_sizes]
    for codes in clips:
        for level, row in enumerate(codes):
            counts[level] += torch.bincount(row, minlength=codebook_sizes[level])
    return counts


def codebook_usage(counts: Sequence[Tensor]) -> list[CodebookUsage]:
    """Return the statistics of every level from its counts [V]; levels without frames are left out."""
    levels = []
    for level, count in enumerate(counts, start=1):
        size, total = len(count), int(count.sum())
        if total == 0:
            continue
        present = count[count > 0].double()
        share = present / total
        correction = (len(present) - 1) / (2 * total * math.log(2))
        entropy = min(-(share * share.log2()).sum().item() + correction, math.log2(size))
        levels.append(
            CodebookUsage(
                level=level,
                codebook_size=size,
                num_frames=total,
                usage=len(present) / size,
                active_fraction=(count.double() >= 0.1 * total / size).double().mean().item(),
                entropy=entropy,
                perplexity=2**entropy,
                max_probability=share.max().item(),
                expected_usage=1 - (1 - 1 / size) ** total,
            )
        )
    return levels


def effective_bitrate(levels: Sequence[CodebookUsage], frame_rate: float, num_quantizers: int) -> float:
    """Return the bits per second that the first levels carry when every code costs its level's entropy."""
    return frame_rate * sum(level.entropy for level in levels[:num_quantizers])


def codebook_columns(num_quantizers: int) -> tuple[str, ...]:
    """Return the columns of `codebooks.csv`."""
    levels = range(1, num_quantizers + 1)
    each = [f"{name}/{level}" for name in ("usage", "perplexity") for level in levels]
    return ("update", "frames", "mean_usage", "mean_perplexity", *each)


def codebook_row(counts: Tensor) -> dict[str, float]:
    """Return the use of every level from counts [N, V]: share of codes that occur, and perplexity of their use.

    Empty when nothing was counted.
    """
    levels = codebook_usage(list(counts))
    if not levels:
        return {}
    return {
        "frames": levels[0].num_frames,
        "mean_usage": sum(level.usage for level in levels) / len(levels),
        "mean_perplexity": sum(level.perplexity for level in levels) / len(levels),
        **{f"usage/{level.level}": level.usage for level in levels},
        **{f"perplexity/{level.level}": level.perplexity for level in levels},
    }


class TextCrossEntropy(Metric):
    """Cross entropy in nats and accuracy per text token, from the states of the first levels; only clips with text.

    It has columns like the other metrics, but is computed from the codes, during reconstruction, not from pairs of
    waveforms.
    """

    description = "the text LM of the checkpoint, teacher forcing"
    columns = (
        Column("text_lm_loss", "LM nats/token", False, denominator="text_tokens", decimals=3),
        Column("text_accuracy", "LM accuracy", True, denominator="text_tokens", decimals=3),
    )

    def __init__(self, tokenizer: MossAudioTokenizerModel, text_lm: TextLM) -> None:
        self._tokenizer = tokenizer
        self._text_lm = text_lm.eval()

    def score(self, pair: Pair) -> dict[str, float]:
        """Return nothing: pairs have no codes."""
        return {}

    @torch.inference_mode()
    def measure(self, codes: Tensor, labels: Mapping[str, str]) -> dict[str, float]:
        """Return the sums over the text for codes [n, frames] of a clip's first n levels; empty without text."""
        if "text" not in labels:
            return {}
        device = next(self._text_lm.parameters()).device
        states = self._tokenizer.quantizer.decode(codes[:, None].to(device))
        tokens = self._text_lm.text(labels["text"])
        prediction = self._text_lm(
            states,
            torch.tensor([states.shape[1]]),
            torch.tensor([tokens], device=device),
            torch.tensor([len(tokens)]),
            torch.tensor([TASKS.index(labels.get("task", "asr"))], device=device),
        )
        return {
            "text_lm_loss": prediction.loss_sum.item(),
            "text_accuracy": float(prediction.num_correct.item()),
            "text_tokens": float(prediction.num_tokens),
        }


def text_lm_of_checkpoint(checkpoint: Mapping[str, Any], latent_dim: int) -> TextLM | None:
    """Return the text LM of a loaded training checkpoint; None if it was trained without one. Raises UserError."""
    node = checkpoint["hyper_parameters"].get("semantic")
    if not node:
        return None
    with torch.random.fork_rng(devices=[]):
        text_lm = build(node, path="semantic", latent_dim=latent_dim)
    text_lm.load_state_dict(weights_under("semantic.", checkpoint["state_dict"]))
    return text_lm
