"""Stages without the quantizer, and the levels that are fitted to data after them."""

import pytest
import torch

from moss_train.cli.main import main
from moss_train.export.load import load_tokenizer
from moss_train.model.quantizer import ResidualLFQ
from moss_train.training.callbacks.quantizer import fit_updates
from moss_train.training.loggers.base import read_table
from moss_train.training.step.quantizer_start import fit_quantizer, pass_unquantized
from moss_train.training.step.schedule import Schedule
from moss_train.utils.checkpoint import list_checkpoints

from ..faults.harness import assert_same_run
from .runs import column


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return ResidualLFQ(24, 16, 24, num_quantizers=4, codebook_size=32, codebook_dim=4)


@pytest.fixture
def latents():
    """[2000, 24], most of the variance in a few directions, with a mean."""
    generator = torch.Generator().manual_seed(1)
    scales = 3 * 0.7 ** torch.arange(24)
    return torch.randn(2000, 24, generator=generator) * scales + torch.linspace(-2, 2, 24)


def test_what_is_left_is_what_the_quantizer_leaves(quantizer, latents):
    left = fit_quantizer(quantizer, latents)
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.15
    hidden = pass_unquantized(quantizer, latents[None]).quantized
    for levels, share in enumerate(left, start=1):
        quantized = quantizer(latents[None], torch.tensor([levels])).quantized
        error = torch.linalg.lstsq(output_weight(quantizer), (hidden - quantized)[0].T).solution
        reference = torch.linalg.lstsq(output_weight(quantizer), (hidden - hidden.mean(1, keepdim=True))[0].T).solution
        assert (error.square().sum() / reference.square().sum()).item() == pytest.approx(share, rel=1e-3)


def output_weight(quantizer: ResidualLFQ) -> torch.Tensor:
    return quantizer.output_proj.weight[:, :, 0].detach()


def test_a_fit_depends_on_latents_and_seed_alone(quantizer, latents):
    fit_quantizer(quantizer, latents, seed=3)
    first = {name: value.clone() for name, value in quantizer.state_dict().items()}
    torch.manual_seed(7)
    fit_quantizer(quantizer, latents, seed=3)
    assert all(torch.equal(first[name], value) for name, value in quantizer.state_dict().items())
    with pytest.raises(ValueError, match="31 frames are too few for codebooks of 32"):
        fit_quantizer(quantizer, latents[:31])


def test_without_levels_the_latent_passes_and_no_level_has_a_gradient(quantizer, latents):
    passed = pass_unquantized(quantizer, latents[None])
    assert not passed.level_mask.any()
    passed.quantized.sum().backward()
    assert quantizer.input_proj.parametrizations.weight.original1.grad is not None
    assert all(parameter.grad is None for parameter in quantizer.quantizers.parameters())


def test_the_fit_comes_before_the_first_update_that_quantizes():
    def ends(*quantize):
        stages = [{"name": str(i), "updates": 3, "batch_seconds": 1.0, "quantize": q} for i, q in enumerate(quantize)]
        return fit_updates(Schedule.from_config(stages))

    assert ends(True, True) == set()
    assert ends(False, True, True) == {3}
    assert ends(False, False, True) == {6}
    with pytest.raises(ValueError, match="quantize"):
        ends("no")


@pytest.fixture(scope="module")
def stages():
    common = "batch_seconds: 4.0, learning_rate: 1.0e-3, warmup_updates: 1"
    return (
        f"stages=[{{name: continuous, updates: 2, quantize: false, {common}}}, {{name: codes, updates: 2, {common}}}]"
    )


def test_a_run_that_stops_at_the_fit_goes_on_exactly(small_overrides, recordings, stages, tmp_path, capfd):
    validation = [f"validation.data={recordings / 'heldout.jsonl'}", "validation.every_updates=1"]
    overrides = [*small_overrides, stages, "checkpoint.every_updates=1", "checkpoint.keep_last=4"]
    overrides += [*validation, "validation.max_clips=1", "checkpoint.monitor=null"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["fit", *overrides, f"run_dir={whole}"]) == 0
    assert "quantizer fitted" in capfd.readouterr().err
    assert main(["fit", *overrides, f"run_dir={parts}", "max_updates=2"]) == 0
    assert main(["fit", *overrides, f"run_dir={parts}"]) == 0
    assert_same_run(parts, whole)
    scored = column(read_table(whole / "validation.csv"), "update")
    assert scored == [0, 3, 4]  # not between: levels that are not fitted yet say nothing
    commitment = column(read_table(whole / "metrics.csv"), "loss/commitment")
    assert commitment[:2] == [0.0, 0.0]
    assert min(commitment[2:]) > 0
    before, after = (load_tokenizer(path).quantizer for path in list_checkpoints(whole / "checkpoints")[1:3])
    assert not torch.equal(before.quantizers[0].codebook.weight, after.quantizers[0].codebook.weight)
