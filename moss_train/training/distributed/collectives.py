"""Collectives: sum gradients and numbers over the processes that Lightning has started.

Every loss is a sum over clips divided by a count of the whole update, so gradients and terms add up: all reductions are
sums. Without a process group every function does what is right for one process.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from moss_train.training.distributed.fsdp import is_sharded

Key = TypeVar("Key")
BUCKET_BYTES = 64 * 2**20
BUCKETS_IN_FLIGHT = 2
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # integers of the size of a weight in bytes


class ManualDDPStrategy(DDPStrategy):
    """The processes, launching and saving of DDP without its wrapper around the module.

    The wrapper would reduce the generator in every backward of the discriminators too, and refuses an update in which a
    rank has no text; `sum_gradients` reduces each network once per update instead.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def teardown(self) -> None:
        """Leave weights and moments where they are, too: on a GPU they would be copied to the machine's memory."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def num_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def max_over_ranks(number: int, device: torch.device) -> int:
    """The largest of one number per rank."""
    if num_ranks() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, in place."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_over_ranks(item: Any) -> list[Any]:
    """One small picklable object of every rank, in the order of the ranks. For rare events: it waits for all ranks."""
    if num_ranks() == 1:
        return [item]
    items: list[Any] = [None] * num_ranks()
    dist.all_gather_object(items, item)
    return items


def sum_to_host(values: Mapping[Key, Tensor | float], device: torch.device) -> dict[Key, float]:
    """Sum named numbers over ranks and bring them to the host: one collective, one synchronisation for all of them.

    The names must be the same on every rank, and so must which of the values are tensors (scalars on `device`).
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {name: float(value) for name, value in values.items() if name not in tensors}
    parts = [value.detach().double().reshape(1) for value in tensors.values()]
    on_host = torch.tensor(list(numbers.values()), dtype=torch.float64)
    vector = sum_over_ranks(torch.cat([*parts, on_host.to(device, non_blocking=True)]))
    return dict(zip([*tensors, *numbers], vector.tolist(), strict=True))


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], dtype: torch.dtype | None = None) -> None:
    """Replace each gradient by its sum over ranks, one all-reduce per flat bucket; a missing gradient counts as zero.

    Args:
        parameters: the same ones in the same order on every rank.
        dtype: of what is sent, by default float32; bfloat16 halves the traffic and rounds every partial sum.
    """
    if num_ranks() == 1:
        return
    waiting: deque[tuple[list[nn.Parameter], Tensor, Any]] = deque()
    for bucket in make_buckets(parameters, BUCKET_BYTES):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).to(dtype or gradients[0].dtype)
        waiting.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        if len(waiting) > BUCKETS_IN_FLIGHT:
            _receive(*waiting.popleft())
    while waiting:
        _receive(*waiting.popleft())


def _receive(bucket: list[nn.Parameter], flat: Tensor, work: Any) -> None:
    """Make the gradients of a bucket views of what was reduced."""
    work.wait()
    pieces = flat.to(bucket[0].dtype).split([p.numel() for p in bucket])
    for parameter, piece in zip(bucket, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)


def make_buckets(parameters: Iterable[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype with at most `size` bytes together; a larger one is alone."""
    bucket: list[nn.Parameter] = []
    filled = 0
    for parameter in parameters:
        if bucket and (filled + parameter.nbytes > size or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(parameter)
        filled += parameter.nbytes
    if bucket:
        yield bucket


def check_equal_start(module: nn.Module, progress: Sequence[int]) -> None:
    """Make sure that all ranks start from the same weights at the same place, by comparing short fingerprints.

    Raises:
        RuntimeError: they do not, with what each rank has.
    """
    if num_ranks() == 1:
        return
    prints = gather_over_ranks((*progress, fingerprint(module)))
    if len(set(prints)) > 1:
        found = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(prints))
        raise RuntimeError(f"the ranks do not start from the same state (update, position, weights): {found}")


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """A short hash of the names, shapes and bits of all parameters; integer sums do not depend on their order.

    Sharded ones, which differ from rank to rank, are left out.
    """
    parameters = {name: p for name, p in module.named_parameters() if not is_sharded(p)}
    sums = [p.flatten().view(BITS[p.element_size()]).sum(dtype=torch.int64) for p in parameters.values()]
    digest = hashlib.sha256(repr([(name, list(p.shape)) for name, p in parameters.items()]).encode())
    digest.update(torch.stack(sums).cpu().numpy().tobytes() if sums else b"")
    return digest.hexdigest()[:16]
