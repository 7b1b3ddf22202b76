"""Measure how fast discriminators learn to tell recordings from reconstructions, by what their input looks like.

    python recipes/cat_mini/discriminate.py recipes/cat_mini data/cc0_voices/train.jsonl data/cc0_voices/heldout.jsonl

The model stays fixed. Trains the discriminators of `cat_tiny` (and with --wide those with twice to four times the
channels) on crops as they are, of unit RMS, pre-emphasised, and both, and prints the mean scores on held-out clips.
"""

import argparse
import json
import random
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from moss_train.audio.io import read_audio
from moss_train.batch import Batch
from moss_train.discriminators import DiscriminatorSet, MultiPeriodDiscriminator, MultiResolutionSTFTDiscriminator
from moss_train.losses.adversarial import discriminator_loss
from moss_train.model import MossAudioTokenizerModel
from moss_train.training.step.objective import Objective

PEAK = 0.7  # the peak level that cat_mini was trained at
CROP_SECONDS = 0.48
CLIPS_PER_UPDATE = 12
TRAINING_CLIPS, HELD_OUT_CLIPS = 240, 24
REPORT_EVERY = 60


def main() -> None:
    """Train one set of discriminators after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--updates", type=int, default=240)
    parser.add_argument("--wide", action="store_true", help="twice to four times the channels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = MossAudioTokenizerModel.from_pretrained(arguments.model).eval()
    train = make_pairs(model, arguments.train, TRAINING_CLIPS)
    heldout = make_pairs(model, arguments.heldout, HELD_OUT_CLIPS)
    print("| unit RMS | pre-emphasis | update | real | generated |\n|---|---|---|---|---|")
    for unit_rms, pre_emphasis in product((False, True), (0.0, 0.97)):
        objective = Objective(
            model.sampling_rate,
            discriminator_crop_seconds=CROP_SECONDS,
            discriminator_unit_rms=unit_rms,
            discriminator_pre_emphasis=pre_emphasis,
        )
        for update, real, generated in learn(build(arguments.wide), objective, train, heldout, arguments.updates):
            print(f"| {unit_rms} | {pre_emphasis} | {update} | {real:.2f} | {generated:.2f} |", flush=True)


def build(wide: bool) -> DiscriminatorSet:
    """Build the discriminators of `cat_tiny`, or wider ones."""
    torch.manual_seed(0)
    channels = (16, 32, 64, 128, 128) if wide else (8, 16, 32, 64, 64)
    stft = MultiResolutionSTFTDiscriminator(window_lengths=(1024,), channels=16 if wide else 4)
    return DiscriminatorSet([MultiPeriodDiscriminator(channels=channels), stft])


@torch.inference_mode()
def make_pairs(model: MossAudioTokenizerModel, manifest: Path, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return at most `count` random recordings [1, T] and their reconstructions from 4, 8 or 16 levels."""
    chance = random.Random(0)
    entries = [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]
    entries = chance.sample(entries, min(count, len(entries)))
    pairs = []
    for entry in entries:
        audio, _ = read_audio(manifest.parent / entry["path"], sampling_rate=model.sampling_rate, num_channels=1)
        audio = audio * (PEAK / audio.abs().max())
        codes = model.encode(audio[None], num_quantizers=chance.choice((4, 8, 16, 16, 16)), return_dict=True)
        restored = model.decode(codes.audio_codes, return_dict=True).audio[0, :, : audio.shape[1]]
        pairs.append((audio, restored))
    return pairs


def learn(
    discriminators: DiscriminatorSet,
    objective: Objective,
    train: list[tuple[Tensor, Tensor]],
    heldout: list[tuple[Tensor, Tensor]],
    updates: int,
) -> list[tuple[int, float, float]]:
    """Train and return (update, mean score of recordings, mean score of reconstructions) on held-out clips."""
    optimizer = torch.optim.AdamW(discriminators.parameters(), lr=1e-3, betas=(0.8, 0.99))
    chance, scores = random.Random(1), []
    clips_per_update = min(CLIPS_PER_UPDATE, len(train))
    for update in range(updates + 1):
        if update % REPORT_EVERY == 0 or update == updates:
            with torch.no_grad():
                real, generated = inputs(objective, heldout, random.Random(2))
                means = [fmean(x.logits.mean().item() for x in discriminators(clips)) for clips in (real, generated)]
            scores.append((update, *means))
        crops = inputs(objective, chance.sample(train, clips_per_update), chance)
        real_logits, generated_logits = ([output.logits for output in discriminators(clips)] for clips in crops)
        loss = discriminator_loss(real_logits, generated_logits, clips_per_update)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(discriminators.parameters(), 1.0)
        optimizer.step()
    return scores


def inputs(objective: Objective, pairs: list[tuple[Tensor, Tensor]], chance: random.Random) -> tuple[Tensor, Tensor]:
    """Return what discriminators get of recordings and reconstructions, both [B, 1, crop]."""
    longest = max(real.shape[1] for real, _ in pairs)
    real, generated = (
        torch.stack([torch.nn.functional.pad(pair[side], (0, longest - pair[side].shape[1])) for pair in pairs])
        for side in (0, 1)
    )
    none = torch.zeros(len(pairs), dtype=torch.long)
    batch = Batch(
        audio=real,
        audio_lengths=torch.tensor([clip.shape[1] for clip, _ in pairs]),
        text_tokens=none[:, None],
        text_lengths=none,
        task_ids=none,
        quantizer_uniform=none.float(),
        crop_uniform=torch.tensor([chance.random() for _ in pairs]),
        sample_ids=tuple(map(str, range(len(pairs)))),
        domains=("speech",) * len(pairs),
    )
    return objective.discriminator_input(real, batch), objective.discriminator_input(generated, batch)


if __name__ == "__main__":
    main()
