"""Equality with the released inference code, see tests/data/parity."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moss_train.model import MossAudioTokenizerModel

from .small_models import relative_error

PARITY = Path(__file__).parents[1] / "data" / "parity"
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["tiny24k", "identity16k"])
def case(request):
    folder = PARITY / request.param
    return MossAudioTokenizerModel.from_pretrained(folder).eval(), load_file(folder / "expected.safetensors")


def test_full_input(case):
    model, expected = case
    encoded = model.encode(expected["audio"], return_dict=True)
    assert torch.equal(encoded.audio_codes, expected["full.codes"])
    assert torch.equal(encoded.audio_codes_lengths, expected["full.codes_lengths"])
    assert relative_error(encoded.encoder_hidden_states, expected["full.hidden"]) < TOLERANCE
    decoded = model.decode(expected["full.codes"], return_dict=True)
    assert relative_error(decoded.audio[1:], expected["full.decoded"]) < TOLERANCE
    assert torch.equal(decoded.audio_lengths, expected["full.decoded_lengths"])


def test_prefix_of_the_levels(case):
    model, expected = case
    codes = expected["prefix.codes"]
    assert torch.equal(model.encode(expected["audio"], num_quantizers=len(codes)).audio_codes, codes)
    audio = expected["prefix.decoded"]
    assert relative_error(model.decode(codes).audio[:1, :, : audio.shape[2]], audio) < TOLERANCE
    decoded = model.decode(expected["full.codes"], num_quantizers=len(codes)).audio
    assert torch.equal(decoded, model.decode(codes).audio)


def test_masked_input_counts_a_started_frame(case):
    model, expected = case
    encoded = model.encode(expected["audio"], padding_mask=expected["padding_mask"])
    samples = expected["padding_mask"].sum(dim=1)
    hop = model.config.downsample_rate
    assert encoded.audio_codes_lengths.tolist() == [-(-int(count) // hop) for count in samples]
    for item, floored in enumerate(samples // hop):
        ours, theirs = encoded.audio_codes[:, item], expected["masked.codes"][:, item]
        assert torch.equal(ours[:, :floored], theirs[:, :floored])
        assert not ours[:, encoded.audio_codes_lengths[item] :].any()


def test_started_frame_differs_only_in_being_kept(case):
    model, expected = case
    theirs = expected["partial.codes"]
    hop = model.config.downsample_rate
    samples = int(expected["partial.codes_lengths"][0]) * hop + hop // 2
    for length in (samples, theirs.shape[2] * hop - 1):
        encoded = model.encode(expected["audio"][:1, :, :length])
        frames = encoded.audio_codes.shape[2]
        assert encoded.audio_codes_lengths.tolist() == [frames] == [theirs.shape[2]]
        assert torch.equal(encoded.audio_codes[:, :, : frames - 1], theirs[:, :, : frames - 1])


def test_gradients(case):
    model, expected = case
    latent = expected["grad.decoder_input"].clone().requires_grad_()
    weight = next(p for name, p in model.decoder.named_parameters() if "in_projs" in name)
    loss = model.decode_latent(latent.transpose(1, 2)).square().mean()
    of_latent, of_weight = torch.autograd.grad(loss, (latent, weight))
    assert relative_error(of_latent, expected["grad.decoder_input_grad"]) < TOLERANCE
    assert relative_error(of_weight, expected["grad.first_attention_in_proj"]) < TOLERANCE


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_streaming_equals_the_released_offline_result(case, frames):
    model, expected = case
    seconds = frames / model.config.frame_rate
    streamed = model.encode(expected["audio"], chunk_duration=seconds)
    assert torch.equal(streamed.audio_codes, expected["full.codes"])
    assert relative_error(streamed.encoder_hidden_states, expected["full.hidden"]) < 1e-5
    decoded = model.decode(expected["full.codes"], chunk_duration=seconds).audio
    assert relative_error(decoded[1:], expected["full.decoded"]) < 1e-5
