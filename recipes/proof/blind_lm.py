"""Train a text LM without audio on the same texts as a run, update by update: the baseline for the run's own LM.

Class, size, texts, batches, optimizer and schedule are those of the run, read from its folder. A single zero vector
replaces the audio frames of each clip. The scores, in nats per token of the run's held-out texts, are written to
`blind.csv` in the same folder.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from moss_train.batch import TASKS, Batch
from moss_train.config.build import build
from moss_train.config.fit_schema import FitConfig
from moss_train.config.recipe_schema import DecayScales
from moss_train.config.section import known_keys
from moss_train.data.stream.loader import make_loader
from moss_train.export.load import tokenizer_config
from moss_train.semantic import TextLM
from moss_train.training.callbacks.validation_data import HeldOutClip, load_held_out
from moss_train.training.run.fit import CONFIG_FILE, open_stream, read_config
from moss_train.training.step.optimizers import build_adamw, set_learning_rate
from moss_train.training.step.schedule import Schedule
from moss_train.utils.files import atomic_write

TABLE = "blind.csv"
COLUMNS = ("rate_factor", "weight_decay", "update", "texts", "text_lm_loss")


def main() -> None:
    """Train an LM for each setting and print the best score over all checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run with a text LM and validation.data")
    parser.add_argument("--rate-factors", type=float, nargs="+", default=[1.0], help="times the run's learning rate")
    parser.add_argument("--weight-decays", type=float, nargs="+", help="instead of the run's")
    parser.add_argument("--every", type=int, default=100, help="updates between scores")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = FitConfig.parse(known_keys(FitConfig, read_config(arguments.run / CONFIG_FILE)))
    rows = []
    own = config.optimizers.generator
    own_decay = own.weight_decay * own.weight_decay_scale.semantic
    for factor, decay in product(arguments.rate_factors, arguments.weight_decays or [own_decay]):
        for row in blind_course(config, factor, decay, arguments.every):
            rows.append(row)
            print(" ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)
    with atomic_write(arguments.run / TABLE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print("best:", min(rows, key=lambda row: row["text_lm_loss"]))


def blind_course(config: FitConfig, rate_factor: float, weight_decay: float, every: int) -> Iterator[dict[str, float]]:
    """Train an LM with a run's configuration and seed; yield scores every `every` updates and after the last one."""
    schedule = Schedule.from_config([stage.to_plain() for stage in config.stages])
    stream = open_stream(config, tokenizer_config(config.tokenizer.to_plain()))
    clips = held_out_texts(config, stream.clip_format)
    torch.manual_seed(config.seed)
    text_lm: TextLM = build(config.semantic, path="semantic", latent_dim=1)
    settings = config.optimizers.generator.replace(weight_decay=weight_decay, weight_decay_scale=DecayScales())
    optimizer = build_adamw({"semantic": text_lm}, settings)
    loader = make_loader(
        stream,
        text_encoder=text_lm.text,
        position=0,
        updates=[(update, schedule.at(update).stage.batch_seconds) for update in range(schedule.updates)],
        micro_batch_seconds=config.data.micro_batch_seconds,
    )
    texts = 0
    for update, batch in enumerate(loader):
        schedule_state = schedule.at(update)
        set_learning_rate(
            optimizer,
            rate_factor * schedule_state.stage.learning_rate * schedule_state.stage.rate_factor(schedule_state.update),
        )
        texts += learn(text_lm, optimizer, batch.micro_batches, settings.clip_norm)
        if (update + 1) % every == 0 or update + 1 == schedule.updates:
            nats = held_out_nats(text_lm, clips)
            yield dict(zip(COLUMNS, (rate_factor, weight_decay, update + 1, texts, nats), strict=True))


def held_out_texts(config: FitConfig, clip_format: Any) -> list[HeldOutClip]:
    """Return the validation clips of the run that have text."""
    clips = load_held_out(
        config.validation.data or [],
        clip_format,
        max_clips=config.validation.max_clips,
        max_seconds=config.data.max_seconds,
    )
    return [clip for clip in clips if clip.text is not None]


def learn(text_lm: TextLM, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], clip_norm: float) -> int:
    """Train on the texts of one update of the run and return their number."""
    total = sum(int(batch.text_lengths.sum()) for batch in batches)
    texts = 0
    for batch in batches:
        chosen = batch.text_lengths > 0
        if chosen.any():
            tokens, lengths, tasks = batch.text_tokens[chosen], batch.text_lengths[chosen], batch.task_ids[chosen]
            (unheard(text_lm, tokens, lengths, tasks) / total).backward()
            texts += len(tokens)
    if texts:
        nn.utils.clip_grad_norm_(text_lm.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return texts


def unheard(text_lm: TextLM, tokens: Tensor, lengths: Tensor, tasks: Tensor) -> Tensor:
    """Return the summed cross entropy of texts [B, L] in nats, with one zero vector as the audio of each clip."""
    states, num_frames = torch.zeros(len(tokens), 1, text_lm.projection.in_features), torch.ones_like(lengths)
    return text_lm(states, num_frames, tokens, lengths, tasks).loss_sum


@torch.no_grad()
def held_out_nats(text_lm: TextLM, clips: Sequence[HeldOutClip], batch_clips: int = 16) -> float:
    """Return the cross entropy of the clips' texts in nats per token."""
    text_lm.eval()
    nats, count = 0.0, 0
    for start in range(0, len(clips), batch_clips):
        part = clips[start : start + batch_clips]
        tokens = [torch.tensor(text_lm.text(clip.text or "")) for clip in part]
        lengths = torch.tensor([len(row) for row in tokens])
        tasks = torch.tensor([TASKS.index(clip.task) for clip in part])
        nats += unheard(text_lm, pad_sequence(tokens, batch_first=True), lengths, tasks).item()
        count += int(lengths.sum())
    text_lm.train()
    return nats / count


if __name__ == "__main__":
    main()
