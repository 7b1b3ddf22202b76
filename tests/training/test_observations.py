import pytest
import torch

from moss_train.data.stream.sample_reader import StreamCounter
from moss_train.discriminators import DiscriminatorOutput
from moss_train.evaluation.metrics.codes import codebook_columns, codebook_row
from moss_train.training.callbacks.metrics import count_clips, loss_row
from moss_train.training.step.objective import Objective, count_codes, mean_scores
from moss_train.training.step.schedule import ScheduleState, Stage
from moss_train.training.step.update import UpdateResult, output_gradient

STAGE = Stage("s", 10, 1.0, adversarial=True, discriminator_warmup_updates=2, adversarial_ramp_updates=4)


def test_codes_of_valid_frames_are_counted_level_by_level():
    codes = torch.tensor([[[0, 1, 3]], [[2, 2, 3]]])
    counts = count_codes(codes, torch.tensor([[True, True, False]]), 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 0, 2, 0]]


def test_the_row_of_the_codebooks_has_the_values_of_the_counts():
    counts = torch.stack([torch.full((4,), 2500), torch.tensor([10_000, 0, 0, 0])])
    row = codebook_row(counts)
    assert set(row) | {"update"} == set(codebook_columns(2))
    assert row["frames"] == 10_000
    assert [row["usage/1"], row["usage/2"]] == [1.0, 0.25]
    assert row["perplexity/1"] == pytest.approx(4.0)
    assert row["perplexity/2"] == pytest.approx(1.0)
    assert row["mean_usage"] == pytest.approx(0.625)
    assert codebook_row(torch.zeros(2, 4, dtype=torch.int64)) == {}


def test_mean_scores_are_means_over_discriminators_and_clips():
    real = [DiscriminatorOutput(torch.tensor([[1.0, 3.0]]), ()), DiscriminatorOutput(torch.tensor([[0.0]]), ())]
    generated = [DiscriminatorOutput(torch.tensor([[-1.0]]), ()), DiscriminatorOutput(torch.tensor([[0.0]]), ())]
    means = mean_scores(real, generated, 2)
    assert {name: value.item() for name, value in means.items()} == {
        "discriminator_score/real": 0.5,  # (2 + 0) / 2 discriminators / 2 clips
        "discriminator_score/generated": -0.25,
    }


def terms_of(output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return two terms whose gradients are 1 and x."""
    return {"reconstruction": output.sum(), "feature": output.square().sum() / 2}


def test_shares_of_the_gradient_at_the_output():
    """3 sum(x) has gradient 3, sum(x^2) / 2 has x: over x = [2, 2] the norms are 3 sqrt(2) and 2 sqrt(2)."""
    output = torch.tensor([2.0, 2.0], requires_grad=True)
    weights = {"reconstruction": 3.0, "feature": 1.0}
    gradient, squares = output_gradient(terms_of(output), weights, output, Objective(24_000), measure=True)
    assert gradient.tolist() == [5.0, 5.0]
    norms = {name: square.sqrt().item() for name, square in squares.items()}
    assert norms == pytest.approx({"reconstruction": 2**0.5, "feature": 8**0.5})
    metrics = {"loss/reconstruction": 4.0}
    result = UpdateResult(metrics, weights, norms, {}, torch.zeros(1, 1), num_clips=1)
    assert loss_row(result) == {
        "loss/reconstruction": 4.0,
        "weighted/reconstruction": 12.0,
        "gradient_share/reconstruction": pytest.approx(0.6),
        "gradient_share/feature": pytest.approx(0.4),
    }
    plain, nothing = output_gradient(terms_of(output), weights, output, Objective(24_000), measure=False)
    assert torch.equal(plain, gradient)
    assert nothing == {}


def test_weights_are_those_of_the_stage_and_the_ramp():
    objective = Objective(24_000, {"semantic": 0.0})
    base = {"reconstruction": 15.0, "commitment": 0.25, "codebook": 1.0}
    assert objective.active_weights(ScheduleState(STAGE, 0)) == base
    assert objective.active_weights(ScheduleState(STAGE, 2)) == base | {"adversarial": 0.25, "feature": 0.5}
    assert objective.active_weights(ScheduleState(STAGE, 9)) == base | {"adversarial": 1.0, "feature": 2.0}


def test_clips_are_counted_on_the_host(module, update):
    """Values on a device are not read: a tensor on the meta device has none."""
    on_device = update.to("meta")
    counts = count_clips(module, on_device)
    assert counts == count_clips(module, update)
    lengths = [length for micro in update.micro_batches for length in micro.audio_lengths.tolist()]
    assert counts["clips"] == len(lengths)
    assert counts["audio_samples"] == sum(lengths)
    texts = [length for micro in update.micro_batches for length in micro.text_lengths.tolist()]
    assert counts["text_tokens"] == sum(texts)
    frames = [-(-length // 1920) for length in lengths]
    both = [(frame + text) ** 2 for frame, text in zip(frames, texts, strict=True) if text]
    assert counts["text_squares"] == sum(both)
    counter = StreamCounter(24_000)
    domains = ("speech", "music", "sound")
    assert counter.counts(on_device, domains) == counter.counts(update, domains)
