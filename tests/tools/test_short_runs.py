"""Schedules scaled to a number of updates."""

from moss_train.config.recipe_schema import StageConfig
from tools.short_runs import shortened

STAGES = (
    StageConfig("first", 700, 4.0, warmup_updates=100, learning_rate=1e-3),
    StageConfig("second", 300, 4.0, warmup_updates=0, discriminator_warmup_updates=20),
)


def test_all_lengths_of_a_schedule_shrink_together_and_rates_stay():
    first, second = shortened(STAGES, 100)
    assert first == STAGES[0].replace(updates=70, warmup_updates=10)
    assert second == STAGES[1].replace(updates=30, discriminator_warmup_updates=2)


def test_what_there_was_does_not_vanish():
    assert [stage.updates for stage in shortened(STAGES, 2)] == [1, 1]
    assert shortened(STAGES, 2)[0].warmup_updates == 1
