"""Add up the gradients of an update's micro-batches in float32, with few kernels and little traffic.

Under autocast a linear weight takes 24 bytes of traffic in every micro-batch: cast for the product, its gradient cast
back, added. `Accumulation` casts it once per update and adds the gradient of the copy as it is: 10 bytes.
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
"""Elements up to which gradients are added many at once: starting a kernel takes longer than adding so few."""


class Accumulation:
    """Where the gradients of an update come in, micro-batch by micro-batch, and are added to `grad` of its parameters.

    Use:

        accumulation = Accumulation(networks, parameters, torch.bfloat16)
        with accumulation.copies_in_place():
            for micro_batch in micro_batches:
                loss(micro_batch).backward()
                accumulation.add_small()
        accumulation.finish()

    Args:
        networks: whose transformer layers multiply in `dtype`, each called once per micro-batch.
        parameters: all that are to get gradients; copies of other weights get none.
        dtype: of autocast, None without it.

    Attributes:
        large_leaves: what collects gradients in a backward pass for each large parameter: a copy or itself. Once its
            hooks run, the parameter has the sum.
        small_leaves: the same for those that are added many at once; they have theirs after `finish`.
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
            if copies:  # cast many at once; each copy is a leaf
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
        """Within it the layers have the copies in place of their weights."""
        try:
            for module, name, weight in self._places:
                module._parameters[name] = self._copies[weight]
            yield
        finally:
            for module, name, weight in self._places:
                module._parameters[name] = weight

    @torch.no_grad()
    def add_small(self) -> None:
        """Take what a backward pass found for small parameters, and add it to what earlier ones did."""
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
        """After the last backward pass: `grad` of all parameters is the sum of all passes."""
        self.add_small()
        for parameter, total in self._sums.items():
            parameter.grad = total
        self._sums = {}


def layer_weights(networks: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Find weights and biases of linear parts that autocast multiplies: module and name, each used in one place.

    They are those of transformer layers, and the projections between stages. Those that a rank has a share of are left
    out: FSDP2 gathers them in the type of the products.
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
    """Add the gradient of a copy to that of its weight, in the weight's type, and free it."""
    assert copy.grad is not None
    if weight.grad is None:
        weight.grad = copy.grad.to(weight.dtype)
    else:
        weight.grad.add_(copy.grad)
    copy.grad = None
