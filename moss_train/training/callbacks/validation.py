"""Validate on held-out audio every n updates, without changing the training."""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moss_train.batch import TASKS
from moss_train.evaluation.metrics.base import Metric, columns_of
from moss_train.evaluation.metrics.codes import codebook_columns
from moss_train.evaluation.reconstruct import Condition, Reconstruction, pcm16
from moss_train.evaluation.results import ClipRow
from moss_train.evaluation.runner import score_reconstructions
from moss_train.evaluation.statistics import ALL_DOMAINS, mean_scores
from moss_train.losses import multi_scale_mel_distance
from moss_train.training.callbacks.checkpoint import CheckpointWriter
from moss_train.training.callbacks.samples import AudioSampleWriter
from moss_train.training.callbacks.validation_data import (
    NO_AUDIO,
    DecodedClip,
    HeldOutClip,
    reconstruct,
    scores,
)
from moss_train.training.distributed.collectives import (
    gather_over_ranks,
    num_ranks,
    read_by_name,
    sum_by_name,
    sum_over_ranks,
)
from moss_train.training.loggers.base import LoggerCollection
from moss_train.training.module import CatModule, cat_module
from moss_train.training.step.update import no_codes
from moss_train.utils.checkpoint import BestCheckpoint, checkpoint_name, read_best, record_best

SYSTEM = "validation"
HIGHER_IS_BETTER = ("text_accuracy", "mean_usage", "mean_perplexity", "usage", "perplexity")
"""Scores for which higher is better; the additional metrics declare this themselves."""


@dataclass(frozen=True)
class ValidationPlan:
    """What a run is validated on, and how often.

    Attributes:
        clips: held-out clips, the same on every rank.
        levels: numbers of quantizer levels to decode, ascending; the last is all of them.
        every_updates: generator updates between validations; the start and the end of the run are validated, too.
        metrics: additional metrics, by name; they take time.
        metrics_clips: number of clips that the additional metrics are computed on.
        monitor: column of `validation.csv`; whenever it reaches a new best value, a checkpoint is written and recorded
            as the best. None for no best checkpoint.
    """

    clips: Sequence[HeldOutClip]
    levels: tuple[int, ...]
    every_updates: int
    metrics: Mapping[str, Metric]
    metrics_clips: int
    monitor: str | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains of the clips."""
        return tuple(sorted({clip.domain for clip in self.clips}))

    @property
    def digest(self) -> str:
        """Digest of what scores are computed on: they can only be compared if it is the same."""
        clips = [(clip.id, clip.domain, tuple(clip.target.shape)) for clip in self.clips]
        return hashlib.sha256(json.dumps([clips, self.metrics_clips]).encode()).hexdigest()[:16]

    @property
    def higher(self) -> frozenset[str]:
        """Columns of additional metrics for which higher is better."""
        better = [column.key for column in columns_of(self.metrics) if column.is_higher_better]
        return frozenset(name for key in better for name in self._places(key))

    def _places(self, key: str) -> list[str]:
        return [f"{domain}/{key}/{count}" for domain in (ALL_DOMAINS, *self.domains) for count in self.levels]

    @property
    def mel_columns(self) -> list[str]:
        """Columns of the mel distance at every depth, over all domains together and for each domain."""
        places = ("", *(f"{domain}/" for domain in self.domains))
        return [f"mel_distance/{place}{count}" for place in places for count in self.levels]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of `validation.csv`."""
        text = []
        if any(clip.text for clip in self.clips):
            text = ["text_lm_loss", "text_lm_loss_no_audio", "text_accuracy"]
            text += [f"text_lm_loss/{count}" for count in self.levels]
        further = [name for column in columns_of(self.metrics) for name in self._places(column.key)]
        codebooks = codebook_columns(self.levels[-1])[2:]
        return ("update", "seconds", "clips", "mel_distance", *text, *self.mel_columns, *further, *codebooks)


class Validation(Callback):
    """Scores the model on held-out clips, logs a row, saves a new best checkpoint and writes audio samples.

    With `ema`, scores and samples are those of the tokenizer's averaged weights.

    The clips are distributed over the ranks. Every rank runs every network equally often, as networks that are sharded
    over ranks require.

    Args:
        checkpoints: writes the checkpoint of an update, unless it exists.
    """

    def __init__(
        self,
        run_log: LoggerCollection,
        plan: ValidationPlan,
        checkpoints: CheckpointWriter,
        samples_writer: AudioSampleWriter | None,
    ) -> None:
        self.run_log = run_log
        self.plan = plan
        self.checkpoints = checkpoints
        self.best: BestCheckpoint | None = None
        self.samples_writer = samples_writer
        self.done_update: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        update = cat_module(pl_module).update
        if (monitor := self.plan.monitor) is not None:
            best = trainer.strategy.broadcast(read_best(self.checkpoints.directory))
            # A recorded best checkpoint may belong to updates that are about to be repeated, or to other clips.
            is_comparable = best is not None and best.metric == monitor and best.clips in ("", self.plan.digest)
            self.best = best if best is not None and is_comparable and best.update <= update else None
        if update == 0:
            self._validate(trainer, pl_module)
        else:
            self.done_update = update

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        module = cat_module(pl_module)
        # At the end of the run, too, before its last checkpoint: a run that has that checkpoint is not continued.
        if module.update % self.plan.every_updates == 0 or module.update == module.schedule.updates:
            self._validate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cat_module(pl_module)
        if module.update == module.schedule.updates:
            self._validate(trainer, pl_module)

    def _validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cat_module(pl_module)
        is_continuous = module.update > 0 and not module.schedule.at(module.update - 1).stage.quantize
        before_fit = is_continuous and module.update not in module.schedule.quantizer_fits
        if module.update == self.done_update or before_fit:  # levels that are not fitted yet decode to noise
            return
        self.done_update = module.update
        started = time.perf_counter()
        with eval_mode(trainer, module), module.averaged_weights():
            row = validate(module, self.plan)
            samples = []
            if self.samples_writer is not None:
                samples = self.samples_writer.make(module, trainer.is_global_zero)
        seconds = time.perf_counter() - started
        self.run_log.write("validation", {"update": module.update, "seconds": seconds, **row})
        self.run_log.show(samples)
        monitor = self.plan.monitor
        if monitor is None or not math.isfinite(value := row.get(monitor, math.nan)):
            return
        is_higher_better = monitor in self.plan.higher or monitor.partition("/")[0] in HIGHER_IS_BETTER
        if self.best is not None and (value <= self.best.value if is_higher_better else value >= self.best.value):
            return
        self.checkpoints.save_now(trainer, pl_module)
        self.best = BestCheckpoint(checkpoint_name(module.update), module.update, monitor, value, self.plan.digest)
        if trainer.is_global_zero:
            record_best(self.checkpoints.directory, self.best)


@contextmanager
def eval_mode(trainer: Trainer, module: CatModule) -> Iterator[None]:
    """Set evaluation mode inside the `with` block, in the run's precision and without gradients.

    Modes and random generators are restored afterwards.
    """
    modes = [(part, part.training) for part in module.modules()]
    devices = [module.device] if module.device.type == "cuda" else []
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), trainer.precision_plugin.val_step_context():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def validate(module: CatModule, plan: ValidationPlan) -> dict[str, float]:
    """Return the scores of the model on the clips of a plan, the same on every rank."""
    rank, ranks = (torch.distributed.get_rank(), num_ranks()) if num_ranks() > 1 else (0, 1)
    rate = module.tokenizer.output_sampling_rate
    # All names of sums are set here, so that they are the same on every rank, whatever its clips.
    names = ["clips", *(f"clips/{domain}" for domain in plan.domains), *plan.mel_columns, "text_tokens"]
    names += [f"{kind}/{name}" for kind in ("nats", "correct") for name in (*plan.levels, *NO_AUDIO)]
    sums = dict.fromkeys(names, 0.0)
    counts = no_codes(module.tokenizer)
    rows: list[tuple[int, ClipRow]] = []
    for turn in range(-(-len(plan.clips) // ranks)):
        place = turn * ranks + rank
        clip = plan.clips[min(place, len(plan.clips) - 1)]
        made = reconstruct(module.tokenizer, clip, plan.levels)
        found = text_lm_sums(module, plan, clip, made)
        if place >= len(plan.clips):
            continue  # this rank only kept in step with the others
        found |= {"clips": 1.0, f"clips/{clip.domain}": 1.0}
        for count, audio in made.audio.items():
            length = torch.tensor([clip.target.shape[-1]], device=audio.device)
            target = clip.target[None].to(audio.device)
            distance = multi_scale_mel_distance(target, audio[None], length, rate).item()
            found |= {f"mel_distance/{count}": distance, f"mel_distance/{clip.domain}/{count}": distance}
        sums |= {name: sums[name] + value for name, value in found.items()}
        counts.scatter_add_(1, made.codes, torch.ones_like(made.codes))
        if place < plan.metrics_clips and plan.metrics:
            wanted = pcm16(clip.target.cpu())
            pairs = [
                Reconstruction(Condition(SYSTEM, count), wanted, pcm16(audio.cpu()), rate)
                for count, audio in made.audio.items()
            ]
            labels = {"domain": clip.domain} | ({} if clip.text is None else {"text": clip.text})
            with torch.autocast(module.device.type, enabled=False):  # metrics are no part of the model
                values = score_reconstructions(pairs, plan.metrics, labels)
            rows.append((place, ClipRow(clip.id, clip.domain, clip.id, clip.target.shape[-1] / rate, values)))
    total = read_by_name(sum_by_name({"": sums}, module.device), {"": sums})[""]
    row = scores(total, sum_over_ranks(counts).cpu(), plan.levels)
    if not plan.metrics:
        return row
    everyone = sorted((item for items in gather_over_ranks(rows) for item in items), key=lambda item: item[0])
    conditions = [Condition(SYSTEM, count) for count in plan.levels]
    return row | mean_scores([row for _, row in everyone], conditions, columns_of(plan.metrics))


def text_lm_sums(module: CatModule, plan: ValidationPlan, clip: HeldOutClip, made: DecodedClip) -> dict[str, float]:
    """Return the text LM's cross entropy and correct tokens on a clip's text, summed over tokens: for the states of
    every depth, and for states without information about the clip.

    The result is empty for a clip without text; with several ranks the networks run all the same.
    """
    if module.semantic is None or (clip.text is None and num_ranks() == 1):
        return {}
    full = made.states[plan.levels[-1]]
    states_of = {str(count): states for count, states in made.states.items()}
    states_of |= {"other": full, "silent": torch.zeros_like(full)}
    # The next clip with text after this one, wrapping around; None when this is the only one.
    place = next(i for i, item in enumerate(plan.clips) if item is clip)
    other = next((item for item in (*plan.clips[place + 1 :], *plan.clips[:place]) if item.text is not None), None)
    if other is not None or num_ranks() > 1:
        latent = module.tokenizer.encode_latent((other or clip).audio[None].to(module.device))
        levels = torch.tensor([plan.levels[-1]], device=latent.device)
        states_of["other"] = module.tokenizer.quantizer(latent, levels).quantized
    tokens = module.semantic.text(clip.text or "-")
    text = torch.tensor([tokens], device=full.device)
    task = torch.tensor([TASKS.index(clip.task)], device=full.device)
    sums = {"text_tokens": float(len(tokens))}
    for name, states in states_of.items():
        prediction = module.semantic(states, [states.shape[1]], text, [len(tokens)], task)
        sums |= {f"nats/{name}": prediction.loss_sum.item(), f"correct/{name}": float(prediction.num_correct.item())}
    if other is None:
        sums["nats/other"] = math.inf  # came from the clip's own states, only to keep in step with other ranks
    return {} if clip.text is None else sums
