"""A decoder at a multiple of the encoder's sampling rate: the same codes, more samples."""

import pytest
import torch

from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel

from .small_models import RATE, relative_error, small_config, small_model


def with_output_rate(model: MossAudioTokenizerModel, ratio: int, **options) -> MossAudioTokenizerModel:
    """Copy a model, with a decoder whose randomly initialized last projection makes `ratio` times the samples."""
    other = small_model(output_sampling_rate=ratio * model.sampling_rate, **options)
    own = other.state_dict()
    fits = {name: value for name, value in model.state_dict().items() if own[name].shape == value.shape}
    assert own.keys() - fits.keys() == {"decoder.4.output_proj.weight"}
    other.load_state_dict(own | fits)
    return other


@pytest.fixture(params=[{}, {"number_channels": 2}], ids=["mono", "stereo"])
def pair(request) -> tuple[MossAudioTokenizerModel, MossAudioTokenizerModel]:
    """Return a model and a copy with three times the output rate."""
    model = small_model(**request.param)
    return model, with_output_rate(model, 3, **request.param)


def clips(model: MossAudioTokenizerModel, batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, model.config.number_channels, length, generator=torch.Generator().manual_seed(1)) * 0.3


def test_codes_are_those_of_the_model_with_one_rate(pair):
    model, higher = pair
    audio = clips(model, 2, 1001)
    assert torch.equal(higher.encode(audio).audio_codes, model.encode(audio).audio_codes)
    streamed = higher.encode(audio, chunk_duration=1 / model.config.frame_rate).audio_codes
    assert torch.equal(streamed, model.encode(audio, chunk_duration=1 / model.config.frame_rate).audio_codes)


def test_decoded_audio_has_the_higher_rate_and_equals_the_streamed(pair):
    _, higher = pair
    config = higher.config
    assert (higher.sampling_rate, higher.output_sampling_rate) == (RATE, 3 * RATE)
    assert (config.upsample_rate, config.output_ratio) == (3 * config.downsample_rate, 3)
    codes = torch.randint(0, 32, (4, 2, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(40) < torch.tensor([[40], [23]])
    whole = higher.decode(codes, mask)
    assert whole.audio.shape == (2, config.number_channels, 40 * config.upsample_rate)
    assert whole.audio_lengths.tolist() == [40 * config.upsample_rate, 23 * config.upsample_rate]
    for frames in (1, 3):
        chunked = higher.decode(codes, chunk_duration=frames / config.frame_rate).audio
        assert relative_error(chunked, whole.audio) < 1e-5
    stream = higher.stream(2)
    parts = [stream.decode(part, torch.tensor([part.shape[2], 0])) for part in codes.split([5, 30, 5], dim=2)]
    assert [counts.tolist() for _, counts in parts] == [[n * config.upsample_rate, 0] for n in (5, 30, 5)]
    assert relative_error(torch.cat([audio for audio, _ in parts], dim=2)[0], whole.audio[0]) < 1e-5


def test_forward_gives_as_much_audio_as_it_got_at_the_higher_rate(pair):
    model, higher = pair
    audio = clips(model, 2, 100)
    mask = torch.arange(100) < torch.tensor([[100], [41]])
    output = higher(audio, mask)
    assert output.audio.shape == (2, model.config.number_channels, 300)
    assert output.audio_lengths.tolist() == [300, 123]
    output.audio.square().mean().backward()
    assert float(higher.decoder[4].output_proj.weight.grad.abs().sum()) > 0


def test_batches_of_different_lengths_are_as_the_clips_alone(pair):
    _, higher = pair
    codes = [torch.randint(0, 32, (4, frames), generator=torch.Generator().manual_seed(frames)) for frames in (7, 20)]
    together = higher.batch_decode(codes, batch_invariant=True)
    for item, (code, audio) in enumerate(zip(codes, together.audio, strict=True)):
        alone = higher.decode(code).audio[0]
        assert int(together.audio_lengths[item]) == alone.shape[1]
        assert torch.equal(audio[:, : alone.shape[1]], alone)
        assert not audio[:, alone.shape[1] :].any()


def test_the_rate_survives_saving_and_files_of_one_rate_do_not_name_it(tmp_path):
    small_model(output_sampling_rate=2 * RATE).save_pretrained(tmp_path)
    loaded = MossAudioTokenizerModel.from_pretrained(tmp_path)
    assert (loaded.sampling_rate, loaded.output_sampling_rate) == (RATE, 2 * RATE)
    for given in ({}, {"output_sampling_rate": None}, {"output_sampling_rate": RATE}):
        assert "output_sampling_rate" not in small_config(**given).to_json_string(use_diff=False)
        assert small_config(**given).to_json_string() == small_config().to_json_string()
        assert small_config(**given).output_sampling_rate == RATE


@pytest.mark.parametrize("number_channels", [1, 2])
@pytest.mark.parametrize("rate", [RATE * 3 // 2, RATE // 2, 0, -RATE, 2.5 * RATE, True])
def test_a_rate_that_is_no_multiple_is_refused(rate, number_channels):
    with pytest.raises(ValueError, match="output_sampling_rate"):
        small_config(output_sampling_rate=rate, number_channels=number_channels)


def test_a_decoder_that_does_not_fit_the_rate_is_refused():
    values = small_config().to_dict() | {"output_sampling_rate": 2 * RATE}
    with pytest.raises(ValueError, match=r"decoder_kwargs: patch sizes \[2, 2, 4\] multiply to 16, .* 16 x 2"):
        MossAudioTokenizerConfig(**values)
