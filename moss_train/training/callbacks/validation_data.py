"""Held-out clips in memory, in the format of the training clips, and the scores of their reconstructions.

The same clips are used in every validation of a run. Scores are computed from sums over clips, which add up over ranks.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.audio.io import convert_channels, resample
from moss_train.data.clips import ListedClip, list_sources
from moss_train.data.stream.sample_reader import adjust_level
from moss_train.data.stream.stream import ClipFormat
from moss_train.evaluation.metrics.codes import codebook_row
from moss_train.model import MossAudioTokenizerModel
from moss_train.utils.errors import UserError


@dataclass(frozen=True)
class HeldOutClip:
    """One clip of the validation."""

    id: str
    domain: str
    audio: Tensor  # [C, T] at the encoder's rate, padded to whole frames
    target: Tensor  # [C, T'] at the decoder's rate, without padding: what is to be reconstructed
    text: str | None
    task: str


def load_held_out(
    sources: Sequence[str], clip_format: ClipFormat, *, max_clips: int, max_seconds: float
) -> list[HeldOutClip]:
    """Read at most `max_clips` clips of packed folders, folders or manifests, alternating between domains, with and
    without text.

    The choice depends on the ids alone. A clip longer than `max_seconds` is cut to that length; its text is not used,
    as in training.

    Raises:
        UserError: there are no clips, or one cannot be read; this happens before the training, not in the middle of it.
    """
    try:
        # Take one clip of each domain, with and without text, in turn; the order is random, but always the same.
        groups: dict[tuple[str, bool], list[ListedClip]] = defaultdict(list)
        listed = list_sources(sources, "heldout", "validation.data")
        for clip in sorted(listed, key=lambda clip: hashlib.sha256(clip.id.encode()).digest()):
            groups[clip.domain, "text" not in clip.labels].append(clip)
        turns = zip_longest(*(groups[key] for key in sorted(groups)))
        chosen = [clip for turn in turns for clip in turn if clip is not None][:max_clips]
        clips = [read_clip(clip, clip_format, max_seconds) for clip in chosen]
    except UserError as error:
        raise UserError(f"validation.data: {error}") from error
    if not clips:
        raise UserError(f"validation.data={list(sources)} has no clips")
    return clips


def read_clip(clip: ListedClip, clip_format: ClipFormat, max_seconds: float) -> HeldOutClip:
    """Read one clip in the format of training, including its level."""
    audio, rate = clip.read()
    if audio.shape[-1] == 0:
        raise UserError(f"{clip.id} has no samples")
    limit = round(max_seconds * rate)
    text = clip.labels.get("text") if audio.shape[-1] <= limit else None
    audio = convert_channels(audio[:, :limit], clip_format.num_channels, clip.id)
    stored = resample(audio, rate, clip_format.stored_rate)
    stored = adjust_level(stored, clip_format, 0.5)  # the middle of the range of random gains
    audio = resample(stored, clip_format.stored_rate, clip_format.sampling_rate)
    padded = F.pad(audio, (0, -audio.shape[-1] % clip_format.hop_length))
    target = padded[:, : audio.shape[-1]] if clip_format.output_ratio == 1 else stored
    return HeldOutClip(clip.id, clip.domain, padded, target, text, clip.labels.get("task", "asr"))


NO_AUDIO = ("other", "silent")
"""Inputs of the text LM in place of the clip, for its loss without the audio: another clip, or all states zero."""


@dataclass(frozen=True)
class DecodedClip:
    """Codes, states and audio that a tokenizer computes from one clip."""

    codes: Tensor  # [N, F]
    states: Mapping[int, Tensor]  # number of levels -> [1, F, D] after the quantizer
    audio: Mapping[int, Tensor]  # number of levels -> [C, T'] as long as the clip's target


def depths(num_quantizers: int, wanted: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the numbers of levels to decode, ascending: the wanted ones (by default one, a quarter and half of all),
    and always all.
    """
    chosen = wanted or (1, num_quantizers // 4, num_quantizers // 2)
    return tuple(sorted({max(1, count) for count in (*chosen, num_quantizers)}))


def reconstruct(tokenizer: MossAudioTokenizerModel, clip: HeldOutClip, levels: Sequence[int]) -> DecodedClip:
    """Encode once and decode every prefix of levels, with the modules of the training (they may be sharded)."""
    latent = tokenizer.encode_latent(clip.audio[None].to(tokenizer.device))
    outputs = {count: tokenizer.quantizer(latent, torch.tensor([count], device=latent.device)) for count in levels}
    states = {count: output.quantized for count, output in outputs.items()}
    audio = {
        count: tokenizer.decode_latent(state)[0, :, : clip.target.shape[-1]].float() for count, state in states.items()
    }
    return DecodedClip(outputs[levels[-1]].codes[:, 0], states, audio)


def scores(sums: Mapping[str, float], counts: Tensor, levels: Sequence[int]) -> dict[str, float]:
    """Return the row of a validation from sums over all clips of all ranks.

    Mel distances are means over clips. `text_lm_loss` is the LM's cross entropy per text token.
    `text_lm_loss_no_audio` is the smaller of two values: given states unlike those of its training, an LM may do worse
    than it could from the text alone, so the smaller value is the fairer bound.

    Args:
        sums: sums over clips, named as in `validate`: mel distances, those of the text LM, `clips`, `clips/<domain>`.
        counts: how often each code was chosen [N, V].
        levels: numbers of levels that were decoded, ascending.
    """
    row: dict[str, float] = {"clips": sums["clips"], "mel_distance": sums[f"mel_distance/{levels[-1]}"] / sums["clips"]}
    for name, value in sums.items():
        group, _, rest = name.partition("/")
        if group == "mel_distance":
            domain = rest.rpartition("/")[0]
            clips = sums[f"clips/{domain}"] if domain else sums["clips"]
            row |= {name: value / clips} if clips else {}
    if tokens := sums.get("text_tokens"):
        row |= {f"text_lm_loss/{count}": sums[f"nats/{count}"] / tokens for count in levels}
        row["text_lm_loss"] = row[f"text_lm_loss/{levels[-1]}"]
        row["text_lm_loss_no_audio"] = min(sums[f"nats/{name}"] for name in NO_AUDIO) / tokens
        row["text_accuracy"] = sums[f"correct/{levels[-1]}"] / tokens
    use = codebook_row(counts)
    return row | {name: value for name, value in use.items() if name != "frames"}
