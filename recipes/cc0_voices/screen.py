"""Compare settings of a small model quickly: a bare training loop on one voice, scored on held-out clips.

    python recipes/cc0_voices/screen.py VOICES [key=value ...]

VOICES is a folder with train.jsonl and heldout.jsonl. The keys and their defaults are the fields of `Options`. Prints
mel distance, STOI, pitch accuracy and buzz for 1, 4 and 16 levels, and the processor time. `fit` with `quantize: false`
in its first stage trains in the same way; this loop has no text and no discriminators, and it starts within seconds.
"""

import json
import random
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.audio.io import read_audio
from moss_train.cli.compose import load_config
from moss_train.evaluation.metrics.base import Metric, Pair, score_pair
from moss_train.evaluation.metrics.registry import build_metrics
from moss_train.export.load import tokenizer_config
from moss_train.losses import (
    MultiScaleMelLoss,
    RelativeSquaredErrorLoss,
    codebook_loss,
    commitment_loss,
    multi_scale_mel_distance,
)
from moss_train.model import MossAudioTokenizerModel
from moss_train.training.step.optimizers import parameter_groups
from moss_train.training.step.quantizer_start import fit_quantizer, pass_unquantized

RATE = 24_000
HOP = 1920


@dataclass
class Options:
    """What can be varied. Rates are constant after a warm-up of 50 updates, and of 20 updates after the fit."""

    voice: str = "kerstin"
    minutes: float = 24.0  # training audio held in memory
    updates: int = 300
    continuous: int = 0  # updates without the quantizer, before it is fitted to the latents
    relative_error: float = 0.0  # weight of the relative squared error of the waveform; the mel distance has weight 15
    mel_from: int = 0  # first update in which the mel distance counts
    commitment: float = 0.25
    rate: float = 2e-3
    rate_after: float = 2e-3  # learning rate after the fit
    decoder_only: bool = False  # train only the decoder after the fit
    dropout: float = 0.5  # share of clips that use a random number of levels
    clips: int = 6  # clips per update, of 0.96 s each
    every: int = 100  # updates between scores
    held_out: int = 12
    seed: int = 0


def main(voices: Path, options: Options) -> None:
    """Train and print scores at regular intervals."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    config = load_config("fit", ["experiment=cat_tiny", "run_dir=unused"])
    model = MossAudioTokenizerModel(tokenizer_config(config.tokenizer))
    optimizer = torch.optim.AdamW(parameter_groups([model], 0.01), lr=0.0, betas=(0.9, 0.95))
    mel, relative_error = MultiScaleMelLoss(RATE), RelativeSquaredErrorLoss()
    train = read_voice(voices / "train.jsonl", options.voice, 60 * options.minutes)
    held_out = read_voice(voices / "heldout.jsonl", options.voice, float("inf"))[: options.held_out]
    metrics = build_metrics(["stoi", "pitch", "buzz"])
    started = time.process_time()

    for update in range(1, options.updates + 1):
        is_quantized = update > options.continuous
        if options.continuous and update == options.continuous + 1:
            print_scores(model, held_out, metrics, update - 1, started, is_quantized=False)
            with torch.no_grad():
                latents = [model.encode_latent(crops(train, options.clips, generator)).flatten(0, 1) for _ in range(80)]
            print(f"left after all levels: {fit_quantizer(model.quantizer, torch.cat(latents))[-1]:.3f}")
            print_scores(model, held_out, metrics, update - 1, started)
            model.encoder.requires_grad_(not options.decoder_only)
            model.quantizer.requires_grad_(not options.decoder_only)
        audio = crops(train, options.clips, generator)
        lengths = torch.full((options.clips,), audio.shape[2])
        latent = model.encode_latent(audio)
        draws = torch.rand(2, options.clips, generator=generator)
        levels = torch.where(draws[0] < options.dropout, 1 + (16 * draws[1]).long(), 16)
        quantized = model.quantizer(latent, levels) if is_quantized else pass_unquantized(model.quantizer, latent)
        output = model.decode_latent(quantized.quantized)
        frame_mask = torch.ones(latent.shape[:2], dtype=torch.bool)
        arguments = (quantized.latents, quantized.codewords, frame_mask, quantized.level_mask, options.clips)
        loss = options.commitment * commitment_loss(*arguments) + codebook_loss(*arguments)
        if update > options.mel_from:
            loss = loss + 15 * mel(audio, output, lengths)
        if options.relative_error:
            loss = loss + options.relative_error * relative_error(audio, output, lengths)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = options.rate * min(1.0, update / 50)
        if options.continuous and is_quantized:
            rate = options.rate_after * min(1.0, (update - options.continuous) / 20)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if update % options.every == 0:
            print_scores(model, held_out, metrics, update, started, is_quantized)


def read_voice(manifest: Path, voice: str, seconds: float) -> list[Tensor]:
    """Read clips [T] of a voice in random order, scaled to a peak of 0.7, until they last at least `seconds`."""
    rows = [row for row in map(json.loads, manifest.read_text("utf-8").splitlines()) if row["speaker"] == voice]
    random.Random(0).shuffle(rows)
    clips: list[Tensor] = []
    for row in rows:
        if sum(map(len, clips)) >= seconds * RATE:
            break
        audio = read_audio(manifest.parent / row["path"], sampling_rate=RATE, num_channels=1)[0][0]
        clips.append(audio * (0.7 / audio.abs().max()))
    return clips


def crops(clips: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Cut random crops of 0.96 s from random clips, [count, 1, T]."""
    length = 12 * HOP
    found: list[Tensor] = []
    while len(found) < count:
        clip = clips[int(torch.randint(len(clips), (1,), generator=generator))]
        if len(clip) > length:
            start = int(torch.randint(len(clip) - length, (1,), generator=generator))
            found.append(clip[start : start + length])
    return torch.stack(found)[:, None]


@torch.no_grad()
def print_scores(
    model: MossAudioTokenizerModel,
    clips: list[Tensor],
    metrics: dict[str, Metric],
    update: int,
    started: float,
    is_quantized: bool = True,
) -> None:
    """Print mean scores by number of levels; without the quantizer there is only one row."""
    print(f"update {update}, {time.process_time() - started:.0f} s of processor time")
    for levels in (1, 4, 16) if is_quantized else (None,):
        rows = []
        for clip in clips:
            padded = F.pad(clip, (0, -len(clip) % HOP))[None, None]
            latent = model.encode_latent(padded)
            if levels is None:
                quantized = pass_unquantized(model.quantizer, latent)
            else:
                quantized = model.quantizer(latent, torch.tensor([levels]))
            output = model.decode_latent(quantized.quantized)[..., : len(clip)]
            distance = multi_scale_mel_distance(clip[None, None], output, torch.tensor([len(clip)]), RATE)
            rows.append({"mel": distance.item()} | score_pair(metrics, Pair(clip[None], output[0], RATE)).values)
        means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        print(
            f"  levels {levels or 'none'}: " + ", ".join(f"{key} {value:.3f}" for key, value in means.items()),
            flush=True,
        )


if __name__ == "__main__":
    kinds = {field.name: type(field.default) for field in fields(Options)}
    given = dict(argument.split("=", 1) for argument in sys.argv[2:])
    chosen = {key: value == "true" if kinds[key] is bool else kinds[key](value) for key, value in given.items()}
    main(Path(sys.argv[1]), Options(**chosen))
