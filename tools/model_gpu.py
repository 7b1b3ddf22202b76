"""Predict the time of one micro-batch on a named GPU, operator by operator, without a GPU. This is a model only.

Every operator of the forward and backward pass runs on tensors without data. Its time follows a roofline: it is the
longest of its operations at the share of the peak that matrix products reach, its bytes at the share of the bandwidth
that kernels reach, and the launch time. In the compiled variant, the operators of a compiled part between two matrix
products are one kernel, and tensors that only this kernel uses are never written to memory.

    python tools/model_gpu.py cat_1b6 --gpu h100 --stage 1 --clips 10 --seconds 12 --texts 3
    --gpus 64 adds the speed of that many GPUs: passes of this size, then gradient reduction and optimizer steps
"""

import argparse
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import moss_train.audio.stft as stft
import moss_train.model.attention as attention
from moss_train import load_config
from moss_train.training.cost.estimate import BACKWARD_SHARE, UPDATE_BYTES, exposed_seconds
from moss_train.training.cost.hardware import GPUS
from moss_train.training.module import CatModule, stages_of
from moss_train.training.run.optimizations import compiled_parts
from moss_train.training.run.warm_start import plan_initialization
from moss_train.training.step.accumulation import Accumulation
from moss_train.training.step.schedule import Stage
from tools.dataless import dataless, micro_batch, run_micro_batch

SMS = {"a100": 108, "a100_40gb": 108, "h100_pcie": 114, "l40s": 142, "rtx4090": 128, "b200": 148}  # others: 132
TEXT_TOKENS_PER_SECOND = 15
LAUNCH_SECONDS = 2.5e-6  # shortest duration of a kernel
BANDWIDTH_SHARE, HALF_SHARE, FLOAT_SHARE = 0.85, 0.78, 0.75  # of the data sheet's peak, as reached by good kernels
ATTENTION_SHARE, CONVOLUTION_SHARE, TRIANGULAR_SHARE = 0.5, 0.35, 0.05  # of what matrix products reach
TENSORS_PER_LAUNCH = 64  # for operations on two lists of tensors, in torch's multi-tensor kernels
SMALL_SHARE = 1 / 16  # of what its users write: a compiler recomputes so small a tensor where it is used
BUS_BYTES_PER_SECOND = 300e9
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
EXTERN = PRODUCTS | {
    *(
        "convolution",
        "convolution_backward",
        "_fft_r2c",
        "_fft_c2r",
        "_fft_c2c",
        "embedding_dense_backward",
        "index_put",
    ),
    *("index_put_", "scatter_add_", "scatter", "cumsum", "sort", "cat", "nll_loss_forward", "nll_loss_backward"),
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
    *("window", "window_backward", "linalg_solve_triangular", "_foreach_add_", "_foreach_copy_"),
}

FREE = {"detach", "_unsafe_view", "empty", "empty_like", "lift_fresh", "alias"}


@torch.library.custom_op("moss_model::window", mutates_args=())
def window_forward(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Stand in for the windowed attention kernel of CUDA; [B, T, H, D]."""
    return torch.empty_like(query)


@torch.library.custom_op("moss_model::window_backward", mutates_args=())
def window_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Stand in for its backward kernel."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


window_forward.register_fake(lambda query, key, value, window: torch.empty_like(query))
window_backward.register_fake(
    lambda gradient, query, key, value, window: tuple(map(torch.empty_like, (query, key, value)))
)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.window = inputs[3]


window_forward.register_autograd(
    lambda ctx, gradient: (*window_backward(gradient, *ctx.saved_tensors, ctx.window), None), setup_context=_keep
)


def _window_flops(query: Any, key: Any, value: Any, window: int, **_: Any) -> float:
    batch, frames, heads, width = query.shape
    return 4 * batch * heads * width * frames * min(window, frames / 2)


def _causal_flops(query: Any, key: Any, *_: Any, **__: Any) -> float:
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * width * queries * key.shape[2]


def _triangular_flops(matrix: Any, *_: Any, out_val: Tensor, **__: Any) -> float:
    return math.prod(out_val.shape) * matrix.shape[-1]


FLOPS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.linalg_solve_triangular: _triangular_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _causal_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, *rest, **_: (
        2.5 * _causal_flops(*rest)
    ),
    torch.ops.moss_model.window: _window_flops,
    torch.ops.moss_model.window_backward: lambda gradient, *rest, **_: 2.5 * _window_flops(*rest),
}


@dataclass
class Kernel:
    """One operator, or several fused ones."""

    name: str
    component: str
    call: int  # number of the call of a compiled part, 0 outside compiled parts
    is_backward: bool
    reads: dict[int, int]  # bytes by storage
    writes: dict[int, int]
    flops: float
    is_half: bool
    shape: tuple[int, ...]
    level: int = 0

    @property
    def is_extern(self) -> bool:
        """Whether a compiler leaves the operator to a library."""
        return self.name in EXTERN


@dataclass
class Recorder(TorchDispatchMode):
    """Records every operator that moves data, forward and backward, with the part of the module that it belongs to.

    Attributes:
        kernels: the recorded operators.
        compiles: whether compiled parts run the code path that `torch.compile` takes.
    """

    kernels: list[Kernel] = field(default_factory=list)
    compiles: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, int]] = [("other", 0)]
        self.starts: list[int] = [0]
        self.scopes: list[tuple[str, int]] = [("other", 0)]
        self._alive: list[Any] = []
        self._calls = 0
        self.watched: list[tuple[Any, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name.startswith("_foreach_") and name.endswith("_"):
            for first in range(0, len(args[0]), TENSORS_PER_LAUNCH):
                chosen = slice(first, first + TENSORS_PER_LAUNCH)
                read = args[1:] if name == "_foreach_copy_" else args  # the first argument is only overwritten
                self._note(func, args[0][chosen], [value[chosen] for value in read], 0.0)
            return result
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        inputs = inputs[1:] if name == "copy_" else inputs  # the first argument is only overwritten
        if func.is_view or not outputs or name in FREE:
            return result
        formula = {**flop_registry, **FLOPS}.get(func._overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=result)) if formula else 0.0
        self._note(func, outputs, inputs, flops)
        return result

    def _note(self, func: Any, outputs: Sequence[Tensor], inputs: Any, flops: float) -> None:
        self._alive += [tensor.untyped_storage() for tensor in outputs]
        node = torch._C._current_autograd_node()
        component, call = self.stack[-1]
        if node is not None:
            number = node._sequence_nr()
            is_gradient = number >= 2**63
            component, call = ("gradients", 0) if is_gradient else self.scopes[bisect_right(self.starts, number) - 1]
        self.kernels.append(
            Kernel(
                func.overloadpacket.__name__,
                component,
                call,
                node is not None,
                sizes(tensors(inputs)),
                sizes(outputs),
                flops,
                outputs[0].dtype in (torch.bfloat16, torch.float16),
                tuple(outputs[0].shape),
            )
        )

    @contextmanager
    def scope(self, component: str, is_part: bool) -> Iterator[None]:
        """Assign the operators inside this context to a component, and to one call of a compiled part."""
        self._calls += is_part
        self.stack.append((component, self._calls if is_part else self.stack[-1][1]))
        self._mark()
        is_compiling = torch.compiler.is_compiling
        if is_part and self.compiles:
            torch.compiler.is_compiling = lambda: True
        try:
            yield
        finally:
            torch.compiler.is_compiling = is_compiling
            self.stack.pop()
            self._mark()

    def _mark(self) -> None:
        self.starts.append(torch.autograd._get_sequence_nr())
        self.scopes.append(self.stack[-1])

    def watch(self, owner: Any, method: str, component: str | None, is_part: bool = False) -> None:
        """Run a method of an object in a scope of its own; if `component` is None, it keeps that of its caller."""
        inner = getattr(owner, method)
        self.watched.append((owner, method))

        def outer(*args: Any, **kwargs: Any) -> Any:
            with self.scope(component or self.stack[-1][0], is_part):
                return inner(*args, **kwargs)

        object.__setattr__(owner, method, outer)


def tensors(tree: Any) -> list[Tensor]:
    """Return every tensor in a nested structure."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def sizes(found: Sequence[Tensor]) -> dict[int, int]:
    """Return the bytes of tensors by storage; expanded dimensions count once."""
    result: dict[int, int] = {}
    for tensor in found:
        elements = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        place = tensor.untyped_storage()._cdata
        result[place] = max(result.get(place, 0), elements * tensor.element_size())
    return result


def fuse(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Fuse operators of a compiled part that share a tensor and lie between the same two matrix products."""
    set_levels(kernels)
    parent = list(range(len(kernels)))
    seen: dict[tuple[int, bool, int, int], int] = {}

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, kernel in enumerate(kernels):
        if kernel.call and not kernel.is_extern:
            for place in (*kernel.reads, *kernel.writes):
                key = (kernel.call, kernel.is_backward, kernel.level, place)
                parent[root(i)] = root(seen.setdefault(key, i))
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(kernels)):
        groups[root(i)].append(i)
    users: dict[int, set[int]] = defaultdict(set)
    for i, kernel in enumerate(kernels):
        for place in kernel.reads:
            users[place].add(root(i))
    return [merge([kernels[i] for i in members], users, number) for number, members in groups.items()]


def set_levels(kernels: Sequence[Kernel]) -> None:
    """Set each kernel's level: the number of library kernels before it. Small inputs move to the level of their use."""
    producer: dict[int, int] = {}
    users: dict[int, list[Kernel]] = defaultdict(list)
    depends: set[int] = set()
    for i, kernel in enumerate(kernels):
        for place in kernel.reads if kernel.call else ():
            source = producer.get(place)
            if source is not None:
                before = kernels[source]
                if (before.call, before.is_backward) == (kernel.call, kernel.is_backward):
                    kernel.level = max(kernel.level, before.level + before.is_extern)
                    users[source].append(kernel)
                    depends.add(i)
        for place in kernel.writes:
            producer[place] = i
    for i, kernel in enumerate(kernels):
        size = sum(kernel.writes.values())
        if users[i] and i not in depends and not kernel.is_extern:
            least = min(sum(user.writes.values()) for user in users[i])
            if size <= SMALL_SHARE * least:
                kernel.level = min(user.level for user in users[i])


def merge(members: Sequence[Kernel], users: dict[int, set[int]], number: int) -> Kernel:
    """Return one kernel that reads tensors made by others and writes those that others use, and unused results."""
    first = members[0]
    if len(members) == 1:
        return first
    written: dict[int, int] = {}
    read: dict[int, int] = {}
    for kernel in members:
        for place, size in kernel.reads.items():
            if place not in written:
                read[place] = max(read.get(place, 0), size)
        written |= kernel.writes
    kept = {place: size for place, size in written.items() if users.get(place, {-1}) != {number}}
    return Kernel("fused", first.component, first.call, first.is_backward, read, kept, 0.0, first.is_half, first.shape)


def seconds_of(kernel: Kernel, gpu: str) -> float:
    """Return the duration of a kernel according to the roofline."""
    spec = GPUS[gpu]
    moved = sum(kernel.reads.values()) + sum(kernel.writes.values())
    peak = spec.bf16 * HALF_SHARE if kernel.is_half else spec.fp32 * FLOAT_SHARE
    share = 1.0
    if kernel.name in PRODUCTS:
        share = tile_share(kernel.shape, kernel.flops / (2 * math.prod(kernel.shape)), SMS.get(gpu, 132))
    elif "conv" in kernel.name:
        share = CONVOLUTION_SHARE
    elif kernel.name == "linalg_solve_triangular":
        share = TRIANGULAR_SHARE
    elif kernel.flops:
        share = ATTENTION_SHARE
    computing = kernel.flops / (peak * 1e12 * share)
    return max(computing, moved / (spec.bandwidth * 1e12 * BANDWIDTH_SHARE), LAUNCH_SECONDS)


def tile_share(shape: Sequence[int], depth: float, num_sms: int) -> float:
    """Return the share of a product's peak that whole tiles in whole waves allow, for the best of three tile sizes.

    If a deep product has few tiles, as for the gradient of a weight, its depth is split into parts of at least 1024.
    """
    rows, columns, number = shape[-2], shape[-1], math.prod(shape[:-2])
    best = 0.0
    for height, width, speed in ((128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.77)):
        tiles = number * math.ceil(rows / height) * math.ceil(columns / width)
        used = rows * columns * number / (tiles * height * width)
        for splits in (1, 2, 4, 8, 16, 32):
            if splits == 1 or depth >= 1024 * splits:
                waves = tiles * splits / num_sms
                best = max(best, used * waves / math.ceil(waves) * speed)
    return best


def record(module: CatModule, stage: Stage, options: argparse.Namespace, compiles: bool) -> list[Kernel]:
    """Record one micro-batch at the end of a stage, all losses at full weight, but not the first of its update."""
    tokens = round(TEXT_TOKENS_PER_SECOND * options.seconds)
    batch = micro_batch(module, options.clips, options.seconds, options.texts, tokens, "cpu")
    recorder = Recorder(compiles=compiles)
    accumulation = Accumulation(module.networks.with_layers, module.parameters(), torch.bfloat16)
    for leaf in accumulation.small_leaves.values():
        leaf.grad = torch.zeros_like(leaf)
    accumulation.add_small()
    for parameter in accumulation.large_leaves:
        parameter.grad = torch.zeros_like(parameter)

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with torch.autocast("cpu", enabled=False):
            loss.backward(*args, **kwargs)

    with accumulation.copies_in_place(), recorder, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with scopes(module, recorder):
            run_micro_batch(module, batch, stage, backward)
        with recorder.scope("gradients", is_part=False):
            accumulation.add_small()
    return recorder.kernels


@contextmanager
def scopes(module: CatModule, recorder: Recorder) -> Iterator[None]:
    """Label the components and compiled parts of a module for the recorder inside this context."""
    for stage in stages_of(module.tokenizer):
        rate = module.tokenizer.config.frame_rate * stage.frames_per_code_frame
        recorder.watch(stage, "forward", f"stages of {rate:g} Hz")
    for owner, method, name in (
        (module.tokenizer.quantizer, "forward", "quantizer"),
        (module.objective, "audio_terms", "losses of the waveform"),
        (module.semantic, "forward", "text LM"),
        (module.discriminators, "forward", "discriminators"),
        (module.objective, "adversarial_terms", "adversarial terms"),
        (module.objective, "discriminator_loss", "adversarial terms"),
    ):
        if owner is not None:
            recorder.watch(owner, method, name)
    for part in compiled_parts(module):
        recorder.watch(part, "forward", None, is_part=True)
    yield
    for owner, method in recorder.watched:
        owner.__dict__.pop(method)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Use the windowed attention kernel in bfloat16 and one kernel for magnitudes, as on CUDA."""
    places: list[tuple[Any, str, Any]] = [
        (attention, "has_window_kernel", lambda query: query.dtype == torch.bfloat16),
        (attention, "flash_attention", window_forward),
        (stft, "absolute", torch.abs),
    ]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


def report(kernels: Sequence[Kernel], gpu: str) -> None:
    """Print the table of one variant."""
    rows: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0, 0, 0, 0])
    for kernel in kernels:
        row = rows[kernel.component, kernel.is_backward]
        moved = sum(kernel.reads.values()) + sum(kernel.writes.values())
        for i, value in enumerate((1, kernel.flops / 1e12, moved / 1e9, 1e3 * seconds_of(kernel, gpu))):
            row[i] += value
    print("| component | launches | TFLOP | GB | ms | backward: launches | TFLOP | GB | ms |\n" + "|---" * 9 + "|")
    names = sorted({name for name, _ in rows}, key=lambda name: -rows[name, False][3] - rows[name, True][3])
    for name in names:
        cells = [f"{n:,.0f} | {t:.2f} | {g:.1f} | {ms:.2f}" for n, t, g, ms in (rows[name, False], rows[name, True])]
        print(f"| {name} | {cells[0]} | {cells[1]} |")
    launches, flops, _, milliseconds = (sum(row[i] for row in rows.values()) for i in range(4))
    print(f"\nall: {launches:,.0f} launches, {flops:.2f} TFLOP, {milliseconds:.1f} ms")


def main() -> None:
    """Print the predicted time of one micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--gpu", default="h100", choices=list(GPUS))
    parser.add_argument("--gpus", type=int, default=1)
    for name, default in (("stage", 1), ("clips", 10), ("texts", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=12.0)
    options = parser.parse_args()
    config = load_config("fit", [f"experiment={options.experiment}", *options.overrides])
    arguments = plan_initialization(config).arguments
    with as_on_cuda(), dataless():
        module = CatModule(**arguments).train()
        stage = module.schedule.stages[options.stage - 1]
        variants = {
            "eager": record(module, stage, options, compiles=False),
            "compiled": fuse(record(module, stage, options, compiles=True)),
        }
    print(
        f"A model, not a measurement: stage {options.stage} of {options.experiment}, {options.clips} clips of "
        f"{options.seconds:g} s, {options.texts} with text, on {options.gpu}"
    )
    for name, variant in variants.items():
        print(f"\n{name}\n")
        report(variant, options.gpu)
        pace(module, variant, options)


def pace(module: CatModule, kernels: Sequence[Kernel], options: argparse.Namespace) -> None:
    """Print the audio throughput of one GPU, and the time of an update and the throughput of `--gpus` GPUs."""
    audio = options.clips * options.seconds
    taken = sum(seconds_of(kernel, options.gpu) for kernel in kernels)
    flops = sum(kernel.flops for kernel in kernels)
    peak = GPUS[options.gpu].bf16 * 1e12
    print(f"{audio / taken:,.0f} audio-s/s on one GPU, {flops / taken / peak:.1%} of the dense bf16 peak")
    stage = module.schedule.stages[options.stage - 1]
    passes = max(1, math.ceil(stage.batch_seconds / options.gpus / audio - 0.05))
    learning = sum(p.numel() for p in module.parameters())
    if not stage.adversarial and module.discriminators is not None:
        learning -= sum(p.numel() for p in module.discriminators.parameters())
    seconds = update_seconds(taken, passes, learning, options)
    print(
        f"{options.gpus} GPUs: {passes} passes and {1e3 * (seconds - passes * taken):.0f} ms of sums (bf16) and steps "
        f"in {1e3 * seconds:.0f} ms, {stage.batch_seconds / seconds:,.0f} audio-s/s"
    )


def update_seconds(taken: float, passes: int, learning: int, options: argparse.Namespace) -> float:
    """Return the time of an update of `passes` passes: gradients are reduced during the last backward pass."""
    sums = 4 * (options.gpus - 1) / options.gpus * learning / BUS_BYTES_PER_SECOND
    stepping = UPDATE_BYTES * learning / (GPUS[options.gpu].bandwidth * 1e12)
    return passes * taken + exposed_seconds(sums, BACKWARD_SHARE * taken, learning) + stepping


if __name__ == "__main__":
    main()
