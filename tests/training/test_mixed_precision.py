"""Training with bf16-mixed: which tensors are in bfloat16 and which are not."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from moss_train.training import CatModule
from moss_train.training.module import update_result
from moss_train.training.run.optimizations import compile_blocks
from moss_train.training.run.warm_start import plan_initialization
from tools.short_runs import train_in_memory

WATCHED = ("tokenizer.quantizer.input_proj", "tokenizer.encoder.1.input_proj", "semantic.projection", "discriminators")


class Gradients(Callback):
    """Records the gradient dtype of watched parameters, whether autocast was on, and the loss of every update."""

    def __init__(self) -> None:
        self.seen: dict[str, set[tuple[torch.dtype, bool]]] = {}
        self.losses: list[float] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        for name, parameter in pl_module.named_parameters():
            for watched in WATCHED:
                if name.startswith(watched):
                    seen = self.seen.setdefault(watched, set())
                    parameter.register_hook(
                        lambda gradient, seen=seen: seen.add((gradient.dtype, torch.is_autocast_enabled("cpu")))
                    )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(update_result(outputs).metrics["loss/generator"])


class WeightCasts(TorchDispatchMode):
    """Counts how often each of some weights is cast to bfloat16, alone or together with others."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.counts = {weight.data_ptr(): 0 for weight in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sources = []
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            sources = [args[0]]
        elif func is torch.ops.aten._foreach_copy_.default:
            sources = args[1]
        for source in sources:
            if source.data_ptr() in self.counts:
                self.counts[source.data_ptr()] += 1
        return func(*args, **(kwargs or {}))


class CountCasts(Callback):
    """Counts casts of the encoder's first layer in every update, and the number of its micro-batches."""

    def __init__(self) -> None:
        self.found: list[tuple[int, set[int]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        layer = pl_module.tokenizer.encoder[1].transformer.layers[0]
        linears = [part.weight for part in layer.modules() if isinstance(part, torch.nn.Linear)]
        self.casts = WeightCasts(linears)
        self.casts.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.casts.__exit__(None, None, None)
        self.found.append((len(batch.micro_batches), set(self.casts.counts.values())))


def train(config: dict) -> tuple[CatModule, Gradients]:
    module, gradients = CatModule(**plan_initialization(config).arguments), Gradients()
    train_in_memory(config, module, [gradients])
    return module, gradients


def test_backward_runs_outside_autocast_on_float32_weights(small_config):
    module, half = train(small_config("trainer.precision=bf16-mixed"))
    assert half.seen == {watched: {(torch.float32, False)} for watched in WATCHED}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    _, full = train(small_config())
    assert len(half.losses) == len(full.losses) == 8
    assert half.losses != full.losses
    assert all(math.isclose(a, b, rel_tol=0.02) for a, b in zip(half.losses, full.losses, strict=True))


@pytest.mark.parametrize("compiler", [False, "eager"])
def test_a_weight_is_cast_once_per_update(small_config, compiler):
    lengths = [
        f"stages.{stage}.{key}={value}" for stage in (0, 1) for key, value in (("updates", 1), ("batch_seconds", 16))
    ]
    lengths += ["stages.0.warmup_updates=0", "stages.1.warmup_updates=0", "stages.1.discriminator_warmup_updates=0"]
    config, casts = small_config("trainer.precision=bf16-mixed", *lengths), CountCasts()
    module = CatModule(**plan_initialization(config).arguments)
    if compiler:
        compile_blocks(module, compiler)
    train_in_memory(config, module, [casts])
    assert [counts for _, counts in casts.found] == [{1}, {1}]
    assert min(micro_batches for micro_batches, _ in casts.found) > 1
