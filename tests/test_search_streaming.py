"""The random search for codes that streaming changes, run for a few models, and that it would notice one."""

import importlib.util
import random
import re
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[1] / "tools" / "search_streaming.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("search_streaming", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["search_streaming"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("models", [2, pytest.param(6, marks=pytest.mark.nightly)])
def test_streaming_changes_no_code(models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--models", str(models)])
    assert load_tool().main() == 0
    printed = capsys.readouterr().out
    counts = re.search(rf"{models} models, (\d+) codes: (\d+) ties .*, (\d+) errors", printed)
    codes, ties, errors = map(int, counts.groups())
    assert codes > 8_000 * models
    assert (ties, errors) == (0, 0)


def test_a_changed_code_is_an_error_and_only_the_first_of_a_frame_counts():
    tool = load_tool()
    model = tool.random_model(random.Random(3))
    encoded = model.encode(torch.randn(1, 1, 40 * model.config.downsample_rate))
    hidden, expected = encoded.encoder_hidden_states, encoded.audio_codes
    changed = expected.clone()
    changed[1:, 0, 7] = (changed[1:, 0, 7] + 1) % model.config.quantizer_kwargs["codebook_size"]
    assert tool.compare_codes(model, hidden, expected, expected) == (0, 0)
    assert tool.compare_codes(model, hidden, changed, expected) == (0, 1)
    assert not tool.Counts(codes=10**6, errors=1).passed
    assert not tool.Counts(codes=10**6, ties=11).passed
    assert tool.Counts(codes=10**6, ties=10).passed
