"""Collectives: sum gradients and numbers over the processes that Lightning has started.

Every loss is a sum over clips divided by a count of the whole update, so gradients and terms add up: all reductions are
sums. Without a process group every function behaves as with a single rank.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from moss_train.training.distributed.fsdp import is_sharded

Key = TypeVar("Key")
BUCKET_BYTES = 64 * 2**20
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # bytes per weight -> integer dtype of the same size


class OneProcessStrategy(SingleDeviceStrategy):
    """Trains in one process on one device."""

    def teardown(self) -> None:
        """Tear down without moving weights and moments from a GPU to host memory, which may have less room."""
        assert self.accelerator is not None
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


class ManualDDPStrategy(DDPStrategy):
    """Launches processes and saves checkpoints as DDP does, without its wrapper around the module.

    The wrapper would also reduce the generator's gradients in every backward pass of the discriminators, and it fails
    in an update in which a rank has no text; `GradientSums` reduces each network once per update instead.
    """

    def configure_ddp(self) -> None:
        """Leave the module unwrapped."""

    def teardown(self) -> None:
        """Tear down without moving weights and moments, which DDP would copy from a GPU to host memory."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def num_ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def max_over_ranks(number: int, device: torch.device) -> int:
    """Return the maximum of a number over all ranks."""
    if num_ranks() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_rank0(tensor: Tensor) -> None:
    """Overwrite a tensor on every rank with its value on rank 0."""
    if num_ranks() > 1:
        dist.broadcast(tensor, 0)


def gather_over_ranks(item: Any) -> list[Any]:
    """Return one small picklable object per rank, in rank order. It waits for all ranks, so keep it for rare events."""
    if num_ranks() == 1:
        return [item]
    items: list[Any] = [None] * num_ranks()
    dist.all_gather_object(items, item)
    return items


def sum_by_name(groups: Mapping[str, Mapping[str, Tensor | float]], device: torch.device) -> dict[str, Tensor]:
    """Sum groups of named numbers over ranks in one collective; returns a float64 vector on the device for each group.

    The names must be the same on every rank. The values of a group are all scalar tensors on `device`, or all plain
    numbers.
    """
    held = {group: [v for v in values.values() if isinstance(v, Tensor)] for group, values in groups.items()}
    numbers = [float(v) for group, values in groups.items() if not held[group] for v in values.values()]
    on_host = torch.tensor(numbers, dtype=torch.float64)
    parts = [value.detach().double().reshape(1) for values in held.values() for value in values]
    vector = sum_over_ranks(torch.cat([*parts, on_host.to(device, non_blocking=True)]))
    order = [*(group for group in groups if held[group]), *(group for group in groups if not held[group])]
    return dict(zip(order, vector.split([len(groups[group]) for group in order]), strict=True))


def read_by_name(vectors: Mapping[str, Tensor], names: Mapping[str, Iterable[Key]]) -> dict[str, dict[Key, float]]:
    """Copy vectors of one device to the host at once and return their numbers by name; the host waits for the copy."""
    pieces = torch.cat(list(vectors.values())).cpu().split([len(vector) for vector in vectors.values()])
    return {
        group: dict(zip(names[group], piece.tolist(), strict=True))
        for group, piece in zip(vectors, pieces, strict=True)
    }


class GradientSums:
    """Sums gradients over ranks, overlapping with the last backward passes.

    Gradients are sent in flat buckets, in the same order on every rank, which is roughly the order in which a backward
    pass computes them: later parts before earlier ones. An incomplete bucket holds up those behind it until it is
    complete, or until `finish`.

    Args:
        parts: parameters of every network, the same ones in the same order on every rank.
        dtype: dtype of the gradients as sent; None is their own. bfloat16 halves the traffic and rounds partial sums.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[nn.Parameter]],
        dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.dtype = dtype
        backward_order = [parameters[::-1] for parameters in parts[::-1]] if num_ranks() > 1 else []
        self._buckets = [bucket for parameters in backward_order for bucket in make_buckets(parameters, bucket_bytes)]
        self._place = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}
        self._incomplete = [set(bucket) for bucket in self._buckets]
        self._under_way: deque[tuple[list[nn.Parameter], Tensor, Any]] = deque()
        self.num_sent = 0  # buckets
        self.missing: set[nn.Parameter] = set()  # parameters in sent buckets without a gradient on this rank

    @contextmanager
    def beside_backward(
        self, leaves: Mapping[nn.Parameter, nn.Parameter], unused: Iterable[nn.Parameter] = ()
    ) -> Iterator[None]:
        """Sum gradients as soon as they are complete, inside a `with` block around this rank's last backward passes.

        Args:
            leaves: maps a parameter to the leaf that receives its gradient, usually itself. Once the leaf's earlier
                hooks have run, the parameter's `grad` is this rank's sum. Parameters without a leaf wait for `finish`.
            unused: parameters that get no gradient in these passes; their current one is complete.
        """
        for parameter in unused:
            if parameter in leaves and parameter in self._place:
                self._incomplete[self._place[parameter]].discard(parameter)
        hooks = [
            leaves[p].register_post_accumulate_grad_hook(partial(self._add, p))
            for p in self._place
            if p in leaves and leaves[p].requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """Sum the remaining buckets; afterwards every gradient is the sum over ranks, where a missing one is zero."""
        while self.num_sent < len(self._buckets):
            self._send()
        while self._under_way:
            bucket, flat, work = self._under_way.popleft()
            work.wait()
            pieces = flat.to(bucket[0].dtype).split([p.numel() for p in bucket])
            for parameter, piece in zip(bucket, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)

    def _add(self, parameter: nn.Parameter, leaf: Tensor) -> None:
        self._incomplete[self._place[parameter]].discard(parameter)
        while self.num_sent < len(self._buckets) and not self._incomplete[self.num_sent]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Copy the gradients of the next bucket into one tensor, free them and start the sum over ranks."""
        bucket = self._buckets[self.num_sent]
        self.missing.update(p for p in bucket if p.grad is None)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).to(self.dtype or gradients[0].dtype)
        for parameter in bucket:
            parameter.grad = None
        self._under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        self.num_sent += 1


def make_buckets(parameters: Iterable[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """Yield buckets of consecutive parameters of one dtype, of at most `size` bytes; a larger parameter is alone."""
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
    """Check that all ranks start with the same weights and progress, by comparing short fingerprints.

    Raises:
        RuntimeError: they do not; the message lists what each rank has.
    """
    if num_ranks() == 1:
        return
    prints = gather_over_ranks((*progress, fingerprint(module)))
    if len(set(prints)) > 1:
        found = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(prints))
        raise RuntimeError(f"the ranks do not start from the same state (update, position, weights): {found}")


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """Return a short hash of the names, shapes and bits of all parameters, except sharded ones, which differ by rank.

    Bits are summed as integers, so that the result does not depend on the order of summation.
    """
    parameters = {name: p for name, p in module.named_parameters() if not is_sharded(p)}
    sums = [p.flatten().view(BITS[p.element_size()]).sum(dtype=torch.int64) for p in parameters.values()]
    digest = hashlib.sha256(repr([(name, list(p.shape)) for name, p in parameters.items()]).encode())
    digest.update(torch.stack(sums).cpu().numpy().tobytes() if sums else b"")
    return digest.hexdigest()[:16]
