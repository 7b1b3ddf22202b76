"""Gradients accumulated with few kernels are bit-identical to those of plain backward passes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import moss_train.training.step.accumulation as accumulation
from moss_train.batch import UpdateBatch
from moss_train.model.transformer import ProjectedTransformer
from moss_train.training import CatModule
from moss_train.training.run.optimizations import compile_blocks
from moss_train.training.run.warm_start import plan_initialization
from moss_train.training.step.accumulation import layer_weights

from . import ranks
from .gradients import accumulate, network_errors, pick, without_text

ADVERSARIAL = 5  # an update in which every network is trained


@pytest.fixture
def arguments(small_config) -> dict[str, Any]:
    return plan_initialization(small_config()).arguments


@pytest.fixture
def few_small(monkeypatch):
    """Lower the size limit, so that the small model has both kinds of parameters."""
    monkeypatch.setattr(accumulation, "SMALL", 500)


def micro_batches(batch: UpdateBatch, count: int) -> UpdateBatch:
    """Return micro-batches of one clip, alternately with and without text."""
    clips = [pick(micro, [i]) for micro in batch.micro_batches for i in range(micro.num_clips)]
    clips.sort(key=lambda clip: clip.audio.shape[-1])
    spoken = [clip for clip in clips if clip.text_lengths[0]]
    silent = [clip for clip in clips if not clip.text_lengths[0]]
    return replace(batch, micro_batches=(spoken[0], silent[0], spoken[1])[:count])


def without_cache(dtype: torch.dtype | None) -> torch.autocast:
    """Return an autocast like Lightning's, or one that is disabled."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None, cache_enabled=False)


@pytest.mark.parametrize("has_text", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_are_those_of_plain_passes(few_small, arguments, update, count, has_text, dtype):
    batch = micro_batches(update, count)
    batch = batch if has_text else without_text(batch)
    with without_cache(dtype):
        expected = accumulate(CatModule(**arguments), batch.micro_batches, ADVERSARIAL)
    found, _ = ranks.gradients(arguments, batch, ADVERSARIAL, half=without_cache(dtype))
    assert found.keys() == expected.keys()
    assert any(name.startswith("semantic.") for name in found) == has_text
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.nightly)])
def test_gradients_of_compiled_blocks_are_those_of_plain_passes(few_small, arguments, update, backend):
    batch = micro_batches(update, 3)
    with without_cache(torch.bfloat16):
        expected = accumulate(CatModule(**arguments), batch.micro_batches, ADVERSARIAL)
    torch._dynamo.reset()
    found, _ = ranks.gradients(
        arguments,
        batch,
        ADVERSARIAL,
        half=without_cache(torch.bfloat16),
        prepare=lambda module: compile_blocks(module, backend),
    )
    torch._dynamo.reset()
    assert found.keys() == expected.keys()
    errors = network_errors(found, expected)
    assert max(errors.values()) < 2e-2, errors  # matrix products in bfloat16


def test_all_linear_weights_of_layers_are_copied_and_shared_ones_are_not(module):
    found = {id(getattr(part, name)) for part, name in layer_weights([module.tokenizer, module.semantic])}
    names = [name for name, p in module.named_parameters() if id(p) in found]
    assert len(names) == len(found)
    linears = ("in_projs.0.weight", "out_projs.0.weight", "linear1.weight", "linear2.weight", "_proj.weight")
    expected = [name for name, p in module.named_parameters() if ".layers." in name and name.endswith(linears)]
    stages = [*module.tokenizer.encoder, *module.tokenizer.decoder]
    projections = {id(p): name for name, p in module.tokenizer.named_parameters() if "put_proj" in name}
    precise = [
        projection.weight
        for stage in stages
        if isinstance(stage, ProjectedTransformer)
        for projection, has_audio in ((stage.input_proj, stage.takes_audio), (stage.output_proj, stage.makes_audio))
        if has_audio
    ]
    assert len(precise) == 2
    del projections[id(precise[0])], projections[id(precise[1])]
    expected += [f"tokenizer.{name}" for name in projections.values() if "quantizer" not in name]
    biases = [name for name, p in module.named_parameters() if ".layers." in name and name.endswith("_proj.bias")]
    assert sorted(names) == sorted([*expected, *biases])
    shared = nn.Linear(4, 4)
    network = nn.Module()
    network.layers = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared, nn.Linear(4, 4))])
    assert [part for part, name in layer_weights([network]) if part is shared] == []
    assert len(layer_weights([network])) == 2


def test_weights_that_do_not_step_get_no_gradients(few_small, module, update):
    decoder = dict(module.tokenizer.decoder.named_parameters())
    sums = accumulation.Accumulation([module.tokenizer, module.semantic], decoder.values(), torch.bfloat16)
    assert {*sums.small_leaves, *sums.large_leaves} == set(decoder.values())
    with sums.copies_in_place(), without_cache(torch.bfloat16):
        audio = update.micro_batches[0].audio
        loss = module.tokenizer.decode_latent(module.tokenizer.encode_latent(audio)).float().square().mean()
        loss.backward()
    sums.finish()
    linears = {id(getattr(part, name)) for part, name in layer_weights([module.tokenizer])}
    assert {name for name, p in decoder.items() if p.grad is None} == set()
    assert all(p.grad is None for p in module.tokenizer.encoder.parameters() if id(p) in linears)
