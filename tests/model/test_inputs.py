"""Inputs that the model accepts or refuses: containers, axes, values, levels, halves, copies, compilers."""

import multiprocessing
import pickle
import re
import warnings

import numpy as np
import pytest
import torch

from moss_train.model import MossAudioTokenizerModel
from moss_train.model.waveforms import level_db, set_level

from .small_models import HOP, small_model


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
