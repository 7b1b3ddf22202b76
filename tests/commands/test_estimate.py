import re

import pytest
from transformers import Qwen2Config

from moss_train.cli import main
from moss_train.commands._compose import compose, to_plain
from moss_train.training.costs import discriminators_cost, tokenizer_costs
from moss_train.training.initialization import plan_beginning

TINY = ["estimate", "experiment=cat_tiny", "trainer.precision=bf16-mixed", "gpus=1"]


@pytest.fixture(scope="module")
def published() -> dict:
    return to_plain(compose("fit", ["experiment=cat_1b6"]), "fit")


def test_operations_of_the_published_model_are_those_of_the_arithmetic(published):
    """Blocks, both sides, at 10 s: 90.9 dense + 5.1 causal attention forward; 290 with gradients, per audio-second."""
    config = plan_beginning(published).tokenizer_config
    costs = tokenizer_costs(config, 10.0, half=True, learning=("encoder", "quantizer", "decoder"))
    assert sum(cost.forward for cost in costs.values()) / 1e9 == pytest.approx(96.4, rel=0.002)
    assert sum(cost.total for cost in costs.values()) / 1e9 == pytest.approx(290.0, rel=0.005)
    # 34 d bytes per token and layer are the usual estimate, 144 MB here; a float32 residual stream takes more.
    assert 144 < sum(cost.kept for cost in costs.values()) / 1e6 < 220
    # A frozen encoder costs its forward; the decoder does not pass gradients on to it.
    frozen = tokenizer_costs(config, 10.0, half=True, learning=("decoder",))
    assert frozen["encoder"].backward == 0
    assert frozen["decoder"].total == pytest.approx(costs["decoder"].total, rel=0.001)


def test_operations_of_the_discriminators(published):
    """26.8 for the five periods and 7.9 for the three resolutions, forward, at 24 kHz."""
    cost = discriminators_cost(published["discriminators"], 1, 24000, half=True)
    assert cost.forward / 1e9 == pytest.approx(34.7, rel=0.01)


def test_the_report_adds_up_and_names_its_assumptions(capsys):
    assert main(TINY) == 0
    text = capsys.readouterr().out
    assert "5,440,128" in text
    assert "mfu=0.4 of 989.4 TFLOP/s (h100, dense bf16, data sheet)" in text
    printed = next(line for line in text.splitlines() if line.startswith("│ reconstruction  │") or "│ 700 " in line)
    rate = float(printed.split("│")[4].replace(",", ""))
    assert rate == pytest.approx(0.4 * 989.4e12 / (operations(text, "reconstruction") * 1e9), rel=0.01)
    networks = re.findall(r"│ (?:tokenizer|text LM|discriminators)\s+│ ([\d,]+)", text)
    total = sum(int(number.replace(",", "")) for number in networks)
    assert f"checkpoint: {12 * total / 1e9:.1f} GB" in text


def operations(text: str, stage: str) -> float:
    """GFLOP per audio-second of a whole stage, as printed."""
    line = next(line for line in text.splitlines() if f"{stage}: all" in line)
    return float(line.split("│")[4].replace(",", ""))


def test_without_text_there_is_no_text_lm(capsys):
    assert main([*TINY, "semantic=null"]) == 0
    assert "reconstruction: text LM" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [("gpu=h900", "gpu=h900 is not known"), ("mfu=1.5", "mfu=1.5 above 0 and at most 1"), ("gpus=0", "gpus=0")],
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
    assert "trainer.activation_checkpointing is not counted" in counted[1]


def test_a_pretrained_text_lm_that_is_not_there_is_one_line(capsys, tmp_path):
    assert main([*TINY, f"semantic.pretrained={tmp_path / 'none'}", "semantic.config=null"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "none: no folder with a config.json" in error
