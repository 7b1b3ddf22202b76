import math

import pytest

from moss_train.training.step.schedule import Schedule, Stage
from moss_train.utils.errors import ConfigError

STAGES = [
    {"name": "one", "updates": 10, "batch_seconds": 8.0, "warmup_updates": 4, "learning_rate": 1e-3},
    {
        "name": "two",
        "updates": 6,
        "batch_seconds": 4.0,
        "adversarial": True,
        "warmup_updates": 0,
        "discriminator_warmup_updates": 2,
    },
]


def test_the_clock_walks_through_the_stages():
    schedule = Schedule.from_config(STAGES)
    states = [schedule.at(update) for update in range(schedule.updates + 1)]
    assert schedule.updates == 16
    assert schedule.adversarial
    assert [state.stage.name for state in states] == ["one"] * 10 + ["two"] * 7
    assert [state.update for state in states] == [*range(10), *range(7)]
    assert [state.adversarial_loss_active for state in states] == [False] * 12 + [True] * 5


def test_rates_warm_up_and_follow_a_cosine():
    stage = Stage("s", updates=12, batch_seconds=1.0, warmup_updates=4, learning_rate=1e-3, final_learning_rate=1e-4)
    assert [stage.rate_factor(update) for update in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert stage.rate_factor(8) == pytest.approx(0.1 + 0.9 * 0.5)  # half-way through the cosine
    assert stage.rate_factor(6) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert stage.rate_factor(12) == stage.rate_factor(1000) == pytest.approx(0.1)


def test_wsd_stays_at_the_peak_and_decays_at_the_end():
    options = {"updates": 20, "batch_seconds": 1.0, "warmup_updates": 4, "learning_rate": 1e-3}
    stage = Stage("s", **options, final_learning_rate=1e-4, schedule="wsd", decay_fraction=0.2)
    factors = [stage.rate_factor(update) for update in range(21)]
    assert factors[3:17] == [1.0] * 14
    assert factors[17:] == pytest.approx([0.1 + 0.9 * (1 - math.sqrt(i / 4)) for i in (1, 2, 3, 4)])


def test_discriminators_learn_every_nth_update_and_judge_along_a_ramp():
    stage = {**STAGES[1], "discriminator_every": 2, "adversarial_ramp_updates": 2}
    states = [Schedule.from_config([stage]).at(update) for update in range(5)]
    assert [state.discriminators_learn for state in states] == [True, False, True, False, True]
    assert [state.adversarial_loss_active for state in states] == [False, False, True, True, True]
    assert [state.adversarial_ramp for state in states] == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("updates", "warmup", "is_long"), [(6000, 2000, True), (6001, 2000, False), (0, 2000, False), (5, 9, True)]
)
def test_a_warmup_of_a_third_of_a_stage_is_long(updates, warmup, is_long):
    stages = [STAGES[1], {"name": "decay", "updates": updates, "batch_seconds": 1.0, "warmup_updates": warmup}]
    assert list(Schedule.from_config(stages).long_warmups) == ["stages.1"] * is_long


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"batch_seconds": 0}, "batch_seconds"),
        ({"updates": -1}, "updates"),
        ({"trainable": ["decoder", "vocoder"]}, "trainable.1"),
        ({"discriminator_every": 0}, "discriminator_every"),
        ({"schedule": "linear"}, "schedule"),
        ({"decay_fraction": 0}, "decay_fraction"),
        ({"trainable": ["semantic"]}, "trainable"),
    ],
)
def test_impossible_stages_are_refused(change, path):
    with pytest.raises(ConfigError) as caught:
        Schedule.from_config([{"name": "s", "updates": 1, "batch_seconds": 1.0, **change}])
    assert (caught.value.kind, caught.value.path) == ("value", f"stages.0.{path}")


def test_a_schedule_needs_a_stage():
    with pytest.raises(ConfigError) as caught:
        Schedule.from_config([])
    assert (caught.value.kind, caught.value.path) == ("required", "stages")
