"""The residual quantizer: search, prefixes, straight-through gradients, and the mask of quantizer dropout."""

import pytest
import torch
import torch.nn.functional as F

from moss_train.model.quantizer import ResidualLFQ

LEVELS = 5


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return ResidualLFQ(input_dim=12, rvq_dim=10, output_dim=12, num_quantizers=LEVELS, codebook_size=16, codebook_dim=4)


@pytest.fixture
def latent():
    return torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))


def test_search_finds_the_nearest_direction_and_looks_up_the_raw_row(quantizer, latent):
    level = quantizer.quantizers[0]
    residual = quantizer.input_proj(latent.transpose(1, 2)).transpose(1, 2)
    _, codes, searched, row = level(residual)
    distances = torch.cdist(F.normalize(searched, dim=-1), F.normalize(level.codebook.weight, dim=-1))
    assert torch.equal(codes, distances.argmin(dim=-1))
    assert torch.equal(row, level.codebook.weight[codes])


@pytest.mark.parametrize("used", range(1, LEVELS + 1))
def test_masked_levels_leave_the_decoding_of_the_prefix(quantizer, latent, used):
    output = quantizer(latent, torch.full((3,), used))
    torch.testing.assert_close(output.quantized, quantizer.decode(output.codes[:used]))
    assert torch.equal(output.codes[:used], quantizer.encode(latent, used))


def test_every_item_has_its_own_prefix(quantizer, latent):
    used = torch.tensor([1, 3, LEVELS])
    output = quantizer(latent, used)
    assert output.level_mask.sum(dim=0).tolist() == used.tolist()
    assert torch.equal(output.codes, quantizer(latent).codes)
    for item, count in enumerate(used):
        expected = quantizer.decode(output.codes[:count, item : item + 1])
        torch.testing.assert_close(output.quantized[item : item + 1], expected)


def test_every_parameter_takes_part_whatever_is_dropped(quantizer, latent):
    output = quantizer(latent, torch.ones(3, dtype=torch.int64))
    terms = (output.latents - output.codewords.detach()).square().mean() + (
        output.codewords - output.latents.detach()
    ).abs().mean()
    gradients = torch.autograd.grad(output.quantized.square().mean() + terms, list(quantizer.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradient_passes_straight_through_to_the_latent(quantizer, latent):
    """The gradient is that of the projections alone, as if each level passed its latent on."""
    latent.requires_grad_()
    quantizer(latent, torch.ones(3, dtype=torch.int64)).quantized.sum().backward()
    down = quantizer.input_proj.weight[..., 0]
    level = quantizer.quantizers[0]
    up = quantizer.output_proj.weight[..., 0]
    chain = up @ level.out_proj.weight[..., 0] @ level.in_proj.weight[..., 0] @ down
    torch.testing.assert_close(latent.grad, chain.sum(dim=0).expand_as(latent), rtol=1e-4, atol=1e-6)


def test_codes_do_not_depend_on_autocast(quantizer, latent):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(latent)
        codes = quantizer.encode(latent, LEVELS)
    assert output.quantized.dtype == torch.float32
    assert torch.equal(output.codes, quantizer(latent).codes)
    assert torch.equal(codes, output.codes)
