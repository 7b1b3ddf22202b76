"""Loss terms balanced by their share of the gradient at the decoder's output instead of by weights."""

import math

import pytest
import torch

from moss_train.cli.main import main
from moss_train.training import CatModule
from moss_train.training.loggers.base import read_table
from moss_train.training.run.warm_start import plan_initialization
from moss_train.training.step.objective import GradientBalancer
from moss_train.training.step.update import add_up, forward_backward

from ..faults.harness import assert_same_run
from .gradients import pick
from .runs import column

NAMES = ("reconstruction", "adversarial", "feature", "waveform")
WEIGHTS = {"reconstruction": 15.0, "adversarial": 1.0, "feature": 2.0, "waveform": 3.0, "codebook": 1.0}
BALANCE = "objective.balance={reconstruction: 1, adversarial: 2, feature: 1}"


def balancer(decay: float = 0.5) -> GradientBalancer:
    return GradientBalancer({"reconstruction": 1, "adversarial": 2, "feature": 1}, NAMES, decay)


def test_weights_give_each_term_its_share_of_what_the_reconstruction_has():
    """The reconstruction alone has 15 * 2 = 30: a quarter, a half and a quarter of it are 7.5, 15 and 7.5."""
    balance = balancer()
    balance.add({"reconstruction": 2.0, "adversarial": 0.5, "feature": 0.1, "waveform": 7.0})
    weights = balance.weights(WEIGHTS, {})
    assert weights == pytest.approx(WEIGHTS | {"reconstruction": 3.75, "adversarial": 30.0, "feature": 75.0})
    # Half-way up the ramp: shares 1, 1 and 0.5.
    weights = balance.weights(WEIGHTS, {"adversarial": 0.5, "feature": 0.5})
    assert weights["reconstruction"] == pytest.approx(15 / 2.5)
    assert weights["adversarial"] * 0.5 == pytest.approx(30 / 2.5)
    assert weights["feature"] * 0.1 == pytest.approx(30 * 0.5 / 2.5)


def test_the_running_mean_forgets():
    """With decay 0.5 the norms 1, 2, 4 have weights 1/4, 1/2 and 1: (0.25 + 1 + 4) / 1.75 = 3."""
    balance = balancer()
    for norm in (1.0, 2.0, 4.0):
        balance.add({"feature": norm})
    assert balance.norm("feature") == pytest.approx(3.0)


def test_a_term_takes_part_from_its_second_update_on():
    balance = balancer()
    first = balance.weights(WEIGHTS, {})
    assert first == WEIGHTS | {"adversarial": 0.0, "feature": 0.0}
    balance.add({"reconstruction": 1.0, "adversarial": 1.0, "feature": 0.0})
    second = balance.weights(WEIGHTS, {})
    assert second["reconstruction"] == pytest.approx(5.0)
    assert second["adversarial"] == pytest.approx(10.0)
    assert second["feature"] == 0.0  # there was no gradient for it


def test_terms_that_are_not_computed_leave_their_share_to_the_others():
    balance = balancer()
    balance.add({"reconstruction": 1.0, "adversarial": 1.0, "feature": 1.0})
    stage_1 = {"reconstruction": 15.0, "codebook": 1.0}
    assert balance.weights(stage_1, {}) == stage_1
    assert balance.weights(stage_1 | {"feature": 2.0}, {})["feature"] == pytest.approx(7.5)
    assert balance.weights({"adversarial": 1.0}, {}) == {"adversarial": 1.0}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"reconstruction": 1, "semantic": 1}, "semantic"),
        ({"adversarial": 1}, "needs a share for reconstruction"),
        ({"reconstruction": 1, "feature": 0}, r"objective\.balance\.feature=0"),
        ({"reconstruction": 1, "feature": math.inf}, r"objective\.balance\.feature=inf"),
        ({"reconstruction": True}, r"objective\.balance\.reconstruction=True"),
    ],
)
def test_shares_that_cannot_be_kept_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        GradientBalancer(shares, NAMES)


@pytest.fixture
def balanced(small_config) -> CatModule:
    module = CatModule(**plan_initialization(small_config(BALANCE)).arguments)
    module.manual_backward = lambda loss, **options: loss.backward(**options)  # outside a Trainer
    return module


def norms_of(module: CatModule, batches: tuple, number: int) -> dict[str, float]:
    """Return norms at the decoder's output over the micro-batches of update `number`; keeps the module's gradients."""
    module.zero_grad()
    schedule_state, counts = module.schedule.at(number), module.objective.count(batches)
    weights = module.objective.active_weights(schedule_state)
    arguments = (counts, schedule_state, weights, module.manual_backward)
    results = [forward_backward(module.networks, module.objective, batch, *arguments) for batch in batches]
    return {name: square.sqrt().item() for name, square in add_up([r.output_squares for r in results]).items()}


def test_norms_do_not_depend_on_micro_batches_and_shares_are_kept(balanced, update):
    singles = tuple(pick(batch, [i]) for batch in update.micro_batches for i in range(batch.num_clips))
    norms = norms_of(balanced, update.micro_batches, 6)
    assert norms == pytest.approx(norms_of(balanced, singles, 6), rel=1e-4)
    before = balanced.objective.weights["reconstruction"] * norms["reconstruction"]
    balanced.objective.balancer.add(norms)
    weights = balanced.objective.active_weights(balanced.schedule.at(6))
    sizes = {name: weights[name] * norm for name, norm in norms.items()}
    assert sizes == pytest.approx({"reconstruction": before / 4, "adversarial": before / 2, "feature": before / 4})
    gradients = {name: p.grad.clone() for name, p in balanced.named_parameters() if p.grad is not None}
    norms_of(balanced, update.micro_batches, 6)
    name = next(name for name in gradients if name.startswith("tokenizer.decoder."))
    assert not torch.equal(balanced.get_parameter(name).grad, gradients[name])


def test_a_checkpoint_keeps_the_running_means(balanced, small_config):
    balanced.objective.balancer.add({"reconstruction": 0.1, "adversarial": 1 / 3})
    balanced.objective.balancer.add({"reconstruction": 0.7, "feature": 1e-9})
    checkpoint: dict = {}
    balanced.on_save_checkpoint(checkpoint)
    again = CatModule(**plan_initialization(small_config(BALANCE)).arguments)
    again.on_load_checkpoint(checkpoint)
    assert again.objective.balancer.state_dict() == balanced.objective.balancer.state_dict()
    plain = CatModule(**plan_initialization(small_config()).arguments)
    plain.on_load_checkpoint(checkpoint)
    assert plain.objective.balancer is None


@pytest.mark.nightly
def test_a_balanced_run_resumes_to_the_last_bit(small_overrides, tmp_path):
    arguments = ["fit", *small_overrides, BALANCE]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*arguments, f"run_dir={whole}"]) == 0
    assert main([*arguments, f"run_dir={parts}", "max_updates=7"]) == 0
    assert main([*arguments, f"run_dir={parts}"]) == 0
    assert_same_run(parts, whole)
    rows = read_table(whole / "metrics.csv")
    assert column(rows[-1:], "gradient_share/adversarial")[0] == pytest.approx(0.5, abs=0.2)
