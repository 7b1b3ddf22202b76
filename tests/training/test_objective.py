import math
import re
from dataclasses import replace

import pytest
import torch

from moss_train import load_config
from moss_train.batch import Batch
from moss_train.discriminators import DiscriminatorOutput
from moss_train.model.quantizer import QuantizerOutput
from moss_train.training.step.objective import LOSSES, WEIGHTS, Objective, UpdateCounts, weighted_sum
from moss_train.training.step.schedule import ScheduleState, Stage
from moss_train.utils.errors import ConfigError, UserError

RATE = 24000


def make_batch(lengths: list[int], crop_uniform: list[float]) -> Batch:
    size = len(lengths)
    audio = torch.randn(size, 1, max(lengths), generator=torch.Generator().manual_seed(0))
    for clip, length in zip(audio, lengths, strict=True):
        clip[:, length:] = 0
    return Batch(
        audio=audio,
        audio_lengths=torch.tensor(lengths),
        text_tokens=torch.zeros(size, 3, dtype=torch.long),
        text_lengths=torch.tensor([3, *[0] * (size - 1)]),
        task_ids=torch.zeros(size, dtype=torch.long),
        quantizer_uniform=torch.zeros(size),
        crop_uniform=torch.tensor(crop_uniform),
        sample_ids=tuple(map(str, range(size))),
        domains=("speech",) * size,
    )


STAGE = Stage("s", 10, 1.0, adversarial=True)
ADVERSARIAL = ScheduleState(STAGE, 5)
ONE_CLIP = UpdateCounts(torch.tensor(1), torch.tensor(0), {})


def test_published_weights_make_the_total():
    terms = {name: torch.tensor(1.0) for name in WEIGHTS}
    objective = Objective(RATE)
    assert weighted_sum(terms, objective.weights).item() == pytest.approx(20 + 15 + 0.25 + 1 + 1 + 2)
    quiet = replace(STAGE, weights={"semantic": 0.0})
    assert weighted_sum(terms, objective.stage_weights(quiet)).item() == pytest.approx(19.25)
    assert "semantic" not in objective.active_weights(ScheduleState(quiet, 5))
    with pytest.raises(ValueError, match="unknown term"):
        Objective(RATE, {"loudness": 1.0})


def test_counts_are_those_of_the_whole_update():
    batches = [make_batch([2400, 1200], [0.0, 0.0]), make_batch([4800], [0.0])]
    counts = Objective(RATE).count(batches)
    hops = [8, 16, 32, 64, 128, 256, 512]
    expected = [sum(-(-length // hop) for length in (2400, 1200, 4800)) for hop in hops]
    assert (counts.clips.item(), counts.text_tokens.item()) == (3, 6)
    assert counts.audio["reconstruction"].tolist() == expected
    assert counts.audio["waveform"].item() == 3
    double = counts.reduced(lambda vector: 2 * vector)
    assert (double.clips.item(), double.text_tokens.item()) == (6, 12)
    assert double.audio["reconstruction"].tolist() == [2 * count for count in expected]
    assert double.audio["waveform"].shape == ()


def test_reconstruction_and_quantizer_terms_of_known_values():
    batch = make_batch([2400], [0.0])
    objective = Objective(RATE)
    weights, counts = objective.active_weights(ADVERSARIAL), objective.count([batch])
    latents, rows = torch.zeros(2, 1, 3, 4), torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 3, 4)
    quantized = QuantizerOutput(
        torch.zeros(()), torch.zeros(()), latents, rows, level_mask=torch.tensor([[True], [False]])
    )
    # Ten times louder: log10 differs by one on each of seven scales, and no value is below the floor.
    terms = objective.audio_terms(batch, 10 * batch.audio, counts, weights)
    assert {name: term.item() for name, term in terms.items()} == {"reconstruction": pytest.approx(7.0, abs=1e-3)}
    # The second level is dropped; the first differs by one in every dimension of every valid frame.
    terms = objective.quantizer_terms(quantized, torch.tensor([[True, True, False]]), counts, weights)
    assert {name: term.item() for name, term in terms.items()} == {"commitment": 1.0, "codebook": 1.0}


def discriminator_outputs(logits: tuple[float, ...], feature: float, layers: int = 1) -> list[DiscriminatorOutput]:
    return [DiscriminatorOutput(torch.full((1, 4), x), (torch.full((1, 5), feature),) * layers) for x in logits]


def test_adversarial_terms_of_known_values():
    objective = Objective(RATE)
    real, generated = discriminator_outputs((0.5,), 2.0), discriminator_outputs((0.25,), 1.0)
    assert objective.discriminator_loss(real, generated, ONE_CLIP).item() == pytest.approx(0.25 + 0.0625)
    terms = objective.adversarial_terms(real, generated, ONE_CLIP, objective.active_weights(ADVERSARIAL))
    assert terms["adversarial"].item() == pytest.approx(0.5625)
    assert terms["feature"].item() == pytest.approx(0.5)


def test_sums_instead_of_means_have_known_values():
    """Two discriminators: LSGAN summed, features by twice their absolute distance, logits included."""
    objective = Objective(RATE, adversarial_reduction="sum", feature_reduction="absolute_sum")
    real, generated = (
        discriminator_outputs((0.5, 1.0), 2.0, layers=3),
        discriminator_outputs((0.25, 0.0), 1.5, layers=3),
    )
    assert objective.discriminator_loss(real, generated, ONE_CLIP).item() == pytest.approx(0.25 + 0.0625)
    terms = objective.adversarial_terms(real, generated, ONE_CLIP, objective.active_weights(ADVERSARIAL))
    assert terms["adversarial"].item() == pytest.approx(0.5625 + 1.0)
    assert terms["feature"].item() == pytest.approx(2 * (6 * 0.5 + 0.25 + 1.0))


@pytest.mark.parametrize("name", ["adversarial", "feature"])
def test_an_unknown_reduction_is_refused_by_its_path(name):
    with pytest.raises(UserError, match=f"objective.losses.{name}.*median"):
        Objective(RATE, **{f"{name}_reduction": "median"})


@pytest.mark.parametrize("name", ["complex_stft", "waveform", "relative_error"])
def test_optional_terms_exist_where_they_have_a_weight(name):
    batch = make_batch([2400], [0.0])

    def terms(objective: Objective, **stage: float) -> dict:
        weights = objective.active_weights(ScheduleState(replace(STAGE, weights=stage), 0))
        return objective.audio_terms(batch, -batch.audio, objective.count([batch]), weights)

    assert name not in terms(Objective(RATE))
    assert terms(Objective(RATE, {name: 2.0}))[name] == terms(Objective(RATE), **{name: 1.0})[name] > 0
    assert name not in terms(Objective(RATE, {name: 2.0}), **{name: 0.0})


def test_a_loss_is_added_changed_and_taken_away_by_its_node():
    further = {"_target_": "moss_train.losses.ComplexSTFTLoss", "weight": 0.5, "window_lengths": [64]}
    losses = {"short_stft": further, "codebook": None, "reconstruction": {"window_lengths": [512], "num_mels": [40]}}
    objective = Objective(RATE, losses=losses, weights={"codebook": None})
    assert objective.names == (*(name for name in WEIGHTS if name != "codebook"), "short_stft")
    assert objective.weights["short_stft"] == 0.5
    assert objective.output_names[-3:] == ("short_stft", "adversarial", "feature")
    assert Objective(RATE, losses=losses, weights={"short_stft": 2.0, "codebook": None}).weights["short_stft"] == 2.0
    batch = make_batch([2400], [0.0])
    counts = objective.count([batch])
    assert counts.audio["reconstruction"].tolist() == [-(-2400 // 128)]
    terms = objective.audio_terms(batch, -batch.audio, counts, objective.active_weights(ADVERSARIAL))
    assert terms["short_stft"] > 0 == terms["reconstruction"]


@pytest.mark.parametrize(
    ("losses", "part"),
    [
        ({"mine": {"weight": 1.0}}, "objective.losses.mine"),
        ({"mine": {"_target_": "torch.nn.GELU"}}, "objective.losses.mine"),
        ({"waveform": {"windows": 3}}, "objective.losses.waveform"),
    ],
)
def test_what_is_no_loss_is_refused_by_its_path(losses, part):
    with pytest.raises((UserError, ValueError), match=part):
        Objective(RATE, losses=losses)


def test_the_configuration_shows_the_defaults_of_the_code():
    config = load_config("fit", ["experiment=cat_1b6"]).to_plain()["objective"]
    assert config["losses"] == LOSSES
    assert {name: weight or 0.0 for name, weight in config["weights"].items()} == WEIGHTS


def test_crops_start_where_the_clip_says_and_stay_inside_it():
    batch = make_batch([4800, 2400, 600], [0.999, 0.5, 0.9])
    objective = Objective(RATE, discriminator_crop_seconds=0.05)  # 1200 samples
    ramp = torch.arange(1.0, 4801.0).expand(3, 1, -1)
    crop = objective.crop(ramp, batch)
    assert crop.shape == (3, 1, 1200)
    assert crop[0, 0, 0].item() == 1 + int(0.999 * 3601)
    assert crop[1, 0, 0].item() == 1 + int(0.5 * 1201)
    assert crop[2, 0, 599].item() == 600
    assert crop[2, 0, 600:].abs().max() == 0


def test_share_of_quantizer_dropout_has_to_be_a_share():
    with pytest.raises(ValueError, match=r"quantizer_dropout=1.5 has to be from 0 to 1"):
        Objective(24000, quantizer_dropout=1.5)


def test_a_loss_that_is_taken_away_has_no_term():
    config = load_config("fit", ["experiment=cat_1b6", "objective.losses.feature=null"])
    objective = Objective(RATE, config.objective.weights, losses=config.objective.losses)
    assert "feature" not in objective.weights
    assert "feature" not in objective.losses
    assert objective.weights["adversarial"] == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.weights.feature=null", "objective.weights.feature=null has to be a number; 0 leaves the term out"),
        (
            "+objective.losses.feature.weight=100",
            "objective.losses.feature.weight=100 has no effect: set objective.weights.feature",
        ),
    ],
)
def test_weights_that_would_not_count_are_refused(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config("fit", ["experiment=cat_1b6", override])


def test_discriminators_get_crops_that_are_emphasised_and_scaled_by_the_recording():
    batch = make_batch([4800, 2400], [0.25, 0.5])
    raw = Objective(RATE, discriminator_crop_seconds=0.05)
    crop, output = raw.crop(batch.reference, batch), 0.5 * batch.reference
    assert torch.equal(raw.discriminator_input(batch.reference, batch), crop)
    prepared = Objective(
        RATE, discriminator_crop_seconds=0.05, discriminator_pre_emphasis=0.97, discriminator_unit_rms=True
    )
    emphasised = crop.clone()
    emphasised[..., 1:] -= 0.97 * crop[..., :-1]
    rms = torch.tensor([math.sqrt(clip.square().mean()) for clip in emphasised])
    real = prepared.discriminator_input(batch.reference, batch)
    torch.testing.assert_close(real, emphasised / (rms + 1e-3)[:, None, None])
    torch.testing.assert_close(prepared.discriminator_input(output, batch), 0.5 * real)
