import pytest
import torch

from moss_train.batch import Batch
from moss_train.discriminators import DiscriminatorOutput
from moss_train.model.quantizer import QuantizerOutput
from moss_train.training.step.objective import WEIGHTS, Objective, UpdateCounts

RATE = 24000


def make_batch(lengths: list[int], crop_units: list[float]) -> Batch:
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
        quantizer_units=torch.zeros(size),
        crop_units=torch.tensor(crop_units),
        sample_ids=tuple(map(str, range(size))),
        domains=("speech",) * size,
    )


def test_published_weights_make_the_total():
    terms = {name: torch.tensor(1.0) for name in WEIGHTS}
    objective = Objective(RATE)
    assert objective.total(terms, {}).item() == pytest.approx(20 + 15 + 0.25 + 1 + 1 + 2)
    assert objective.total(terms, {"semantic": 0.0}).item() == pytest.approx(19.25)
    with pytest.raises(ValueError, match="unknown term"):
        Objective(RATE, {"loudness": 1.0})


def test_counts_are_those_of_the_whole_update():
    batches = [make_batch([2400, 1200], [0.0, 0.0]), make_batch([4800], [0.0])]
    counts = Objective(RATE).count(batches)
    hops = [8, 16, 32, 64, 128, 256, 512]
    expected = [sum(-(-length // hop) for length in (2400, 1200, 4800)) for hop in hops]
    assert (counts.clips.item(), counts.mel_frames.tolist(), counts.text_tokens.item()) == (3, expected, 6)
    again = UpdateCounts.from_vector(counts.vector())
    assert again.mel_frames.tolist() == expected
    assert again.text_tokens.item() == 6


def test_codec_terms_of_known_values():
    batch = make_batch([2400], [0.0])
    objective = Objective(RATE)
    latents, rows = torch.zeros(2, 1, 3, 4), torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 3, 4)
    quantized = QuantizerOutput(
        torch.zeros(()), torch.zeros(()), latents, rows, level_mask=torch.tensor([[True], [False]])
    )
    frame_mask = torch.tensor([[True, True, False]])
    terms = objective.codec_terms(batch, 10 * batch.audio, quantized, frame_mask, objective.count([batch]))
    # Ten times louder: log10 differs by one on each of seven scales, no value lies below the floor.
    assert terms["reconstruction"].item() == pytest.approx(7.0, abs=1e-3)
    # The second level is dropped; the first differs by one in every dimension of every valid frame.
    assert terms["commitment"].item() == terms["codebook"].item() == pytest.approx(1.0)


def test_adversarial_terms_of_known_values():
    objective = Objective(RATE)
    counts = UpdateCounts(torch.tensor(1), torch.ones(7), torch.tensor(0))

    def judged(logit: float, feature: float) -> list[DiscriminatorOutput]:
        return [DiscriminatorOutput(torch.full((1, 4), logit), (torch.full((1, 5), feature),))]

    real, generated = judged(0.5, 2.0), judged(0.25, 1.0)
    assert objective.discriminator_term(real, generated, counts).item() == pytest.approx(0.25 + 0.0625)
    terms = objective.judge_terms(real, generated, counts)
    assert terms["adversarial"].item() == pytest.approx(0.5625)
    assert terms["feature"].item() == pytest.approx(0.5)


def test_sums_instead_of_means_have_known_values():
    """Two discriminators: LSGAN added up, features by twice their absolute distance, logits included."""
    objective = Objective(RATE, adversarial_reduction="sum", feature_reduction="absolute_sum")
    counts = UpdateCounts(torch.tensor(1), torch.ones(7), torch.tensor(0))

    def judged(logits: tuple[float, float], feature: float) -> list[DiscriminatorOutput]:
        return [DiscriminatorOutput(torch.full((1, 4), x), (torch.full((1, 5), feature),) * 3) for x in logits]

    real, generated = judged((0.5, 1.0), 2.0), judged((0.25, 0.0), 1.5)
    assert objective.discriminator_term(real, generated, counts).item() == pytest.approx(0.25 + 0.0625)
    terms = objective.judge_terms(real, generated, counts)
    assert terms["adversarial"].item() == pytest.approx(0.5625 + 1.0)
    assert terms["feature"].item() == pytest.approx(2 * (6 * 0.5 + 0.25 + 1.0))


@pytest.mark.parametrize("name", ["adversarial_reduction", "feature_reduction"])
def test_an_unknown_reduction_is_refused_by_its_path(name):
    with pytest.raises(ValueError, match=f"objective.{name}.*median"):
        Objective(RATE, **{name: "median"})


@pytest.mark.parametrize("name", ["complex_stft", "waveform"])
def test_optional_terms_exist_where_they_have_a_weight(name):
    batch = make_batch([2400], [0.0])
    zeros = torch.zeros(2, 1, 3, 4)
    quantized = QuantizerOutput(zeros, zeros, zeros, zeros, level_mask=torch.ones(2, 1, dtype=torch.bool))
    mask = torch.ones(1, 3, dtype=torch.bool)

    def terms(objective: Objective, **stage: float) -> dict:
        return objective.codec_terms(batch, -batch.audio, quantized, mask, objective.count([batch]), stage)

    assert name not in terms(Objective(RATE))
    assert terms(Objective(RATE, {name: 2.0}))[name] == terms(Objective(RATE), **{name: 1.0})[name] > 0
    assert name not in terms(Objective(RATE, {name: 2.0}), **{name: 0.0})


def test_crops_start_where_the_clip_says_and_stay_inside_it():
    batch = make_batch([4800, 2400, 600], [0.999, 0.5, 0.9])
    objective = Objective(RATE, crop_seconds=0.05)  # 1200 samples
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
