"""Stages without quantizer, and the levels that are fitted to data at their end."""

import functools
import http.server
import re
import shutil

import pytest
import torch

from moss_train import load_config
from moss_train.cli.main import main
from moss_train.data.shards import remote
from moss_train.data.shards.index import ShardIndex
from moss_train.data.stream.stream import AudioStream, ClipFormat
from moss_train.export.load import load_tokenizer
from moss_train.model.quantizer import ResidualLFQ, apply_pointwise
from moss_train.training.callbacks.quantizer import read_clips
from moss_train.training.loggers.base import read_table
from moss_train.training.step.quantizer_start import fit_quantizer, pass_unquantized
from moss_train.training.step.schedule import Schedule
from moss_train.utils.checkpoint import list_checkpoints
from moss_train.utils.errors import ConfigError

from ..faults.harness import assert_same_run
from ..local_server import serving
from .runs import column


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return ResidualLFQ(24, 16, 24, num_quantizers=4, codebook_size=32, codebook_dim=4)


@pytest.fixture
def latents():
    """Return latents [2000, 24] with a mean and with most of the variance in a few directions."""
    generator = torch.Generator().manual_seed(1)
    scales = 3 * 0.7 ** torch.arange(24)
    return torch.randn(2000, 24, generator=generator) * scales + torch.linspace(-2, 2, 24)


def test_what_is_left_is_what_the_quantizer_leaves(quantizer, latents):
    left = fit_quantizer(quantizer, latents)
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.15
    hidden = pass_unquantized(quantizer, latents[None]).quantized
    for levels, share in enumerate(left, start=1):
        quantized = quantizer(latents[None], torch.tensor([levels])).quantized
        error = torch.linalg.lstsq(output_weight(quantizer), (hidden - quantized)[0].T).solution
        reference = torch.linalg.lstsq(output_weight(quantizer), (hidden - hidden.mean(1, keepdim=True))[0].T).solution
        assert (error.square().sum() / reference.square().sum()).item() == pytest.approx(share, rel=1e-3)


def output_weight(quantizer: ResidualLFQ) -> torch.Tensor:
    return quantizer.output_proj.weight[:, :, 0].detach()


def test_levels_of_a_model_stay_and_added_ones_take_what_they_leave(quantizer, latents):
    fit_quantizer(quantizer, latents[:, :24].flip(1))  # to something else, so that much is left
    kept = {name: value.clone() for name, value in quantizer.state_dict().items()}
    with torch.no_grad():
        for level in quantizer.quantizers[2:]:
            level.codebook.weight.normal_()
    left = fit_quantizer(quantizer, latents, num_kept=2)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, kept[name]) or name.startswith(("quantizers.2.", "quantizers.3."))
    assert left[3] < left[2] < 0.5 * left[1]
    hidden = apply_pointwise(quantizer.input_proj, latents[None])[0]
    codes = quantizer(latents[None]).codes
    decoded = sum(level.decode(codes[number])[0] for number, level in enumerate(quantizer.quantizers))
    assert ((hidden - decoded).var(0).sum() / hidden.var(0).sum()).item() == pytest.approx(left[3], rel=1e-3)


def test_levels_that_are_added_to_init_are_fitted_at_the_start(small_overrides, tmp_path, capfd):
    old, new = tmp_path / "old", tmp_path / "new"
    common = "batch_seconds: 2.0, learning_rate: 1.0e-9, final_learning_rate: 1.0e-9, adversarial: false"
    short = [*small_overrides, f"stages=[{{name: one, updates: 1, {common}}}]"]
    assert main(["fit", *short, f"run_dir={old}"]) == 0
    more = ["tokenizer=null", "+tokenizer.num_quantizers=6"]
    command = ["fit", *short, *more, f"init={old}", f"run_dir={new}"]
    assert main([*command, "max_updates=0"]) == 0  # its checkpoint is that of a run killed before its first update
    assert "fitted" not in capfd.readouterr().err
    assert main(command) == 0
    assert "levels 5 to 6 fitted" in capfd.readouterr().err
    levels = load_tokenizer(new).quantizer.quantizers
    for before, after in zip(load_tokenizer(old).quantizer.quantizers, levels, strict=False):
        torch.testing.assert_close(after.codebook.weight, before.codebook.weight)
    weights = [level.out_proj.weight[..., 0] for level in levels[4:]]  # principal directions are orthogonal
    for gram in (weight.T @ weight for weight in weights):
        torch.testing.assert_close(gram, torch.eye(8) * gram[0, 0], atol=1e-4 * gram[0, 0].item(), rtol=0)


def test_a_fit_depends_on_latents_and_seed_alone(quantizer, latents):
    fit_quantizer(quantizer, latents, seed=3)
    first = {name: value.clone() for name, value in quantizer.state_dict().items()}
    torch.manual_seed(7)
    fit_quantizer(quantizer, latents, seed=3)
    assert all(torch.equal(first[name], value) for name, value in quantizer.state_dict().items())
    with pytest.raises(ValueError, match="31 frames are too few for codebooks of 32"):
        fit_quantizer(quantizer, latents[:31])


def test_without_levels_the_latent_passes_and_no_level_has_a_gradient(quantizer, latents):
    passed = pass_unquantized(quantizer, latents[None])
    assert not passed.level_mask.any()
    passed.quantized.sum().backward()
    assert quantizer.input_proj.parametrizations.weight.original1.grad is not None
    assert all(parameter.grad is None for parameter in quantizer.quantizers.parameters())


def test_the_fit_comes_at_the_end_of_a_stage_without_the_quantizer():
    def ends(*quantize):
        stages = [{"name": str(i), "updates": 3, "batch_seconds": 1.0, "quantize": q} for i, q in enumerate(quantize)]
        return Schedule.from_config(stages).quantizer_fits

    assert ends(True, True) == set()
    assert ends(False, True, True) == {3}
    assert ends(False, False, True) == {6}
    empty = [
        {"name": "a", "updates": 0, "batch_seconds": 1.0, "quantize": False},
        {"name": "b", "updates": 3, "batch_seconds": 1.0},
    ]
    assert Schedule.from_config(empty).quantizer_fits == set()
    with pytest.raises(ValueError, match="quantize"):
        ends("no")


@pytest.fixture(scope="module")
def stages():
    common = "batch_seconds: 4.0, learning_rate: 1.0e-3, warmup_updates: 1"
    return (
        f"stages=[{{name: continuous, updates: 2, quantize: false, {common}}}, {{name: codes, updates: 2, {common}}}]"
    )


def test_a_run_that_stops_at_the_fit_goes_on_exactly(small_overrides, recordings, stages, tmp_path, capfd):
    validation = [f"validation.data={recordings / 'heldout.jsonl'}", "validation.every_updates=1"]
    overrides = [*small_overrides, stages, "checkpoint.every_updates=1", "checkpoint.keep_last=4"]
    overrides += [*validation, "validation.max_clips=1", "checkpoint.monitor=null"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["fit", *overrides, f"run_dir={whole}"]) == 0
    assert "quantizer fitted" in capfd.readouterr().err
    assert main(["fit", *overrides, f"run_dir={parts}", "max_updates=2"]) == 0
    assert main(["fit", *overrides, f"run_dir={parts}"]) == 0
    assert_same_run(parts, whole)
    scored = column(read_table(whole / "validation.csv"), "update")
    assert scored == [0, 2, 3, 4]  # not 1: scores of levels that are not fitted yet mean nothing
    commitment = column(read_table(whole / "metrics.csv"), "loss/commitment")
    assert commitment[:2] == [0.0, 0.0]
    assert min(commitment[2:]) > 0
    before, after = (load_tokenizer(path).quantizer for path in list_checkpoints(whole / "checkpoints")[1:3])  # 1, 2
    assert not torch.equal(before.quantizers[0].codebook.weight, after.quantizers[0].codebook.weight)


def test_levels_are_fitted_when_a_run_resumes_beyond_the_stage_without_them(small_overrides, stages, tmp_path, capfd):
    slow = stages.replace("learning_rate: 1.0e-3", "learning_rate: 1.0e-9, final_learning_rate: 1.0e-9")
    command = ["fit", *small_overrides, slow, f"run_dir={tmp_path}", "ema={decay: 0.9}", "stages.1.updates=3"]
    command += ["stages.0.updates=4"]
    assert main([*command, "max_updates=3"]) == 0
    assert main([*command[:-1], "stages.0.updates=2", "allow_config_changes=true", "max_updates=4"]) == 0
    assert capfd.readouterr().err.count("quantizer fitted") == 1
    averaged = load_tokenizer(tmp_path).quantizer.quantizers  # it started again from the fitted levels
    gram = averaged[0].out_proj.weight[..., 0].T @ averaged[0].out_proj.weight[..., 0]
    torch.testing.assert_close(gram, torch.eye(8) * gram[0, 0], atol=1e-4 * gram[0, 0].item(), rtol=0)
    assert main([*command[:-1], "stages.0.updates=2", "max_updates=5"]) == 0  # they stay as they are now
    assert "quantizer fitted" not in capfd.readouterr().err


def test_levels_are_fitted_to_the_start_of_the_stream(packed):
    stream = AudioStream([packed], ClipFormat(24000, 1, 1920, peak=0.7), crop_seconds=0.96)
    clips = list(read_clips(stream, num_frames=100).values())
    frames = [clip.shape[-1] / 1920 for clip in clips]
    assert sum(frames) >= 100 > sum(frames[:-1])
    assert all(count == round(count) for count in frames)  # padded
    lengths = [stream.sample(position).num_samples for position in range(len(clips))]
    assert [-(-length // 1920) for length in lengths] == frames
    assert max(clip.abs().max().item() for clip in clips) == pytest.approx(0.7)
    more = sum(clip.shape[-1] for clip in read_clips(stream, num_frames=20_000).values()) / 1920
    assert 20_000 <= more < 20_013  # five minutes of recordings are repeated, so that no codebook is too large for them


def test_clips_that_cannot_be_read_are_passed_over(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "damaged")
    index = ShardIndex.load(folder)
    damaged = index.locate(0)
    with open(damaged.shard, "r+b") as file:
        file.seek(damaged.audio_offset)
        file.write(b"x" * 64)
    form = ClipFormat(24000, 1, 1920)
    whole, other = (AudioStream([source], form, crop_seconds=0.96, seed=3) for source in (packed, folder))
    place = next(position for position in range(10**6) if other.sample(position).location == damaged)
    expected, found = read_clips(whole, 500), read_clips(other, 500)
    assert place in expected
    assert place not in found
    assert all(torch.equal(found[position], expected[position]) for position in expected if position != place)


def test_shards_behind_a_server_give_the_same_codes(small_overrides, packed, stages, tmp_path, monkeypatch):
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    options = [stages, "max_updates=3", *(key for key in small_overrides if not key.startswith("data.train"))]
    with serving(functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(packed))) as url:
        assert main(["fit", *options, f"data.train={url}", f"run_dir={tmp_path / 'far'}"]) == 0
    assert main(["fit", *options, f"data.train={packed}", f"run_dir={tmp_path / 'near'}"]) == 0
    far, near = (load_tokenizer(tmp_path / name).state_dict() for name in ("far", "near"))
    assert all(torch.equal(far[name], near[name]) for name in near)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stages.1.updates=0"], "stages.0.quantize=false needs a later stage that quantizes"),
        (["trainable=[decoder]"], "stages.0.quantize=false changes the codes, and trainable leaves the quantizer out"),
        (["stages.0.trainable=[encoder]"], "stages.0.quantize=false changes the codes"),
        (["stages.0.updates=0", "trainable=[decoder]"], None),
    ],
)
def test_levels_are_fitted_only_where_they_are_used_and_may_change(small_overrides, stages, options, message):
    overrides = [*small_overrides, stages, *options]
    if message is None:
        load_config("fit", overrides)
    else:
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config("fit", overrides)
