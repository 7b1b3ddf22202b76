"""Long audio in bounded memory, and results that do not depend on the other clips of a batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moss_train.model import codec as chunked

from .small_models import HOP, noise, num_real_differences, relative_error, small_model


@pytest.mark.parametrize("channels", [1, 2])
def test_long_audio_in_blocks_equals_one_pass(monkeypatch, channels):
    model = small_model(8, number_channels=channels)
    hop = model.config.downsample_rate
    audio, mask = noise(2, channels, 230 * hop - 3), torch.arange(230 * hop - 3) < torch.tensor([[9**9], [700]])
    whole = model.encode(audio, mask)
    monkeypatch.setattr(chunked, "BLOCK_SECONDS", 37 / model.config.frame_rate)
    blocks = model.encode(audio, mask)
    assert chunked.block_frames(model, None, 230) == 37
    assert relative_error(blocks.encoder_hidden_states, whole.encoder_hidden_states) < 1e-5
    assert num_real_differences(model, whole.encoder_hidden_states, blocks.audio_codes, whole.audio_codes) == 0
    decoded = model.decode(whole.audio_codes).audio
    monkeypatch.undo()
    assert relative_error(decoded, model.decode(whole.audio_codes).audio) < 1e-5


def test_short_clips_pass_in_one_piece():
    model = small_model()
    assert chunked.block_frames(model, None, 600) == 600
    assert chunked.block_frames(model, None, 601) == 300
    assert chunked.block_frames(model, 3, 601) == 3


PEAK_MEMORY = """
import sys, torch
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

torch.manual_seed(0)
torch.set_num_threads(1)
sizes = {"output_dimension": 16, "d_model": 64, "num_heads": 1, "num_layers": 1}
stages = [{"patch_size": 80, **sizes}, {"patch_size": 4, **sizes}]
quantizer = {"rvq_dim": 16, "num_quantizers": 2, "codebook_size": 256, "codebook_dim": 4}
config = MossAudioTokenizerConfig.from_stages(2000, stages, quantizer, context_seconds=4.0)
model = MossAudioTokenizerModel(config).eval()
model.decode(model.encode(torch.zeros(1, 1, 4000)).audio_codes)  # libraries allocate at their first call
task, seconds = sys.argv[1], int(sys.argv[2])
audio = torch.ones(1, 1, 2000 * seconds)
codes = torch.zeros(2, 1, 2000 * seconds // 320, dtype=torch.int64)
open("/proc/self/clear_refs", "w").write("5")  # peak memory counts from here
before = status("VmRSS")
output = model.encode(audio) if task == "encode" else model.decode(codes)
results = [value for value in output.values() if value.numel() > 1]
print(status("VmHWM") - before - sum(result.nbytes for result in results))
"""


def peak_memory(task, seconds):
    """Return the peak memory of encoding or decoding beyond inputs and results, in bytes, in a fresh process."""
    command = [sys.executable, "-c", PEAK_MEMORY, task, str(seconds)]
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.processes
@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
@pytest.mark.parametrize("task", ["encode", "decode"])
def test_an_hour_needs_the_memory_of_ten_minutes(task):
    """On a busy machine it varies by a quarter; memory that grows with length would be six times as much."""
    assert peak_memory(task, 3600) < 2 * peak_memory(task, 600)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_results_are_those_of_the_clip_alone(dtype):
    model = small_model(9).to(dtype)
    clips = [noise(n, seed=n) for n in (5 * HOP, 90 * HOP + 3, 31 * HOP)]
    together = model.batch_encode(clips, batch_invariant=True)
    decoded = model.batch_decode(
        [together.audio_codes[:, i, :n] for i, n in enumerate(together.audio_codes_lengths)], batch_invariant=True
    )
    for item, clip in enumerate(clips):
        alone = model.encode(clip[None])
        frames = alone.audio_codes.shape[2]
        assert together.audio_codes_lengths[item] == frames
        assert torch.equal(together.audio_codes[:, item, :frames], alone.audio_codes[:, 0])
        assert torch.equal(together.encoder_hidden_states[item, :, :frames], alone.encoder_hidden_states[0])
        assert not together.audio_codes[:, item, frames:].any()
        audio = model.decode(alone.audio_codes).audio
        assert torch.equal(decoded.audio[item, :, : frames * HOP], audio[0])


def test_padding_does_not_change_batch_invariant_codes():
    model = small_model(9).to(torch.bfloat16)
    clip = noise(1, 1, 70 * HOP)
    padded = torch.nn.functional.pad(clip, (0, 50 * HOP), value=1.0)
    mask = torch.arange(120 * HOP)[None] < 70 * HOP
    codes = model.encode(padded, mask, batch_invariant=True).audio_codes
    assert torch.equal(codes[..., :70], model.encode(clip).audio_codes)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_compute_dtype_changes_precision_not_results(name):
    exact = small_model(10)
    mixed = small_model(10)
    mixed.config.compute_dtype = name
    audio = noise(2, 1, 60 * HOP)
    expected = exact.encode(audio)
    encoded = mixed.encode(audio)
    error = relative_error(encoded.encoder_hidden_states.float(), expected.encoder_hidden_states)
    assert 1e-5 < error < 0.05
    streamed = mixed.encode(audio, chunk_duration=0.3).encoder_hidden_states.float()
    assert relative_error(streamed, expected.encoder_hidden_states) < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in mixed.parameters())
    audio = mixed.decode(expected.audio_codes).audio.float()
    assert relative_error(audio, exact.decode(expected.audio_codes).audio) < 0.05
