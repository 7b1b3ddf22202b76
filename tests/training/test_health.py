import pytest

from moss_train.config.fit_schema import HealthConfig
from moss_train.training.callbacks.health import HealthMonitor

LIMITS = HealthConfig(window_updates=20, ignore_first_updates=100)


@pytest.fixture
def health(tmp_path):
    writer = HealthMonitor(tmp_path, LIMITS, codebook_size=1000)
    writer.start(0)
    return writer


def metrics(update, **changes):
    healthy = {
        "loss/adversarial": 0.3,
        "discriminator_score/real": 0.7,
        "discriminator_score/generated": 0.3,
        "gradient_norm/generator": 1.0,
        "data_wait_seconds": 0.01,
        "update_seconds": 1.0,
        "checkpoint_seconds": 0.0,
    }
    return {"update": update, **healthy, **{name.replace("__", "/"): value for name, value in changes.items()}}


def run(health, updates, **changes):
    for update in updates:
        health.write("metrics", metrics(update, **changes))


def warnings(health):
    return health.path.read_text().splitlines() if health.path.exists() else []


def test_a_healthy_run_is_silent(health, capsys):
    run(health, range(1, 201))
    health.write("codebooks", {"update": 200, "frames": 9000, "perplexity/1": 400.0, "perplexity/2": 21.0})
    assert warnings(health) == []
    assert capsys.readouterr().err == ""


def test_a_collapsed_codebook_is_named_with_its_level_once(health, capsys):
    for update in (100, 200, 300):  # the first is within the grace period
        health.write("codebooks", {"update": update, "frames": 9000, "perplexity/1": 400.0, "perplexity/2": 19.9})
    (line,) = warnings(health)
    assert line.startswith("update 200: the codebooks of 1 of 2 levels have collapsed")
    assert "2 (19.9)" in line
    assert "raise objective.weights.codebook" in line
    assert capsys.readouterr().err == f"warning: {line}\n"


def test_few_frames_say_nothing_about_a_codebook(health):
    health.write("codebooks", {"update": 200, "frames": 3999, "perplexity/1": 2.0})
    assert warnings(health) == []


def test_a_discriminator_that_wins_for_long(health):
    run(health, range(1, 61), discriminator_score__real=0.99, discriminator_score__generated=0.01)
    (line,) = warnings(health)
    assert line.startswith("update 20: the discriminators tell real from generated audio almost perfectly")
    assert "(mean margin 0.98 over 20 updates)" in line


def test_a_discriminator_that_loses_for_long_and_again_after_a_recovery(health):
    run(health, range(1, 41), discriminator_score__real=0.51, discriminator_score__generated=0.50)
    run(health, range(41, 101))
    run(health, range(101, 141), discriminator_score__real=0.51, discriminator_score__generated=0.50)
    lines = warnings(health)
    assert len(lines) == 2
    assert all("cannot tell real from generated" in line for line in lines)
    assert all("objective.discriminator_crop_seconds" in line for line in lines)


def test_discriminators_are_not_checked_in_their_warm_up(health):
    for update in range(1, 41):
        row = metrics(update, discriminator_score__real=0.0, discriminator_score__generated=0.0)
        health.write("metrics", {name: value for name, value in row.items() if name != "loss/adversarial"})
    assert warnings(health) == []


def test_one_lucky_update_is_no_discriminator_that_wins(health):
    run(health, range(1, 41))
    run(health, [41], discriminator_score__real=5.0, discriminator_score__generated=-4.0)
    run(health, range(42, 80))
    assert warnings(health) == []


def test_a_margin_around_its_limit_is_one_warning(health):
    for update in range(1, 400):
        margin = 0.96 if update // 15 % 2 else 0.945
        health.write("metrics", metrics(update, discriminator_score__real=margin, discriminator_score__generated=0.0))
    assert len(warnings(health)) == 1


def test_exploding_gradients_name_their_side_and_size(health):
    run(health, range(1, 41))
    run(health, [41], gradient_norm__generator=1000.0)  # one spike is clipped and then forgotten
    run(health, range(42, 61))
    assert warnings(health) == []
    run(health, range(61, 70), gradient_norm__generator=12.0)
    (line,) = warnings(health)
    assert "gradients of the generator explode, norm 12 after 1:" in line


def test_falling_behind_on_data(health):
    run(health, range(1, 41), data_wait_seconds=0.5)
    (line,) = warnings(health)
    assert line.startswith("update 20: 50% of the time is spent waiting for data: raise data.num_workers, or move")


def test_checkpoints_that_take_long(health):
    """Two, then five seconds after every twentieth update; the checkpoint at the start is not counted."""
    for update in range(1, 82):
        seconds = 50.0 if update == 1 else 2.0 if update % 20 == 1 else 0.0
        run(health, [update], checkpoint_seconds=seconds)
    assert warnings(health) == []
    for update in range(82, 142):
        run(health, [update], checkpoint_seconds=5.0 if update % 20 == 1 else 0.0)
    (line,) = warnings(health)
    assert line == (
        "update 100: 20% of the time is spent writing checkpoints, 5.0 s for the last one: raise "
        "checkpoint.every_updates, or put run_dir on a faster disk"
    )


def test_a_resumed_run_forgets_the_warnings_of_updates_that_come_again(health, tmp_path):
    run(health, range(1, 41), data_wait_seconds=0.5)
    again = HealthMonitor(tmp_path, LIMITS, codebook_size=1000)
    again.start(20)
    assert len(warnings(again)) == 1
    again.start(19)
    assert warnings(again) == []


@pytest.mark.parametrize("change", [{"window_updates": 5}, {"max_data_wait": -1}, {"max_gradient_growth": "much"}])
def test_impossible_limits_are_named(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}="):
        HealthConfig(**change)


def test_a_term_with_a_weight_and_hardly_any_gradient(health):
    """Five measurements in a row below 1 % give one warning per occurrence; terms with weight 0 are ignored."""
    weighted = {"weighted/adversarial": 1.0, "weighted/reconstruction": 30.0}
    low = {"gradient_share/adversarial": 0.003, "gradient_share/reconstruction": 0.997}
    run(health, range(1, 5), **weighted, **low)
    assert warnings(health) == []
    run(health, range(5, 7), **weighted, **low)
    (line,) = warnings(health)
    assert line.startswith("update 5: adversarial has 0.30% of the gradient")
    other = HealthMonitor(health.path.parent, LIMITS, codebook_size=1000)
    high = low | {"gradient_share/adversarial": 0.02}
    run(other, range(7, 27), **{**weighted, **high})
    run(other, range(27, 47), **{**weighted, **low, "weighted/adversarial": 0.0})
    assert len(warnings(other)) == 1


@pytest.mark.parametrize("every", [1, 2, 4])
def test_gradients_of_discriminators_that_learn_in_every_nth_update_are_watched(health, every):
    for update in range(1, 61):
        norm = {"gradient_norm/discriminators": 1.0 if update <= 40 else 1e4} if update % every == 0 else {}
        health.write("metrics", metrics(update) | norm)
    (line,) = warnings(health)
    assert "gradients of the discriminators explode, norm" in line


def test_gradients_of_discriminators_that_have_just_begun_are_not_compared_yet(health):
    for update in range(1, 41):
        norms = {"gradient_norm/discriminators": 100.0 * (update - 24)} if update >= 25 else {}
        health.write("metrics", metrics(update) | norms)
        if update < 40:
            assert warnings(health) == []
