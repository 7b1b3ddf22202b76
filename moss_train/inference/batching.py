"""Use of a device in inference: which one, in what precision, clips grouped by length, the next group read ahead."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import torch

from moss_train.config.schema import DecodeConfig, EncodeConfig
from moss_train.export.load import load_tokenizer
from moss_train.model import MossAudioTokenizerModel
from moss_train.utils.errors import UserError

Item = TypeVar("Item")
Value = TypeVar("Value")

SHORTEST_SHARE = 0.7  # shortest clip of a group relative to its longest, so that little of the work is padding
NUM_READERS = 4


def group_by_length(items: Sequence[Item], lengths: Sequence[float], limit: float) -> list[list[Item]]:
    """Group items so that count x longest stays within `limit` and lengths are similar; the longest groups come first.

    An item above the limit forms a group of its own. With the longest first, a lack of memory shows at the start.
    """
    order = sorted(range(len(items)), key=lambda index: -lengths[index])
    groups: list[list[Item]] = []
    longest = 0.0
    for index in order:
        if not groups or (len(groups[-1]) + 1) * longest > limit or lengths[index] < SHORTEST_SHARE * longest:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(items[index])
    return groups


def read_ahead(
    groups: Iterable[Sequence[Item]], read: Callable[[Item], Value]
) -> Iterator[list[tuple[Item, Value | Exception]]]:
    """Yield each group's items with what `read` returned, or the ValueError or OSError it raised.

    One group is read ahead in threads, so that files are decoded while the caller computes.
    """

    def outcome(item: Item) -> Value | Exception:
        try:
            return read(item)
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(NUM_READERS) as pool:
        waiting: list[tuple[Item, Future[Value | Exception]]] = []
        for group in chain(groups, [()]):
            submitted = [(item, pool.submit(outcome, item)) for item in group]
            if waiting:
                yield [(item, future.result()) for item, future in waiting]
            waiting = submitted


def choose_device(name: str) -> torch.device:
    """Return the device of a name: `auto` is the first GPU when there is one, else the CPU. Raises UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is not a device: write auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name} is not supported: write auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name} is not there: torch sees {torch.cuda.device_count()} GPUs")
    return device


def use_precision(
    model: MossAudioTokenizerModel, precision: str | None, device: torch.device
) -> MossAudioTokenizerModel:
    """Return the model, set to compute in "fp32" or "bf16"; None keeps the precision of its configuration.

    Weights, quantizer and waveform projections stay float32. Codes of the two precisions differ in a few places.

    Raises:
        UserError: bf16 on a GPU without it.
    """
    if precision is None:
        return model
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"precision=bf16: {torch.cuda.get_device_name(device)} computes in fp32 only")
    model.config.compute_dtype = precision
    return model


def load_model(
    config: EncodeConfig | DecodeConfig, device: torch.device
) -> tuple[MossAudioTokenizerModel, float | None]:
    """Load a command's model onto a device, in its precision, and return it with the seconds of a streamed chunk.

    By default a streamed chunk is one frame; the seconds are None for whole clips.
    """
    model = use_precision(load_tokenizer(config.model).to(device), config.precision, device)  # type: ignore[arg-type]
    if config.chunk_duration is None and config.streaming:
        return model, 1 / model.config.frame_rate
    return model, config.chunk_duration


def precision_of(model: MossAudioTokenizerModel) -> str:
    """Return the precision in which a model's encoder and decoder compute: fp32, bf16 or fp16."""
    return getattr(model.config, "compute_dtype", None) or "fp32"
