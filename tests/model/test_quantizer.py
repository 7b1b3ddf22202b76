"""The residual quantizer: search, prefixes, straight-through gradients, and the mask of quantizer dropout."""

import pytest
import torch
import torch.nn.functional as F

from moss_train.model.quantizer import QuantizerOutput, ResidualLFQ, apply_pointwise

LEVELS = 5


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return ResidualLFQ(input_dim=12, rvq_dim=10, output_dim=12, num_quantizers=LEVELS, codebook_size=16, codebook_dim=4)


@pytest.fixture
def latent():
    return torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))


def level_by_level(quantizer: ResidualLFQ, latent: torch.Tensor, used: torch.Tensor) -> QuantizerOutput:
    """Quantize by definition: each level quantizes the residual of the earlier ones."""
    residual = apply_pointwise(quantizer.input_proj, latent)
    total, codes, latents, rows = torch.zeros_like(residual), [], [], []
    for number, level in enumerate(quantizer.quantizers):
        searched, chosen = level.search(residual)
        row = level.codebook(chosen)
        contribution = apply_pointwise(level.out_proj, searched + (row - searched).detach())
        residual = residual - contribution
        total = total + contribution * (number < used)[:, None, None]
        for found, value in zip((codes, latents, rows), (chosen, searched, row), strict=True):
            found.append(value)
    mask = torch.arange(len(codes))[:, None] < used
    quantized = apply_pointwise(quantizer.output_proj, total)
    return QuantizerOutput(quantized, torch.stack(codes), torch.stack(latents), torch.stack(rows), mask)


def test_all_levels_together_are_one_after_the_other_with_their_gradients(latent):
    torch.manual_seed(0)
    quantizer = ResidualLFQ(12, 10, 12, num_quantizers=32, codebook_size=64, codebook_dim=4)
    used, random = torch.tensor([1, 20, 32]), torch.Generator().manual_seed(2)
    weights = [torch.randn(shape, generator=random) for shape in ((3, 7, 12), (32, 3, 7, 4), (32, 3, 7, 4))]
    results = []
    for run in (quantizer, lambda *given: level_by_level(quantizer, *given)):
        given = latent.clone().requires_grad_()
        output = run(given, used)
        outputs = (output.quantized, output.latents, output.codewords)
        loss = sum((weight * value.square()).sum() for weight, value in zip(weights, outputs, strict=True))
        results.append((output, torch.autograd.grad(loss, [given, *quantizer.parameters()])))
    (found, gradients), (expected, expected_gradients) = results
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.level_mask, expected.level_mask)
    for name in ("quantized", "latents", "codewords"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5


def test_search_finds_the_nearest_direction_and_looks_up_the_raw_row(quantizer, latent):
    output, first = quantizer(latent), quantizer.quantizers[0].codebook.weight
    distances = torch.cdist(F.normalize(output.latents[0], dim=-1), F.normalize(first, dim=-1))
    assert torch.equal(output.codes[0], distances.argmin(dim=-1))
    for codes, codewords, level in zip(output.codes, output.codewords, quantizer.quantizers, strict=True):
        assert torch.equal(codewords, level.codebook.weight[codes])


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
    """The gradient is that of the projections alone, as if each level passed its latent through unchanged."""
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
