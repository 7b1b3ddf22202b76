"""Score codes with the jointly trained text LM: how much of the text they preserve."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moss_train.batch import TASKS
from moss_train.config.build import build
from moss_train.evaluation.metrics.base import Column, Pair
from moss_train.model import MossAudioTokenizerModel
from moss_train.semantic import TextLM

PREFIX = "semantic."


class TextCrossEntropy:
    """Cross entropy in nats and accuracy per text token, from the states of the first levels; clips with text only.

    It is a metric with columns like the others, but measures codes, where they are made, instead of pairs of waveforms.
    """

    columns = (
        Column("text_nats", "LM nats/token", False, denominator="text_tokens", decimals=3),
        Column("text_correct", "LM accuracy", True, denominator="text_tokens", decimals=3),
    )

    def __init__(self, tokenizer: MossAudioTokenizerModel, text_lm: TextLM) -> None:
        self._tokenizer = tokenizer
        self._text_lm = text_lm.eval()

    @property
    def description(self) -> str:
        """See `Metric`."""
        return "the text LM of the checkpoint, teacher forcing"

    def missing(self) -> str | None:
        """Nothing is ever missing."""
        return None

    def score(self, pair: Pair) -> dict[str, float]:
        """Nothing: pairs have no codes."""
        return {}

    @torch.inference_mode()
    def measure(self, codes: Tensor, labels: Mapping[str, str]) -> dict[str, float]:
        """Sums for the first n levels [n, frames] of a clip; empty without text."""
        if "text" not in labels:
            return {}
        device = next(self._text_lm.parameters()).device
        states = self._tokenizer.quantizer.decode(codes[:, None].to(device))
        tokens = self._text_lm.text(labels["text"])
        task = TASKS.index(labels.get("task", "asr"))
        counts = (torch.tensor([count]) for count in (states.shape[1], len(tokens)))
        num_frames, text_lengths = counts
        prediction = self._text_lm(
            states, num_frames, torch.tensor([tokens], device=device), text_lengths, torch.tensor([task], device=device)
        )
        return {
            "text_nats": prediction.loss_sum.item(),
            "text_correct": float(prediction.num_correct.item()),
            "text_tokens": float(prediction.num_tokens),
        }


def text_lm_of_checkpoint(checkpoint: Mapping[str, Any], latent_dim: int) -> TextLM | None:
    """The text LM of a loaded training checkpoint; None when it was trained without. Raises UserError."""
    node = checkpoint["hyper_parameters"].get("semantic")
    if not node:
        return None
    weights = checkpoint["state_dict"]
    with torch.random.fork_rng(devices=[]):
        text_lm = build(node, path="semantic", latent_dim=latent_dim)
    text_lm.load_state_dict({name.removeprefix(PREFIX): weights[name] for name in weights if name.startswith(PREFIX)})
    return text_lm
