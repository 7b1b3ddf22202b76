"""Run a whole micro-batch on tensors that have shapes, types and a device but no data, so that no GPU is needed."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import moss_train.audio.stft as stft
from moss_train.batch import Batch
from moss_train.training.cost.flops import fake_tensors
from moss_train.training.module import CatModule
from moss_train.training.step.schedule import ScheduleState, Stage
from moss_train.training.step.update import forward_backward


class HostTensor(Tensor):
    """A tensor with data among tensors without: a value known on the host. Its copy on a device has no data either."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to:
            return torch.zeros(args[0].shape, dtype=args[0].dtype, device=args[1])
        if any(isinstance(value, Tensor) and not isinstance(value, HostTensor) for value in args):
            args = tuple(
                torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, HostTensor) else value
                for value in args
            )
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            return super().__torch_function__(func, types, args, kwargs or {})


def on_host(values: list[int]) -> HostTensor:
    """Return whole numbers [B] int64 with data."""
    with _disable_current_modes():
        return torch.tensor(values).as_subclass(HostTensor)


def micro_batch(
    module: CatModule, clips: int, seconds: float, texts: int, tokens: int, device: torch.device | str
) -> Batch:
    """Return clips of equal length, the first `texts` with `tokens` tokens of text each; call it within `dataless`."""
    config = module.tokenizer.config
    frames = math.ceil(seconds * config.sampling_rate / config.downsample_rate)
    length, has_target = frames * config.downsample_rate, config.output_sampling_rate != config.sampling_rate
    text_lengths = [tokens] * texts + [0] * (clips - texts)
    shapes = {
        "audio": (clips, config.number_channels, length),
        **({"target": (clips, config.number_channels, frames * config.upsample_rate)} if has_target else {}),
        "quantizer_uniform": (clips,),
        "crop_uniform": (clips,),
    }
    numbers: dict[str, Any] = {
        **{name: torch.zeros(shape, device=device) for name, shape in shapes.items()},
        "text_tokens": torch.zeros(clips, tokens, dtype=torch.int64, device=device),
        "task_ids": torch.zeros(clips, dtype=torch.int64, device=device),
        "sample_ids": ("",) * clips,
        "domains": ("",) * clips,
    }
    names = ("audio_lengths", "text_lengths", *(["target_lengths"] if has_target else []))
    lengths: dict[str, Any] = {name: torch.zeros(clips, dtype=torch.int64, device=device) for name in names}
    known: dict[str, Any] = {"audio_lengths": on_host([length] * clips), "text_lengths": on_host(text_lengths)}
    return Batch(**numbers, **lengths, host=Batch(**numbers, **known))


def run_micro_batch(module: CatModule, batch: Batch, stage: Stage, backward: Callable[..., None]) -> None:
    """Run forward and backward of a micro-batch at the end of a stage, with all losses at full weight."""
    schedule_state = full_swing(module, stage)
    weights = module.objective.active_weights(schedule_state)
    counts = module.objective.count((batch,), batch.audio.device)
    forward_backward(module.networks, module.objective, batch, counts, schedule_state, weights, backward)


def full_swing(module: CatModule, stage: Stage) -> ScheduleState:
    """Return the schedule state of a stage's last update, when every warm-up is over."""
    stages = module.schedule.stages
    return module.schedule.at(sum(one.updates for one in stages[: list(stages).index(stage) + 1]) - 1)


@contextmanager
def dataless() -> Iterator[None]:
    """Create tensors without data inside this context; windows and mel filters are replaced by cached constants."""
    window, bank = stft.normalized_hann_window, stft.mel_bank
    stft.normalized_hann_window = lru_cache(lambda length, device: torch.ones(length, device=device))
    stft.mel_bank = lru_cache(lambda rate, length, mels, device: torch.zeros(length // 2 + 1, mels, device=device))
    try:
        with fake_tensors():
            yield
    finally:
        stft.normalized_hann_window, stft.mel_bank = window, bank
        window.cache_clear()
