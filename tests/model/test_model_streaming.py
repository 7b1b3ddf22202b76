"""Streaming equals offline for streams many windows long, in any chunks; items that come and go: tests/faults."""

import gc

import pytest
import torch

from .small_models import HOP, noise, num_real_differences, relative_error, small_model

FRAMES = 100  # the longest window lasts 8 code frames
MIXED = [1, 2, 3, 7, 25, 1, 13, 30, 18]
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[(0, 1), (1, 1), (2, 2)], ids=["mono0", "mono1", "stereo"])
def case(request):
    """Return a model, two long clips, and their offline encoding and decoding."""
    seed, channels = request.param
    model = small_model(seed, number_channels=channels)
    audio = noise(2, channels, FRAMES * model.config.downsample_rate, seed=seed)
    encoded = model.encode(audio)
    return model, audio, encoded, model.decode(encoded.audio_codes).audio


def chunk_sizes(chunk):
    return MIXED if chunk == "mixed" else [chunk] * (FRAMES // chunk) + ([FRAMES % chunk] if FRAMES % chunk else [])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 25, "mixed"])
def test_chunks_equal_the_whole(case, chunk):
    model, audio, encoded, decoded = case
    sizes = chunk_sizes(chunk)
    assert sum(sizes) == FRAMES
    stream = model.stream(batch_size=2)
    pieces = audio.split([size * model.config.downsample_rate for size in sizes], dim=2)
    codes = torch.cat([stream.encode(piece)[0] for piece in pieces], dim=2)
    assert num_real_differences(model, encoded.encoder_hidden_states, codes, encoded.audio_codes) == 0
    parts = [stream.decode(part)[0] for part in encoded.audio_codes.split(sizes, dim=2)]
    assert relative_error(torch.cat(parts, dim=2), decoded) < TOLERANCE


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
def test_chunk_duration_equals_the_whole(case, frames):
    model, audio, encoded, decoded = case
    seconds = frames / model.config.frame_rate
    streamed = model.encode(audio[..., :-3], chunk_duration=seconds)
    whole = model.encode(audio[..., :-3])
    assert relative_error(streamed.encoder_hidden_states, whole.encoder_hidden_states) < TOLERANCE
    assert num_real_differences(model, whole.encoder_hidden_states, streamed.audio_codes, whole.audio_codes) == 0
    streamed = model.decode(encoded.audio_codes, chunk_duration=seconds)
    assert relative_error(streamed.audio, decoded) < TOLERANCE


def test_calls_in_and_out_of_inference_mode_share_a_stream(case):
    model, audio, encoded, decoded = case
    hop, codes, parts = model.config.downsample_rate, [], []
    with torch.inference_mode():
        stream = model.stream(batch_size=2)
    for number, (piece, part) in enumerate(zip(audio.split(5 * hop, 2), encoded.audio_codes.split(5, 2), strict=True)):
        with torch.inference_mode(number % 2 == 0):
            codes += [stream.encode(piece[..., : 3 * hop + 1])[0], stream.encode(piece[..., 3 * hop + 1 :])[0]]
            parts.append(stream.decode(part)[0])
    assert num_real_differences(model, encoded.encoder_hidden_states, torch.cat(codes, 2), encoded.audio_codes) == 0
    assert relative_error(torch.cat(parts, dim=2), decoded) < TOLERANCE


def test_masked_batch_in_chunks():
    model = small_model(4)
    audio, mask = noise(2, 1, 700), torch.arange(700) < torch.tensor([[700], [333]])
    whole = model.encode(audio, padding_mask=mask)
    streamed = model.encode(audio, padding_mask=mask, chunk_duration=0.3)
    assert torch.equal(whole.audio_codes_lengths, streamed.audio_codes_lengths)
    assert num_real_differences(model, whole.encoder_hidden_states, streamed.audio_codes, whole.audio_codes) == 0


def test_started_frame_of_a_streamed_clip_is_kept():
    stages = [
        {"patch_size": 240, "output_dimension": 16, "d_model": 16, "num_heads": 2, "num_layers": 1},
        {"patch_size": 8, "output_dimension": 16, "d_model": 16, "num_heads": 2, "num_layers": 1},
    ]
    model = small_model(stages=stages, sampling_rate=24000, context_seconds=10.0)
    assert model.encode(noise(1, 1, 3200), chunk_duration=0.08).audio_codes.shape == (4, 1, 2)


def test_arbitrary_sample_counts(case):
    model, audio, _, _ = case
    stream = model.stream(batch_size=2)
    audio = audio[..., :-5]
    sizes = [1, 2, 40, 0, 7, 200]
    sizes.append(audio.shape[2] - sum(sizes))
    parts = [stream.encode(piece) for piece in audio.split(sizes, dim=2)]
    parts.append(stream.flush())
    codes = torch.cat([part for part, _ in parts], dim=2)
    whole = model.encode(audio)
    assert sum(lengths for _, lengths in parts).tolist() == [FRAMES, FRAMES]
    assert num_real_differences(model, whole.encoder_hidden_states, codes, whole.audio_codes) == 0


def test_decode_takes_prefixes_of_levels_and_fewer_levels_are_encoded(case):
    model, audio, encoded, _ = case
    stream = model.stream(batch_size=2, num_quantizers=2)
    codes, _ = stream.encode(audio)
    assert num_real_differences(model, encoded.encoder_hidden_states, codes, encoded.audio_codes[:2]) == 0
    expected = model.decode(encoded.audio_codes[:2]).audio
    assert relative_error(stream.decode(encoded.audio_codes[:2])[0], expected) < TOLERANCE


def test_flush_ends_a_stream_and_reset_starts_it_anew():
    model = small_model(6)
    stream = model.stream()
    audio = noise(1, 1, 5 * HOP + 1)
    first, _ = stream.encode(audio)
    last, lengths = stream.flush()
    assert (first.shape[2], last.shape[2], lengths.tolist()) == (5, 1, [1])
    assert stream.flush()[1].tolist() == [0]
    stream.reset()
    assert torch.equal(stream.encode(audio)[0], first)


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def test_a_thousand_streams_left_in_the_middle_of_a_frame_leave_nothing_behind():
    """With new streams, and with one slot of a stream that clients use one after the other."""
    model = small_model(6)
    audio = noise(2, 1, HOP + HOP // 2)
    shared = model.stream(batch_size=2)
    expected = shared.encode(audio)[0]
    before = tensors_alive()
    for _ in range(500):
        model.stream().encode(audio[:1])
        shared.reset(torch.tensor([False, True]))
        lengths = torch.tensor([0, audio.shape[2]])
        codes, frames = shared.encode(audio, lengths)
        assert frames.tolist() == [0, 1]
        assert torch.equal(codes[:, 1, :1], expected[:, 1, :1])
    assert tensors_alive() <= before + 10


def stream_pieces(stream, pieces, rows, batch_size):
    """Stream the pieces of each row, each as a whole, while other rows send none; return codes and audio."""
    codes, audio = {row: [] for row in rows}, {row: [] for row in rows}
    for turn in range(len(pieces[0])):
        counts = [0] * batch_size
        for row, own in zip(rows, pieces, strict=True):
            counts[row] = own[turn].shape[1]
        chunk = torch.zeros(batch_size, 1, max(counts))
        for row, own in zip(rows, pieces, strict=True):
            chunk[row, :, : counts[row]] = own[turn]
        new_codes, frames = stream.encode(chunk, torch.tensor(counts))
        new_audio, samples = stream.decode(new_codes, frames)
        for row in rows:
            codes[row].append(new_codes[:, row, : frames[row]])
            audio[row].append(new_audio[row, :, : samples[row]])
    return [(torch.cat(codes[row], dim=1), torch.cat(audio[row], dim=1)) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_streams_do_not_depend_on_their_company(dtype):
    model = small_model(8).to(dtype)
    generator = torch.Generator().manual_seed(4)
    sizes = [[5, 20, 0, 31, 9], [1, 1, 44, 3, 16], [0, 7, 25, 60, 2]]
    pieces = [[torch.randn(1, n * HOP + 3, generator=generator) for n in own] for own in sizes]
    together = stream_pieces(model.stream(4, batch_invariant=True), pieces, [2, 0, 3], 4)
    for own, (codes, audio) in zip(pieces, together, strict=True):
        alone_codes, alone_audio = stream_pieces(model.stream(1), [own], [0], 1)[0]
        assert codes.shape[1] == sum(piece.shape[1] for piece in own) // HOP
        assert torch.equal(codes, alone_codes)
        assert torch.equal(audio, alone_audio)


def test_batch_invariant_streams_share_packed_weights():
    stream = small_model(8).stream(3, batch_invariant=True)
    stream.encode(noise(3, 1, HOP))
    first, *others = [group.states("encoder") for group in stream.groups]
    assert len(others) == 2
    for states in others:
        assert all(a.linears is b.linears for a, b in zip(first, states, strict=True))
        assert all(a.rings[0].data_ptr() != b.rings[0].data_ptr() for a, b in zip(first, states, strict=True))


def test_illegal_calls_are_refused():
    model = small_model(6)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.stream(0)
    stream = model.stream(2)
    with pytest.raises(ValueError, match="2 items"):
        stream.encode(noise(1, 1, 16))
    with pytest.raises(ValueError, match="2 items"):
        stream.decode(torch.zeros(4, 3, 1, dtype=torch.int64))
    for lengths in ([17, 0], [-1, 0], [1]):
        with pytest.raises(ValueError, match="lengths"):
            stream.encode(noise(2, 1, 16), torch.tensor(lengths))
        with pytest.raises(ValueError, match="lengths"):
            stream.decode(torch.zeros(4, 2, 16, dtype=torch.int64), torch.tensor(lengths))
    with pytest.raises(ValueError, match="reset"):
        stream.reset(torch.tensor([True]))


@pytest.mark.parametrize("frames", [1, 4, 9])
def test_buffers_never_move(frames):
    """A captured CUDA graph keeps using the same addresses."""
    model = small_model(7)
    stream = model.stream(2)
    states = [*stream.groups[0].states("encoder"), *stream.groups[0].states("decoder")]

    def addresses():
        return [x.data_ptr() for state in states for x in (state.position, *state.rings)]

    before = addresses()
    lengths = torch.tensor([frames // 2, frames]) * HOP
    for seed in range(20):
        stream.decode(*stream.encode(noise(2, 1, frames * HOP, seed=seed), lengths))
    stream.reset(torch.tensor([True, False]))
    assert addresses() == before
    assert all(state.position[1] > 0 and state.position[0] == 0 for state in states)
