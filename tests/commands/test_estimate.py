import json
import re
from pathlib import Path

import pytest
from transformers import Qwen2Config

from moss_train import load_config
from moss_train.cli.main import main
from moss_train.commands.estimate import in_days
from moss_train.config.fit_schema import DataConfig, EstimateConfig, TrainerConfig
from moss_train.training.cost.estimate import read_scaling_law, seconds_of_step
from moss_train.training.cost.flops import Cost, discriminators_cost, layers_cost, semantic_cost, tokenizer_costs
from moss_train.training.cost.hardware import StateSize
from moss_train.training.run.warm_start import plan_initialization
from moss_train.training.step.schedule import Stage

TINY = ["estimate", "experiment=cat_tiny", "trainer.precision=bf16-mixed", "gpus=1"]


@pytest.fixture(scope="module")
def published() -> dict:
    return load_config("fit", ["experiment=cat_1b6"])


def test_operations_of_the_published_model_are_those_of_the_arithmetic(published):
    """Blocks, both sides, at 10 s: 90.9 dense + 5.1 causal attention forward; 290 with gradients, per audio-second."""
    config = plan_initialization(published).tokenizer_config
    costs = tokenizer_costs(config, 10.0, half=True, learning=("encoder", "quantizer", "decoder"))
    assert sum(cost.forward for cost in costs.values()) / 1e9 == pytest.approx(96.4, rel=0.002)
    assert sum(cost.total for cost in costs.values()) / 1e9 == pytest.approx(290.0, rel=0.005)
    # The usual estimate is 34 d bytes per token and layer, 144 MB here; a float32 residual stream takes more.
    assert 144 < sum(cost.activation_bytes for cost in costs.values()) / 1e6 < 220
    # A frozen encoder costs only its forward pass; the decoder passes no gradients to it.
    frozen = tokenizer_costs(config, 10.0, half=True, learning=("decoder",))
    assert frozen["encoder"].backward == 0
    assert frozen["decoder"].total == pytest.approx(costs["decoder"].total, rel=0.001)


def test_checkpointed_layers_keep_their_inputs_and_are_computed_again():
    """Twelve layers, each storing 100 bytes for an input of 8: twelve inputs and one recomputed layer are kept."""
    one = Cost(forward=10, backward=20, activation_bytes=100)
    assert layers_cost(one, 12, 8, recomputes=False) == Cost(120, 240, activation_bytes=1200, checkpointed_bytes=196)
    again = Cost(120, 240, activation_bytes=196, checkpointed_bytes=196, checkpointing_savings=1004, recomputed=120)
    assert layers_cost(one, 12, 8, recomputes=True) == again
    frozen = Cost(forward=10, backward=0, activation_bytes=0)
    assert layers_cost(frozen, 12, 8, recomputes=True) == Cost(120)


def test_the_text_lm_keeps_its_activations_where_all_layers_of_the_tokenizer_are_checkpointed():
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    node = {
        "_target_": "moss_train.semantic.TextLM",
        "text": {"_target_": "moss_train.semantic.ByteText"},
        "config": config,
    }
    cost = semantic_cost(node, latent_dim=8, frames=5, tokens=4, half=False)
    assert cost.checkpointed_bytes == cost.activation_bytes > 0
    assert cost.recomputed == cost.checkpointing_savings == 0


def test_recomputing_the_stages_of_high_rates_costs_their_forward_pass(published):
    """Blocks of 12 layers of width 768 at 100 and 50 Hz, on both sides: 24 d^2 per frame, plus causal attention."""
    config = plan_initialization(published).tokenizer_config
    parts = ("encoder", "quantizer", "decoder")
    costs = [sum(tokenizer_costs(config, 0.96, True, parts, rates).values(), Cost()) for rates in ([], [100, 50])]
    dense = 24 * 768**2 * (96 + 48)
    causal = 4 * 768 * (96 * 97 + 48 * 49) / 2
    assert costs[1].recomputed == pytest.approx(2 * 12 * (dense + causal) / 0.96)
    assert costs[1].total == costs[0].total
    assert costs[1].activation_bytes + costs[1].checkpointing_savings == pytest.approx(costs[0].activation_bytes)
    everything = sum(tokenizer_costs(config, 0.96, True, parts, [100, 50, 25, 12.5]).values(), Cost())
    assert (
        everything.activation_bytes
        == everything.checkpointed_bytes
        == costs[0].checkpointed_bytes
        < costs[1].activation_bytes
    )
    assert everything.recomputed == pytest.approx(costs[0].forward, rel=0.01)  # everything except the projections


def test_activation_checkpointing_takes_longer_and_less_memory(capsys):
    texts = []
    for overrides in ([], ["trainer.activation_checkpointing=[100,50]"]):
        assert main([*TINY, "stages.1.batch_seconds=1e5", *overrides]) == 0  # where steps take no time
        texts.append(capsys.readouterr().out)
    assert "activation_checkpointing" not in texts[0]
    saved = float(re.search(r"saves ([\d.]+) MB per second", texts[1])[1])
    kept = [float(re.search(r"activations: ([\d.]+) MB", text)[1]) for text in texts]
    assert kept[0] - kept[1] == pytest.approx(saved, abs=0.11)
    longer = float(re.search(r"quantized \+([\d.]+)%", texts[1])[1])
    rates = [rate_of(text, "quantized") for text in texts]
    assert rates[0] / rates[1] == pytest.approx(1 + longer / 100, rel=0.001)
    assert operations(texts[0], "quantized") == operations(texts[1], "quantized")


def test_sharded_memory_is_shown_where_there_is_something_to_divide(capsys):
    assert main(TINY) == 0
    alone = capsys.readouterr().out
    assert "FSDP" not in alone
    assert "1 GPU: data.micro_batch_seconds=12 fits" in alone
    assert main([*TINY[:-1], "gpus=4"]) == 0
    text = capsys.readouterr().out
    whole, quarter = map(float, re.search(r"│ AdamW moments +│ ([\d.]+) +│ ([\d.]+)", text).groups())
    assert 0 < quarter < whole == float(re.search(r"│ AdamW moments +│ ([\d.]+)", alone)[1])
    assert "FSDP over 4: data.micro_batch_seconds=12 fits" in text


def write_scaling(path: Path, exponent: float = -0.1, most: float = 1e16) -> Path:
    """Write a file as tools/scaling.py does."""
    law = {"coefficient": 100.0, "exponent": exponent, "r_squared": 0.98}
    points = [{"scale": 0.5, "flops": 1e15, "mel_distance": 3.2}, {"scale": 1.0, "flops": most, "mel_distance": 2.5}]
    record = {"experiment": "cat_small", "device": "NVIDIA H100 80GB HBM3", "points": points, "law": law}
    path.write_text(json.dumps(record))
    return path


def test_a_measured_scaling_law_predicts_the_distance_and_says_how_far_it_reaches(tmp_path, capsys):
    law = read_scaling_law(write_scaling(tmp_path / "scaling.json"))
    assert law.distance(1e20) == pytest.approx(1.0)  # 100 * 10^-2
    assert law.distance(1e15) == pytest.approx(10**0.5)
    assert law.describe_range(5e15) == "inside the measured range"
    assert law.describe_range(5e14) == "below the measured range"
    assert law.describe_range(5e16) == "5 times the largest measured compute"
    assert law.describe_range(1e20).startswith("1e+04 times the largest measured compute: a far extrapolation")
    assert "predicts nothing" in read_scaling_law(write_scaling(tmp_path / "rising.json", exponent=0.1)).describe_range(
        1e15
    )
    assert main([*TINY, f"scaling={tmp_path / 'scaling.json'}"]) == 0
    text = capsys.readouterr().out
    assert "scaling law of 2 runs (cat_small, NVIDIA H100 80GB HBM3)" in text
    lines = re.findall(r"(\d+)% of the compute, ([\d.e+]+) FLOP, .*: mel distance ([\d.]+) \(", text)
    assert [line[0] for line in lines] == ["1", "10", "100"]
    for _, flops, distance in lines:
        assert float(distance) == pytest.approx(100 * float(flops) ** -0.1, rel=0.002)
    # All audio of both stages, times the operations per second of audio in each.
    config = load_config("fit", ["experiment=cat_tiny"])
    whole = sum(s.updates * s.batch_seconds * 1e9 * operations(text, s.name) for s in config.stages)
    assert float(lines[-1][1]) == pytest.approx(whole, rel=0.005)


@pytest.mark.parametrize("content", ["", "[]", '{"points": []}', '{"law": {}, "points": [{"flops": 1}]}'])
def test_another_file_than_that_of_a_scaling_law_is_one_line(tmp_path, error_line, content):
    path = tmp_path / "scaling.json"
    path.write_text(content)
    assert f"scaling={path} is not a scaling.json of tools/scaling.py" in error_line([*TINY, f"scaling={path}"])


def test_a_measured_share_replaces_the_assumed_one(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("update,mfu,hfu\n1,0.1,0.12\n2,0.3,0.36\n3,0.4,0.48\n4,,\n")
    assert main([*TINY, f"mfu={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert f"mfu=0.36 (measured: {tmp_path}) of 989.4 TFLOP/s" in text
    assert rate_of(text, "quantized") == pytest.approx(expected_rate(text, 0.36), rel=0.01)
    assert main([*TINY, f"mfu={tmp_path / 'none'}"]) == 2
    assert "neither a number nor a run directory" in capsys.readouterr().err


def rate_of(text: str, stage: str) -> float:
    """Return the printed audio-seconds per second of a stage."""
    line = next(line for line in text.splitlines() if re.match(rf"│ {stage} +│ [\d,]+ ", line))
    return float(line.split("│")[6].replace(",", ""))


def expected_rate(text: str, mfu: float) -> float:
    """Return the audio-seconds per second of the first stage of `cat_tiny` on one H100, from the printed operations."""
    sizes = re.findall(r"│ (?:tokenizer|text LM)\s+│ ([\d,]+)", text)
    stepping = 50 * sum(int(size.replace(",", "")) for size in sizes) / 3.35e12
    computing = 5.76 * operations(text, "quantized") * 1e9 / (mfu * 989.4e12)
    return 5.76 / (computing + stepping)


def eight_gpus(trainer: TrainerConfig, micro_batch_seconds: float = 160.0) -> EstimateConfig:
    """Return an estimate for eight H100 that sum gradients at 300 GB/s."""
    data = DataConfig(crop_seconds=1.0, micro_batch_seconds=micro_batch_seconds)
    machines = {"gpu": "h100", "gpus": 8, "allreduce_gb_per_second": 300.0}
    return EstimateConfig(experiment_name="e", run_dir="r", trainer=trainer, data=data, **machines)


def test_sums_over_gpus_take_longer_the_more_there_are_and_half_in_bf16():
    """2 (n - 1) / n of the gradients of tokenizer and text LM at 300 GB/s, and 50 bytes of memory per parameter."""
    size = StateSize(1_700_000_000, 300_000_000, 40_000_000)
    step = 50 * 2.0e9 / 3.35e12

    def seconds(gpus: int, sent: str, **options: bool) -> float:
        config = eight_gpus(TrainerConfig(reduce_dtype=sent)).replace(gpus=gpus)
        return seconds_of_step(Stage("s", 10, 60.0, **options), config, size)

    assert seconds(1, "fp32") == pytest.approx(step)
    assert seconds(1, "fp32", adversarial=True) == pytest.approx(step * 2.04 / 2.0)
    assert seconds(8, "fp32") == pytest.approx(step + 2 * 7 / 8 * 8.0e9 / 300e9)
    assert seconds(64, "fp32") == pytest.approx(step + 2 * 63 / 64 * 8.0e9 / 300e9)
    assert seconds(64, "bf16") == pytest.approx(step + 2 * 63 / 64 * 4.0e9 / 300e9)


def test_the_last_backward_pass_hides_sums_but_for_its_last_bucket():
    size, config = StateSize(1_700_000_000, 300_000_000, 40_000_000), eight_gpus(TrainerConfig(), micro_batch_seconds=4)
    step, sums = 50 * 2.0e9 / 3.35e12, 2 * 7 / 8 * 8.0e9 / 300e9

    def seconds(pass_seconds: float) -> float:
        return seconds_of_step(Stage("s", 10, 60.0), config, size, 2 * pass_seconds)  # 7.5 s in two passes

    assert seconds(0.03) == pytest.approx(step + sums - 0.02)
    assert seconds(1.0) == pytest.approx(step + sums * 64 * 2**20 / 8.0e9)


def test_sharded_networks_are_gathered_and_summed_in_every_pass():
    size = StateSize(1_700_000_000, 300_000_000, 40_000_000)
    config = eight_gpus(TrainerConfig(strategy="fsdp", precision="bf16-mixed"), micro_batch_seconds=2.5)  # three passes
    step, sent = 50 * 2.0e9 / 8 / 3.35e12, 7 / 8 * 2.0e9 * (2 * 2 + 4) / 300e9
    stage = Stage("s", 10, 60.0)
    assert seconds_of_step(stage, config, size, 3 * 0.01) == pytest.approx(step + 3 * (sent - 0.01))
    assert seconds_of_step(stage, config, size, 3 * 1.0) == pytest.approx(step)


def test_operations_of_the_discriminators(published):
    """In the forward pass at 24 kHz: 26.8 for the five periods and 7.9 for the three resolutions."""
    cost = discriminators_cost(published.discriminators, 1, 24000, half=True)
    assert cost.forward / 1e9 == pytest.approx(34.7, rel=0.01)


def test_the_report_adds_up_and_names_its_assumptions(capsys):
    assert main(TINY) == 0
    text = capsys.readouterr().out
    assert "5,440,128" in text
    assert "mfu=0.3 (a model, not a measurement: tools/model_gpu.py) of 989.4 TFLOP/s (h100, dense bf16" in text
    assert rate_of(text, "quantized") == pytest.approx(expected_rate(text, 0.3), rel=0.01)
    networks = re.findall(r"│ (?:tokenizer|text LM|discriminators)\s+│ ([\d,]+)", text)
    total = sum(int(number.replace(",", "")) for number in networks)
    assert f"checkpoint: {12 * total / 1e9:.1f} GB" in text
    assert "updates of less than 0.1 s wait for the CPU" in text


def test_days_keep_two_digits():
    assert [in_days(days) for days in (1234.56, 9.13, 0.2047, 0.0074)] == ["1,234.6", "9.1", "0.2", "0.0074"]


def operations(text: str, stage: str) -> float:
    """Return the printed GFLOP per audio-second of a whole stage."""
    line = next(line for line in text.splitlines() if f"{stage}: all" in line)
    return float(line.split("│")[4].replace(",", ""))


def test_without_text_there_is_no_text_lm(capsys):
    assert main([*TINY, "semantic=null"]) == 0
    assert "quantized: text LM" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [("gpu=h900", "gpu=h900 has to be one of h100, "), ("mfu=1.5", "mfu=1.5 has to be"), ("gpus=0", "gpus=0")],
)
def test_impossible_machines_are_one_line(capsys, override, message):
    assert main([*TINY[:2], override]) == 2
    assert message in capsys.readouterr().err


def test_a_pretrained_text_lm_is_counted_from_its_configuration_alone(capsys, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 259}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    Qwen2Config(**sizes, **heads).save_pretrained(tmp_path)
    counted = []
    for overrides in (
        ["semantic.config.vocab_size=259"],
        [f"semantic.pretrained={tmp_path}", "semantic.config=null"],
    ):
        assert main([*TINY, *("+" * ("vocab_size" in o) + o for o in overrides)]) == 0
        counted.append(capsys.readouterr().out)
    assert counted[0] == counted[1]


def test_a_pretrained_text_lm_that_is_not_there_is_one_line(error_line, tmp_path):
    assert "none: no folder with a config.json" in error_line(
        [*TINY, f"semantic.pretrained={tmp_path / 'none'}", "semantic.config=null"]
    )
