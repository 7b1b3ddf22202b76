"""Run a whole micro-batch of every experiment and stage on CUDA, on tensors without data.

The host cannot read a value of such a tensor, and operators refuse tensors on two devices, so code that passes never
waits for the GPU. Backward is not run, because autograd's engine needs a driver.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.utils import _to_kwargs

from moss_train import load_config
from moss_train.config.fit_schema import FitConfig
from moss_train.discriminators import Discriminator
from moss_train.export.load import tokenizer_config
from moss_train.model.transformer import ProjectedTransformer, TransformerLayer
from moss_train.training import CatModule
from moss_train.training.run.warm_start import plan_initialization
from moss_train.training.step.update import zero_loss_through_text_lm
from moss_train.utils.files import config_directory
from tools.dataless import dataless, micro_batch, run_micro_batch

ALWAYS = {"cat_1b6", "cat_nano", "finetune"}  # the others differ from these only in sizes
EXPERIMENTS = [
    name if name in ALWAYS else pytest.param(name, marks=pytest.mark.nightly)
    for name in sorted(path.stem for path in (config_directory() / "experiment").glob("*.yaml"))
]


@contextmanager
def cuda_autocast(device_type: str, dtype: Any = None, enabled: bool = True, **_: Any) -> Iterator[None]:
    """Stand in for `torch.autocast`, which would disable itself without a GPU."""
    assert device_type == "cuda"
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def shallow_module(name: str) -> CatModule:
    """Return the module of an experiment in its full widths, with one layer per stage and in the LM."""
    config = load_config("fit", [f"experiment={name}"]).to_plain()
    if config["tokenizer"].get("stages") is None:  # set by the model to continue from
        config["tokenizer"] = load_config("fit", ["experiment=cat_tiny"]).to_plain()["tokenizer"]
    for stage in config["tokenizer"]["stages"]:
        stage["num_layers"] = 1
    if config["semantic"] is not None:
        config["semantic"]["config"]["num_hidden_layers"] = 1
    assert tokenizer_config(config["tokenizer"]).num_quantizers
    with torch.device("cuda"):
        return CatModule(**plan_initialization(FitConfig.parse(config)).arguments).train()


def watch(module: CatModule) -> dict[str, set[torch.dtype]]:
    """Record the dtypes of the inputs and outputs of the parts, with hooks."""
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple | list) else value
        seen.setdefault(name, set()).add(value.dtype)

    def into(name: str) -> Any:
        return lambda part, inputs: note(name, inputs)

    def out_of(name: str) -> Any:
        return lambda part, inputs, output: note(name, output)

    def note_quantizer(part: nn.Module, inputs: Any, output: Any) -> None:
        for value in (output.quantized, output.latents, output.codewords):
            note("quantizer", value)

    kinds: dict[type[nn.Module], str] = {TransformerLayer: "layer", Discriminator: "judge"}
    for part in module.modules():
        for kind, name in kinds.items():
            if isinstance(part, kind):
                part.register_forward_pre_hook(into(name))
        if isinstance(part, TransformerLayer):
            part.linear1.register_forward_hook(out_of("product"))
    module.tokenizer.quantizer.register_forward_hook(note_quantizer)
    last = [part for part in module.tokenizer.decoder if isinstance(part, ProjectedTransformer)][-1]
    last.register_forward_hook(out_of("waveform"))
    if module.semantic is not None:
        module.semantic.language_model.model.layers[0].register_forward_pre_hook(into("LM layer"))
    return seen


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_micro_batch_of_every_stage_never_waits_for_the_gpu_and_has_the_right_types(monkeypatch, name):
    monkeypatch.setattr(torch, "autocast", cuda_autocast)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, inputs, **_: (torch.zeros_like(inputs),))
    with dataless():
        module = shallow_module(name)
        for stage in module.schedule.stages:
            seen = watch(module)
            with cuda_autocast("cuda"):
                run_micro_batch(module, micro_batch(module, 3, 2.5, 2, 9, "cuda"), stage, lambda *_, **__: None)
            assert seen.pop("product") == {torch.bfloat16}
            assert ("LM layer" in seen) == (module.semantic is not None)
            assert ("judge" in seen) == stage.adversarial
            assert {name: kinds for name, kinds in seen.items() if kinds != {torch.float32}} == {}


def test_the_text_lm_never_waits_for_the_gpu_under_fsdp(monkeypatch):
    """FSDP2 moves all tensors among the inputs of a network to the GPU, those that the host reads as well."""
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, inputs, **_: (torch.zeros_like(inputs),))
    gpu, calls = torch.device("cuda", 0), []

    def move(part: nn.Module, args: Any, kwargs: Any) -> Any:
        calls.append(part)
        moved_args, moved_kwargs = _to_kwargs(args, kwargs, gpu, False)
        return moved_args[0], moved_kwargs[0]

    with dataless():
        module = shallow_module("cat_1b6")
        module.semantic.register_forward_pre_hook(move, with_kwargs=True)
        batch = micro_batch(module, 3, 2.5, 2, 9, "cuda")
        run_micro_batch(module, batch, module.schedule.stages[0], lambda *_, **__: None)
        zero_loss_through_text_lm(module.semantic, torch.zeros(2, 5, 768, device=gpu))
    assert calls == [module.semantic] * 2


def test_a_read_of_the_device_is_found(monkeypatch):
    with dataless():
        on_device = torch.zeros(2, dtype=torch.int64, device="cuda")
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            on_device.tolist()
