"""The training benchmark's synthetic clips have the same form as those of the stream."""

import numpy as np
import torch

from moss_train.audio.io import resample
from tests.model.small_models import small_config
from tools.bench_training import synthetic_batch


def test_clips_have_a_target_at_the_rate_of_the_decoder():
    config = small_config(output_sampling_rate=480)
    batch = synthetic_batch(np.array([50, 33]), config, 256)
    assert batch.audio.shape == (2, 1, 64)
    assert batch.target.shape == (2, 1, 192)
    assert (batch.audio_lengths.tolist(), batch.target_lengths.tolist()) == ([50, 33], [150, 99])
    assert batch.reference is batch.target
    assert not batch.target[0, :, 150:].any()
    assert batch.target[0, :, 140:150].any()
    assert torch.equal(batch.audio, resample(batch.target, 480, 160))


def test_clips_at_one_rate_are_their_own_target():
    batch = synthetic_batch(np.array([50, 33]), small_config(), 0)
    assert batch.target is None
    assert batch.reference is batch.audio
    assert not batch.audio[1, :, 33:].any()
    assert batch.text_lengths.tolist() == [0, 0]
