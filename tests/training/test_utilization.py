"""Counted operations, compared with values computed by hand and with those of a real update."""

import re
from dataclasses import replace
from statistics import median

import pytest
import torch

from moss_train.batch import Batch
from moss_train.cli.main import main
from moss_train.config.fit_schema import FitConfig, TrainerConfig
from moss_train.training.cost.flops import Cost, FlopCounter, StageCosts
from moss_train.training.cost.hardware import GPUS, device_peak, gpu_of
from moss_train.training.cost.mfu import (
    Utilization,
    count_stages,
    measured_share,
)
from moss_train.training.loggers.base import ProgressWriter, read_table
from moss_train.training.run.optimizations import checkpoint_activations
from moss_train.training.step.schedule import ScheduleState, Stage
from moss_train.utils.errors import UserError

from ..faults.harness import values
from .gradients import accumulate
from .runs import column

BF16 = TrainerConfig(precision="bf16-mixed")
CONTENT = {
    "audio_seconds": 100.0,
    "clips": 8,
    "clips_with_text": 2,
    "text_frames": 30,
    "text_tokens": 10,
    "text_squares": 900,
}
OPERATIONS = StageCosts(
    Stage("s", 5, 1.0),
    {"encoder": Cost(forward=10e12, recomputed=6e12), "decoder": Cost(backward=20e12)},
    discriminators=Cost(forward=3e12),
    text={"clips_with_text": 1e12, "text_frames": 2e12, "text_tokens": 4e12, "text_squares": 1e10},
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_gpus_are_known_by_the_names_of_their_driver(name, kind):
    assert gpu_of(name) == (None if kind is None else GPUS[kind])


def test_the_peak_is_that_of_the_precision_and_a_given_one_goes_before():
    name = "NVIDIA H100 80GB HBM3"
    assert device_peak(name, BF16, None) == 989.4e12
    assert device_peak(name, TrainerConfig(precision="32-true", matmul_precision="high"), None) == 494.7e12
    assert device_peak(name, TrainerConfig(precision="32-true"), None) == pytest.approx(66.9e12)
    assert device_peak(name, BF16, 500) == 500e12
    assert device_peak(None, BF16, None) is device_peak("a new GPU", BF16, None) is None


@pytest.mark.parametrize(
    ("adversarial", "update", "passes"),
    # Forward 2; 4 for the discriminators' own gradients in every second update; 1 for the generator's after warm-up.
    [(False, 0, 0), (True, 0, 2 + 4), (True, 1, 0), (True, 3, 2 + 1), (True, 4, 2 + 4 + 1)],
)
def test_operations_over_what_was_possible(adversarial, update, passes):
    """30e12 * 100 s, 1e12 * 2 + 2e12 * 30 + 4e12 * 10 + 1e10 * 900 for the text, 3e12 for each pass of the 8 crops."""
    stage = Stage("s", 10, 1.0, adversarial=adversarial, discriminator_warmup_updates=2, discriminator_every=2)
    useful = 3000e12 + 111e12 + passes * 24e12
    assert OPERATIONS.operations(CONTENT, ScheduleState(stage, update)) == useful
    use = Utilization(FitConfig(experiment_name="e", run_dir="r", trainer=BF16))
    # Another stage of the same name has its own operations.
    use.stages = [replace(OPERATIONS, codec={}), replace(OPERATIONS, stage=stage)]
    use.peak = 2 * 989.4e12  # two H100
    assert use.shares(CONTENT, ScheduleState(stage, update), seconds=4.0) == {
        "mfu": pytest.approx(useful / (4 * 2 * 989.4e12)),
        "hfu": pytest.approx((useful + 600e12) / (4 * 2 * 989.4e12)),
    }


def test_without_a_known_peak_there_is_no_share():
    use = Utilization(FitConfig(experiment_name="e", run_dir="r", trainer=BF16))
    use.start(None, torch.device("cpu"), 1)
    assert use.shares(CONTENT, ScheduleState(Stage("s", 1, 1.0), 0), 1.0) == {}


@pytest.fixture
def equal_clips() -> Batch:
    """Return clips without padding, of the length that the counting assumes, three of four with a text."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([60, 60, 60, 0])
    return Batch(
        audio=torch.randn(4, 1, 9600, generator=draw) * 0.1,
        audio_lengths=torch.full((4,), 9600),
        text_tokens=torch.randint(0, 256, (4, 60), generator=draw),
        text_lengths=lengths,
        task_ids=torch.where(lengths > 0, 0, -1),
        quantizer_uniform=torch.full((4,), 0.999),
        crop_uniform=torch.rand(4, generator=draw),
        sample_ids=tuple("abcd"),
        domains=("speech",) * 4,
    )


@pytest.mark.parametrize(
    ("update", "rates"),
    [(0, []), (4, []), (6, [100, 50])],
    ids=["reconstruction", "warm-up", "adversarial, recomputed"],
)
def test_the_count_of_the_log_is_that_of_a_real_update_by_the_counter_of_the_benchmarks(
    module, small_config, equal_clips, update, rates
):
    config = small_config(f"trainer.activation_checkpointing={rates}")
    checkpoint_activations(module.tokenizer, rates)
    with FlopCounter() as counter:
        accumulate(module, [equal_clips], update)
    schedule_state = module.schedule.at(update)
    stage = count_stages(module, config)[module.schedule.stages.index(schedule_state.stage)]
    text = {"clips_with_text": 3, "text_frames": 15, "text_tokens": 180, "text_squares": 3 * 65**2}
    content = {"audio_seconds": 1.6, "clips": 4, **text}
    # No gradient is computed for the discriminators' input in their own loss, so the count is slightly too high.
    margin = 0.02 if schedule_state.stage.adversarial else 0.01
    assert stage.operations(content, schedule_state) + 1.6 * stage.codec_cost.recomputed == pytest.approx(
        counter.total, rel=margin
    )
    assert (stage.codec_cost.recomputed > 0) == bool(rates)


def test_a_run_with_a_peak_logs_its_share_and_trains_the_same(whole, small_overrides, tmp_path, capsys):
    run, rates = tmp_path / "run", "trainer.activation_checkpointing=[100]"
    assert main(["fit", *small_overrides, f"run_dir={run}", "logging.peak_tflops=0.01", rates]) == 0
    assert values(run) == values(whole)
    assert re.search(r"audio-s/s, MFU \d+\.\d%", capsys.readouterr().err)
    rows = read_table(run / "metrics.csv")
    for row in rows:
        mfu, seconds, audio = (float(row[name]) for name in ("mfu", "update_seconds", "audio_seconds"))
        assert 20e6 < mfu * seconds * 0.01e12 / audio < 2e9  # operations per audio-second
        assert float(row["hfu"]) > mfu
    assert column(read_table(whole / "metrics.csv"), "mfu") == []
    assert measured_share(run) == median(column(rows, "hfu"))
    with pytest.raises(UserError, match=r"its metrics\.csv has no hfu"):
        measured_share(whole)
    with pytest.raises(UserError, match="neither a number nor a run directory"):
        measured_share(tmp_path / "none")


def test_the_progress_line_shows_the_share_where_there_is_one(capsys):
    writer = ProgressWriter(10, line_seconds=0.0)
    writer.start(0)
    row = {"stage": "s", "audio_seconds_per_second": 1170.0}
    writer.write("metrics", {**row, "update": 1})
    writer.write("metrics", {**row, "update": 2, "mfu": 0.4321})
    writer.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "audio-s/s" in line]
    assert lines[0].endswith("rec nan, 1170 audio-s/s")
    assert lines[1].endswith("rec nan, 1170 audio-s/s, MFU 43.2%")


def test_without_a_terminal_a_line_comes_every_minute_and_after_ten_every_ten(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    writer = ProgressWriter(7200)
    writer.start(0)
    for update in range(1, 2401):  # one every 2 s
        now = 2.0 * update
        writer.write("metrics", {"stage": "s", "audio_seconds_per_second": 1.0, "update": update})
    writer.close()
    updates = [int(line.split("/")[0].split()[-1]) for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert updates == [*range(30, 301, 30), 600, 900, 1200, 1500, 1800, 2100, 2400]
