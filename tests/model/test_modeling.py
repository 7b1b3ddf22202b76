"""The public interface: shapes, lengths, refusals, causality, stereo, and forward against encode and decode."""

import pytest
import torch

from .small_models import HOP, noise, num_real_differences, relative_error, small_model


@pytest.fixture(scope="module")
def model():
    return small_model(1)


def test_forward_is_encode_and_decode(model):
    audio = noise(2, 1, 40 * HOP + 5)
    output = model(audio, num_quantizers=3)
    encoded = model.encode(audio, num_quantizers=3)
    assert torch.equal(output.audio_codes, encoded.audio_codes)
    assert torch.equal(output.audio_codes_lengths, encoded.audio_codes_lengths)
    decoded = model.decode(encoded.audio_codes).audio[..., : audio.shape[2]]
    assert relative_error(output.audio.detach(), decoded) < 1e-5
    assert output.audio.requires_grad
    assert not decoded.requires_grad


def test_results_as_tuples(model):
    audio = noise(1, 1, 3 * HOP)
    codes, lengths, hidden = model.encode(audio, return_dict=False)
    assert (codes.shape, lengths.tolist(), hidden.shape) == ((4, 1, 3), [3], (1, 24, 3))
    restored, lengths = model.decode(codes, return_dict=False)
    assert (restored.shape, lengths.tolist()) == ((1, 1, 3 * HOP), [3 * HOP])
    assert len(model(audio, return_dict=False)) == 4


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (15, 1), (16, 1), (17, 2), (160, 10)])
def test_a_started_frame_counts(model, samples, frames):
    encoded = model.encode(noise(1, samples))
    assert encoded.audio_codes.shape == (4, 1, frames)
    assert encoded.audio_codes_lengths.tolist() == [frames]
    padded = torch.nn.functional.pad(noise(1, samples), (0, frames * HOP - samples))
    assert torch.equal(encoded.audio_codes, model.encode(padded).audio_codes)


def test_batches_of_different_lengths(model):
    clips = [noise(n * HOP - 3, seed=n) for n in (4, 50, 17)]
    together = model.batch_encode(clips)
    assert together.audio_codes_lengths.tolist() == [4, 50, 17]
    for item, clip in enumerate(clips):
        alone = model.encode(clip[None])
        frames = alone.audio_codes.shape[2]
        ours = together.audio_codes[:, item : item + 1, :frames]
        assert num_real_differences(model, alone.encoder_hidden_states, ours, alone.audio_codes) == 0
        assert not together.audio_codes[:, item, frames:].any()
    parts = [together.audio_codes[:, i, :n] for i, n in enumerate(together.audio_codes_lengths)]
    decoded = model.batch_decode(parts)
    assert decoded.audio_lengths.tolist() == [4 * HOP, 50 * HOP, 17 * HOP]
    for item, codes in enumerate(parts):
        alone = model.decode(codes).audio
        assert relative_error(decoded.audio[item : item + 1, :, : alone.shape[2]], alone) < 1e-5


def test_no_input_reaches_an_earlier_frame(model):
    audio = noise(1, 1, 30 * HOP).requires_grad_()
    frame = 20
    (gradient,) = torch.autograd.grad(model.encode_latent(audio)[:, frame].sum(), audio)
    assert not gradient[..., (frame + 1) * HOP :].any()
    assert gradient[..., frame * HOP : (frame + 1) * HOP].abs().min() > 0
    latent = noise(1, 30, 24).requires_grad_()
    part = model.decode_latent(latent)[..., frame * HOP : (frame + 1) * HOP]
    (gradient,) = torch.autograd.grad(part.sum(), latent)
    assert not gradient[:, frame + 1 :].any()
    assert gradient[:, frame].abs().min() > 0


def test_window_is_as_long_as_configured():
    """With one layer per stage, the look-back is the sum of the windows, counted from the start of the frame."""
    stage = {"output_dimension": 8, "d_model": 8, "num_heads": 2, "num_layers": 1}
    model = small_model(stages=[{"patch_size": 4, **stage}, {"patch_size": 4, **stage}], context_seconds=0.5)
    windows = [stage.window for stage in model.stages(model.encoder)]
    assert windows == [20, 5]
    audio = noise(1, 1, 40 * HOP).requires_grad_()
    (gradient,) = torch.autograd.grad(model.encode_latent(audio)[:, 39].sum(), audio)
    first = int(gradient[0, 0].nonzero()[0])
    assert first == (39 - (windows[1] - 1)) * HOP - (windows[0] - 1) * 4


def test_stereo_is_interleaved_in_time():
    model = small_model(2, number_channels=2)
    audio = noise(2, 2, 40 * 8)
    interleaved = torch.stack((audio[:, 0], audio[:, 1]), dim=2).reshape(2, -1, 1)
    x = interleaved
    for module in model.encoder:
        x = module(x)
    assert torch.equal(model.encode_latent(audio), x)
    encoded = model.encode(audio)
    assert encoded.audio_codes.shape == (4, 2, 40)
    decoded = model.decode(encoded.audio_codes)
    assert decoded.audio.shape == audio.shape
    assert decoded.audio_lengths.tolist() == [320, 320]
    assert not torch.allclose(decoded.audio[:, 0], decoded.audio[:, 1])


def test_patching_is_undone_by_its_inverse():
    model = small_model(2, number_channels=2)
    audio = noise(1, 2, 24)
    x = audio.transpose(1, 2).reshape(1, -1, 1)
    patches = [module for module in model.encoder if not hasattr(module, "transformer")]
    for module in patches:
        x = module(x)
    for module in [module for module in model.decoder if not hasattr(module, "transformer")]:
        x = module(x)
    assert torch.equal(x.reshape(1, -1, 2).transpose(1, 2), audio)


@pytest.mark.parametrize("seconds", [0, -0.1, 0.9, 0.15, 0.05, float("nan")])
def test_illegal_chunks_are_refused(model, seconds):
    with pytest.raises(ValueError, match="chunk_duration must be"):
        model.encode(noise(1, 1, 320), chunk_duration=seconds)
    with pytest.raises(ValueError, match="chunk_duration must be"):
        model.decode(torch.zeros(4, 1, 20, dtype=torch.int64), chunk_duration=seconds)


@pytest.mark.parametrize("levels", [0, 5, -1])
def test_illegal_numbers_of_levels_are_refused(model, levels):
    for call in (model.encode, model, lambda audio, **options: model.stream(**options)):
        with pytest.raises(ValueError, match=f"num_quantizers must be between 1 and 4, got {levels}"):
            call(noise(1, 1, 32), num_quantizers=levels)
    with pytest.raises(ValueError, match="num_quantizers must be"):
        model.decode(torch.zeros(4, 1, 2, dtype=torch.int64), num_quantizers=levels)


@pytest.mark.parametrize("shape", [(1, 2, 16), (1, 1, 1, 16), (1, 1, 0)])
def test_illegal_audio_is_refused(model, shape):
    with pytest.raises(ValueError, match="audio"):
        model.encode(torch.zeros(shape))


def test_wrong_masks_are_refused(model):
    with pytest.raises(ValueError, match="padding_mask"):
        model.encode(torch.zeros(2, 1, 16), padding_mask=torch.ones(2, 15))
    with pytest.raises(ValueError, match="padding_mask"):
        model.encode(torch.zeros(1, 1, 4), padding_mask=torch.tensor([[0, 1, 1, 1]]))


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(5, 1, 2, dtype=torch.int64),
        torch.zeros(4, 1, 1, 2, dtype=torch.int64),
        torch.zeros(4, 1, 2),
        torch.full((4, 1, 2), 32),
        torch.full((4, 1, 2), -1),
    ],
)
def test_illegal_codes_are_refused(model, codes):
    with pytest.raises(ValueError, match="codes"):
        model.decode(codes)


def test_int16_codes_decode_like_int64(model):
    codes = model.encode(noise(1, 1, 64)).audio_codes
    assert torch.equal(model.decode(codes.to(torch.int16)).audio, model.decode(codes).audio)


def test_gradient_checkpointing_changes_nothing_but_memory(model):
    audio = noise(1, 1, 20 * HOP)
    weight = model.encoder[1].transformer.layers[0].linear1.weight
    (plain,) = torch.autograd.grad(model(audio).audio.square().mean(), weight)
    model.gradient_checkpointing_enable()
    model.train()
    (checkpointed,) = torch.autograd.grad(model(audio).audio.square().mean(), weight)
    model.eval().gradient_checkpointing_disable()
    torch.testing.assert_close(checkpointed, plain)


def test_waveforms_stay_float32_under_bf16_autocast():
    """Projections next to the waveform are computed in float32, those inside the model in bfloat16."""
    model = small_model()
    stages = [*model.stages(model.encoder), *model.stages(model.decoder)]
    seen = []
    for stage in stages:
        for projection in (stage.input_proj, stage.output_proj):
            if isinstance(projection, torch.nn.Linear):
                projection.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    audio = 0.1 * torch.randn(2, 1, 4 * model.config.downsample_rate)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = model.decode_latent(model.encode_latent(audio))
    assert decoded.dtype == torch.float32
    assert (seen[0], seen[-1]) == (torch.float32, torch.float32)
    assert set(seen[1:-1]) == {torch.bfloat16}
