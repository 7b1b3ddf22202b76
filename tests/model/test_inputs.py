"""Inputs that the model accepts or refuses: containers, axes, values, levels, halves, copies, compilers."""

import multiprocessing
import pickle
import re
import warnings

import numpy as np
import pytest
import torch

from moss_train.model import MossAudioTokenizerModel
from moss_train.model.feature_extraction_moss_audio_tokenizer import MossAudioTokenizerFeatureExtractor
from moss_train.model.pipeline_moss_audio_tokenizer import MossAudioTokenizerPipeline
from moss_train.model.waveforms import level_db, set_level

from .small_models import HOP, RATE, small_model


@pytest.fixture(scope="module")
def model():
    return small_model(21)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize(
    "container",
    [
        lambda x: x[0, 0],
        lambda x: x[0],
        lambda x: x.numpy(),
        lambda x: x[0, 0].double().numpy(),
        lambda x: x[0, 0].tolist(),
        lambda x: [x[0, 0].numpy()],
        lambda x: [[x[0, 0]]],
    ],
)
def test_every_container_gives_the_same_codes(model, container):
    audio = noise(1, 1, 5 * HOP)
    codes = model.encode(audio).audio_codes
    assert torch.equal(model.encode(container(audio)).audio_codes, codes)


def test_codes_of_other_containers_are_decoded(model):
    codes = model.encode(noise(2, 1, 5 * HOP)).audio_codes
    audio = model.decode(codes).audio
    assert torch.equal(model.decode(codes.numpy()).audio, audio)
    assert torch.equal(model.decode(codes.tolist()).audio, audio)
    assert torch.equal(model.batch_decode(list(codes.unbind(1))).audio, audio)
    assert torch.equal(model.batch_encode([clip.numpy() for clip in noise(2, 5 * HOP)]).audio_codes, codes)


def test_one_stereo_clip_needs_no_batch():
    stereo = small_model(22, number_channels=2)
    audio = noise(1, 2, 64)
    assert torch.equal(stereo.encode(audio[0]).audio_codes, stereo.encode(audio).audio_codes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([noise(32), noise(48)], ("(32,), (48,)", "batch_encode")),
        (torch.ones(1, 1, 32, dtype=torch.int16), ("int16", "32768")),
        (noise(1, 2, 32), ("(1, 2, 32)",)),
        ("speech.wav", ("str",)),
        (np.array([object()]), ("ndarray",)),
    ],
)
def test_what_is_no_waveform_is_refused(model, values, words):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        model.encode(values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_place(model, value):
    audio = noise(2, 1, 4 * HOP)
    audio[1, 0, 37] = value
    for call in (model, model.encode, model.stream(2).encode):
        with pytest.raises(ValueError, match=f"{value} at sample 37 .* of item 1"):
            call(audio)
    mask = torch.arange(4 * HOP) < torch.tensor([[64], [37]])
    clean = audio.nan_to_num(0, 0, 0)
    assert torch.equal(model.encode(audio, mask).audio_codes, model.encode(clean, mask).audio_codes)


def test_integers_as_floats_are_warned_of_once():
    model = small_model(23)
    with pytest.warns(UserWarning, match="32768"):
        model.encode(noise(1, 1, HOP) * 32768)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(noise(1, 1, HOP) * 32768)


def test_swapped_axes_of_codes_are_named(model):
    with pytest.raises(ValueError, match=r"transpose\(0, 1\)"):
        model.decode(torch.zeros(5, 4, 3, dtype=torch.int64))
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="padding_mask must have shape"):
        model.decode(torch.zeros(2, 4, 3, dtype=torch.int64), mask)


def test_level_is_set_over_the_samples_that_count():
    audio = torch.stack((noise(1, 400), torch.zeros(1, 400), noise(1, 400) * 10))
    lengths = torch.tensor([100, 400, 400])
    scaled = set_level(audio, -30.0, lengths)
    assert level_db(scaled, lengths)[[0, 2]].tolist() == pytest.approx([-30.0, -30.0], abs=1e-3)
    assert not scaled[1].any()
    impulse = torch.zeros(1, 1, 1000)
    impulse[0, 0, 0] = 0.5
    assert set_level(impulse, -10.0).max() == 1.0  # the gain is limited by a peak at full scale
    with pytest.raises(ValueError, match="got 20"):
        set_level(audio, 20)


def test_loudness_is_applied_before_encoding_and_far_levels_are_warned_of_once():
    model = small_model(24)
    audio = noise(1, 1, 4 * HOP)
    expected = model.encode(set_level(audio, -35.0)).audio_codes
    assert torch.equal(model.encode(audio, loudness=-35.0).audio_codes, expected)
    model.config.training_level_db = -20.0
    with pytest.warns(UserWarning, match="trained at about -20 dB"):
        model.encode(audio * 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(audio * 0.01)
        small_model(24).encode(audio * 0.01)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_half_a_model_has_half_the_weights(model, tmp_path, part, shard):
    model.save_pretrained(tmp_path / "whole", max_shard_size=shard)
    half = MossAudioTokenizerModel.from_pretrained(tmp_path / "whole", part=part).eval()
    assert {name.split(".")[0] for name in half.state_dict()} == {part, "quantizer"}
    audio = noise(1, 1, 6 * HOP)
    codes = model.encode(audio).audio_codes
    calls = {
        "encoder": [lambda: half.encode(audio), lambda: half.stream().encode(audio), lambda: half(audio)],
        "decoder": [
            lambda: half.decode(codes),
            lambda: half.stream().decode(codes),
            lambda: half.batch_decode([codes[:, 0]]),
        ],
    }
    other = "decoder" if part == "encoder" else "encoder"
    for call in calls[other]:
        with pytest.raises(ValueError, match=f"this model has no {other}"):
            call()
    if part == "encoder":
        assert torch.equal(half.encode(audio).audio_codes, codes)
    else:
        torch.testing.assert_close(half.decode(codes).audio, model.decode(codes).audio)
    half.save_pretrained(tmp_path / "half")
    again = MossAudioTokenizerModel.from_pretrained(tmp_path / "half")
    assert again.part == part
    assert again.state_dict().keys() == half.state_dict().keys()
    with pytest.raises(ValueError, match=f"part='{other}' is not in this model"):
        MossAudioTokenizerModel.from_pretrained(tmp_path / "half", part=other)


def test_attention_implementations(model, tmp_path):
    model.save_pretrained(tmp_path)

    def uses_kernel(loaded):
        return {layer.self_attn.flash for layer in loaded.encoder[1].transformer.layers}

    general = MossAudioTokenizerModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert uses_kernel(general) == {False}
    assert uses_kernel(MossAudioTokenizerModel.from_pretrained(tmp_path)) == {True}
    assert uses_kernel(MossAudioTokenizerModel.from_pretrained(tmp_path, attn_implementation="flash_attention_2")) == {
        True
    }
    general.set_attn_implementation("flash_attention_2")
    assert uses_kernel(general) == {True}
    with pytest.raises(ValueError, match="'flex_attention' is not one of sdpa"):
        MossAudioTokenizerModel.from_pretrained(tmp_path, attn_implementation="flex_attention")


def encode_in_worker(model, audio, results):
    results.put(model.encode(audio).audio_codes.tolist())


def test_a_model_can_be_pickled_and_saved_whole(model, tmp_path):
    copied = pickle.loads(pickle.dumps(model))
    torch.save(model, tmp_path / "model.pt")
    audio = noise(1, 1, 6 * HOP)
    codes = model.encode(audio).audio_codes
    for other in (copied, torch.load(tmp_path / "model.pt", weights_only=False)):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(other.encode(audio).audio_codes, codes)
    copied.quantizer.quantizers[0].in_proj.parametrizations.weight.original0.data.zero_()
    assert torch.equal(model.encode(audio).audio_codes, codes)


@pytest.mark.processes
@pytest.mark.nightly
def test_a_spawned_worker_takes_the_model(model):
    context = multiprocessing.get_context("spawn")
    results, audio = context.Queue(), noise(1, 1, 6 * HOP)
    worker = context.Process(target=encode_in_worker, args=(model, audio, results))
    worker.start()
    codes = results.get(timeout=120)
    worker.join()
    assert codes == model.encode(audio).audio_codes.tolist()


@pytest.mark.nightly
def test_compiled_in_one_graph(model):
    audio = noise(2, 1, 30 * HOP)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(audio).audio_codes, model(audio).audio_codes)


@pytest.mark.nightly
def test_exported_as_one_graph(model):
    audio = noise(2, 1, 30 * HOP)
    expected = model(audio)
    exported = torch.export.export(model, (audio,), strict=False)
    torch.testing.assert_close(exported.module()(audio).audio, expected.audio)


def test_a_clip_without_samples_can_be_in_a_batch(model):
    clips = [noise(1, 5 * HOP), noise(1, 0)]
    expected = model.encode(clips[0]).audio_codes
    for batch_invariant in (False, True):
        encoded = model.batch_encode(clips, batch_invariant=batch_invariant)
        assert encoded.audio_codes_lengths.tolist() == [5, 0]
        assert torch.equal(encoded.audio_codes[:, :1], expected)
        assert not encoded.audio_codes[:, 1].any()
    features = MossAudioTokenizerFeatureExtractor(1, RATE)(clips, loudness=-20.0)
    assert level_db(features["input_values"][:1]).item() == pytest.approx(-20)
    assert features["padding_mask"].sum(dim=1).tolist() == [5 * HOP, 0]


def test_a_batch_without_clips_is_refused(model):
    for call in (model.encode, model):
        with pytest.raises(ValueError, match="the audio has no samples"):
            call(torch.zeros(0, 1, 5 * HOP))
    with pytest.raises(ValueError, match="expected integer codes"):
        model.decode(torch.zeros(4, 0, 5, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint32, np.uint64])
def test_codes_may_be_of_every_integer_type(model, dtype):
    codes = model.encode(noise(1, 1, 5 * HOP)).audio_codes
    stored = codes.numpy().astype(dtype)
    expected = model.decode(codes).audio
    assert torch.equal(model.decode(stored).audio, expected)
    assert torch.equal(model.batch_decode([stored[:, 0]]).audio, expected)
    torch.testing.assert_close(model.stream().decode(stored)[0], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\.31, got 32"):
        model.decode(np.full((4, 1, 2), 32, dtype))


def test_a_mask_is_not_taken_for_codes(model):
    with pytest.raises(ValueError, match=r"expected integer codes .* got torch\.bool"):
        model.decode(torch.ones(4, 1, 5, dtype=torch.bool))


def test_forward_has_the_codes_of_encode(model):
    audio, mask = noise(2, 1, 10 * HOP), torch.ones(2, 10 * HOP, dtype=torch.bool)
    mask[1, 3 * HOP + 1 :] = False
    output, encoded = model(audio, mask), model.encode(audio, mask)
    assert torch.equal(output.audio_codes, encoded.audio_codes)
    assert not output.audio_codes[:, 1, 4:].any()
    assert torch.equal(output.audio_codes_lengths, encoded.audio_codes_lengths)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_pipeline_gives_each_clip_of_a_batch_its_own_codes(channels):
    model = small_model(3, number_channels=channels)
    extract = MossAudioTokenizerFeatureExtractor(channels, RATE)
    encode = MossAudioTokenizerPipeline(model, feature_extractor=extract, task="feature-extraction")
    clips = [noise(channels, frames * HOP, seed=frames).numpy() for frames in (6, 6, 3)]
    expected = [model.encode(clip[None]).audio_codes[:, 0] for clip in clips]
    for batch_size in (1, 2, 3):
        for codes, wanted in zip(encode(clips, batch_size=batch_size), expected, strict=True):
            assert torch.equal(codes, wanted)
    assert torch.equal(encode(clips[0], num_quantizers=2), expected[0][:2])


def test_the_feature_extractor_refuses_what_it_would_not_do():
    extract, clip = MossAudioTokenizerFeatureExtractor(1, RATE), noise(5 * HOP).numpy()
    for options in ({"max_length": 9}, {"truncation": True}, {"padding": "max_length"}, {"sample_rate": 8000}):
        (name,) = options
        with pytest.raises(ValueError, match=f"there is no {name}={options[name]!r}"):
            extract(clip, **options)
    plain = extract(clip)
    usual = extract(clip, padding=True, truncation=False, max_length=None, return_attention_mask=True)
    assert torch.equal(usual["input_values"], plain["input_values"])
    with pytest.raises(ValueError, match=r"expected floating-point audio in -1\.\.1, got int16"):
        extract((clip * 32767).astype(np.int16))
