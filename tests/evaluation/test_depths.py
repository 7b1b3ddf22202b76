"""Mel distance and codebook use by depth, on a small random model."""

import pytest
import torch

from moss_train.losses.reconstruction import multi_scale_mel_distance
from tests.model.small_models import small_model
from tools.short_runs import depth_report, quarter_depths


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_report_holds_the_distances_of_decoded_prefixes_and_the_shares_of_used_entries(model):
    clip = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)) * 0.1
    levels = model.config.num_quantizers
    report = depth_report(model, [clip], [1, levels])
    codes = model.encode(clip[None], return_dict=True).audio_codes
    restored = model.decode(codes[:1], return_dict=True).audio[..., :5000]
    wanted = multi_scale_mel_distance(clip[None], restored, torch.tensor([5000]), model.sampling_rate)
    assert report.distances[1] == pytest.approx(wanted.item(), rel=1e-4)
    size = model.config.quantizer_kwargs["codebook_size"]
    assert report.used_shares == pytest.approx([len(level.unique()) / size for level in codes])
    assert all(
        1 <= value <= len(level.unique()) + 1e-3 for value, level in zip(report.perplexities, codes, strict=True)
    )


def test_no_clip_is_an_error(model):
    with pytest.raises(ValueError, match="at least one clip"):
        depth_report(model, [], [1])


def test_depths_of_the_short_table():
    assert quarter_depths(32) == (1, 8, 16, 32)
    assert quarter_depths(2) == (1, 2)
