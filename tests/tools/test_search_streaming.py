"""The random search for codes that streaming changes: it passes on a few models and detects an injected error."""

import random
import re
import sys

import pytest
import torch

from tools import search_streaming as tool


@pytest.mark.parametrize("models", [2, pytest.param(6, marks=pytest.mark.nightly)])
def test_streaming_changes_no_code(models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["search_streaming.py", "--models", str(models)])
    assert tool.main() == 0
    printed = capsys.readouterr().out
    counts = re.search(rf"{models} models, (\d+) codes: (\d+) ties .*, (\d+) errors", printed)
    codes, ties, errors = map(int, counts.groups())
    assert codes > 8_000 * models
    assert (ties, errors) == (0, 0)


def test_a_changed_code_is_an_error_and_only_the_first_of_a_frame_counts():
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
