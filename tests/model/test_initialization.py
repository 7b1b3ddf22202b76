"""The output of an untrained model is audible, and its first layer learns."""

import torch

from moss_train.model import MossAudioTokenizerModel

from .small_models import small_config

STAGES = (
    {"patch_size": 240, "output_dimension": 64, "d_model": 64, "num_heads": 2, "num_layers": 2},
    {"patch_size": 8, "output_dimension": 96, "d_model": 96, "num_heads": 3, "num_layers": 2},
)


def untrained():
    torch.manual_seed(0)
    quantizer = {"rvq_dim": 64, "num_quantizers": 4, "codebook_size": 64, "codebook_dim": 8}
    return MossAudioTokenizerModel(small_config(10.0, sampling_rate=24000, stages=STAGES, quantizer=quantizer))


def test_output_is_audible_and_the_gradient_reaches_the_first_layer():
    model = untrained()
    audio = torch.randn(1, 1, 24000, generator=torch.Generator().manual_seed(1)) * 0.1
    output = model(audio).audio
    assert 0.01 < float(output.square().mean().sqrt()) < 100
    (output - audio).abs().mean().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "codebook" not in name)
    first = model.encoder[1]
    for parameter in (first.input_proj.weight, first.transformer.layers[0].self_attn.in_projs[0].weight):
        assert float(parameter.grad.norm()) > 1e-6


def test_weights_are_as_described():
    model = untrained()
    layer = model.encoder[1].transformer.layers[0]
    assert torch.equal(layer.layer_scale_1.scale, torch.full((64,), 0.01))
    assert torch.equal(layer.norm1.weight, torch.ones(64))
    deviation = (2 / (64 + 256)) ** 0.5
    assert abs(float(layer.linear1.weight.std()) / deviation - 1) < 0.05
    assert abs(float(model.quantizer.quantizers[0].codebook.weight.std()) - 1) < 0.15
    projection = model.quantizer.input_proj.parametrizations.weight
    torch.testing.assert_close(projection.original0[:, 0, 0], projection.original1[..., 0].norm(dim=1))
