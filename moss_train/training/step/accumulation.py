"""Accumulate the gradients of an update's micro-batches in float32, with few kernels and little memory traffic.

Under autocast each element of a linear weight costs 24 bytes of memory traffic per micro-batch: the weight is cast for
the product, its gradient is cast back, and the gradient is added. `Accumulation` casts the weight once per update and
adds the 16-bit gradient of the copy directly: 10 bytes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from moss_train.model.transformer import ProjectedTransformer
from moss_train.training.distributed.fsdp import is_sharded, layers_of, local_tensor

SMALL = 2**18
"""Gradients of at most this many elements are added many at once: launching a kernel for each would take longer than
the addition."""


class Accumulation:
    """Accumulates the gradients of an update, micro-batch by micro-batch, into `grad` of the parameters.

    Use:

        accumulation = Accumulation(networks, parameters, torch.bfloat16)
        with accumulation.copies_in_place():
            for micro_batch in micro_batches:
                loss(micro_batch).backward()
                accumulation.add_small()
        accumulation.finish()

    Args:
        networks: networks whose transformer layers compute in `dtype`, each called once per micro-batch.
        parameters: all parameters that need gradients; copies of other weights get none.
        dtype: dtype of autocast; None without autocast.

    Attributes:
        large_leaves: maps each large parameter to the leaf that receives its gradient in a backward pass, a copy or
            itself. Once the leaf's hooks have run, the parameter's `grad` holds the sum so far.
        small_leaves: the same for small parameters, which are added many at once; `finish` sets their `grad`.
    """

    def __init__(
        self, networks: Iterable[nn.Module], parameters: Iterable[nn.Parameter], dtype: torch.dtype | None
    ) -> None:
        places = [] if dtype is None else layer_weights(networks)
        self._places = [(module, name, getattr(module, name)) for module, name in places]
        parameters = dict.fromkeys(parameters)
        weights = [weight for _, _, weight in self._places]
        with torch.no_grad():
            copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
            if copies:  # all weights are cast in one call; each copy is a leaf
                torch._foreach_copy_(copies, weights)
        self._copies = {
            weight: nn.Parameter(copy, requires_grad=weight.requires_grad and weight in parameters)
            for weight, copy in zip(weights, copies, strict=True)
        }
        leaves = {parameter: self._copies.get(parameter, parameter) for parameter in parameters}
        self.small_leaves = {p: leaf for p, leaf in leaves.items() if local_tensor(p).numel() <= SMALL}
        self.large_leaves = {p: leaf for p, leaf in leaves.items() if local_tensor(p).numel() > SMALL}
        self._sums: dict[nn.Parameter, Tensor] = {}
        for weight, leaf in self.large_leaves.items():
            if leaf is not weight and leaf.requires_grad:  # a part may be frozen in this stage
                leaf.register_post_accumulate_grad_hook(partial(add_to, weight))

    @contextmanager
    def copies_in_place(self) -> Iterator[None]:
        """Replace the layers' weights by the copies inside the `with` block."""
        try:
            for module, name, weight in self._places:
                module._parameters[name] = self._copies[weight]
            yield
        finally:
            for module, name, weight in self._places:
                module._parameters[name] = weight

    @torch.no_grad()
    def add_small(self) -> None:
        """Add the small parameters' gradients of the last backward pass to the sums of the earlier ones."""
        found: dict[nn.Parameter, Tensor] = {}
        for parameter, leaf in self.small_leaves.items():
            if leaf.grad is not None:
                found[parameter], leaf.grad = leaf.grad, None
        halves = [(p, gradient) for p, gradient in found.items() if gradient.dtype != p.dtype]
        if halves:
            in_full = [torch.empty_like(gradient, dtype=p.dtype) for p, gradient in halves]
            torch._foreach_copy_(in_full, [gradient for _, gradient in halves])
            found |= zip((p for p, _ in halves), in_full, strict=True)
        again = [p for p in found if p in self._sums]
        if again:
            torch._foreach_add_([local_tensor(self._sums[p]) for p in again], [local_tensor(found[p]) for p in again])
        self._sums |= {p: gradient for p, gradient in found.items() if p not in self._sums}

    def finish(self) -> None:
        """Set `grad` of all parameters to the sum over all passes; call it after the last backward pass."""
        self.add_small()
        for parameter, total in self._sums.items():
            parameter.grad = total
        self._sums = {}


def layer_weights(networks: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Return (module, name) of linear layers' weights and biases that autocast would cast, if used in one place only.

    They belong to transformer layers and to the projections between stages. Sharded ones are left out: FSDP2 gathers
    them in the dtype of the products.
    """
    parts = [part for network in networks for layer in layers_of(network) for part in layer.modules()]
    for stage in (part for network in networks for part in network.modules()):
        if isinstance(stage, ProjectedTransformer):  # waveforms are projected in float32
            parts += [] if stage.takes_audio else [stage.input_proj]
            parts += [] if stage.makes_audio else [stage.output_proj]
    linears = dict.fromkeys(part for part in parts if isinstance(part, nn.Linear))
    places = [(module, name) for module in linears for name, _ in module.named_parameters(recurse=False)]
    uses = Counter(p for network in networks for _, p in network.named_parameters(remove_duplicate=False))
    return [
        (module, name)
        for module, name in places
        if uses[getattr(module, name)] == 1 and not is_sharded(getattr(module, name))
    ]


@torch.no_grad()
def add_to(weight: nn.Parameter, copy: Tensor) -> None:
    """Add the gradient of a copy to that of its weight, in the weight's dtype, and free the copy's."""
    assert copy.grad is not None
    if weight.grad is None:
        weight.grad = copy.grad.to(weight.dtype)
    else:
        weight.grad.add_(copy.grad)
    copy.grad = None
