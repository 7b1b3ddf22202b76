"""Training with bf16-mixed: what is half, and what is not."""

import math

import torch
from lightning.pytorch import Callback

from moss_train.training import CatModule
from moss_train.training.module import update_result
from moss_train.training.run.warm_start import module_arguments
from tools.short_runs import train_in_memory

WATCHED = ("tokenizer.quantizer.input_proj", "tokenizer.encoder.1.input_proj", "semantic.projection", "discriminators")


class Gradients(Callback):
    """Notes of watched parameters the type of their gradients and whether autocast was on; the loss of every update."""

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


def train(config: dict) -> tuple[CatModule, Gradients]:
    module, gradients = CatModule(**module_arguments(config)), Gradients()
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
