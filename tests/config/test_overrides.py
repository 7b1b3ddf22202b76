"""Values from the command line are parsed according to the type of their key."""

from typing import Any

import pytest

from moss_train.config.overrides import read_value

NESTED = "[{name: a, updates: 3, weights: {adversarial: 40, feature: 160}}, {name: 2024, train: [decoder]}]"


def test_a_mapping_inside_a_mapping_of_a_list_is_read_whole():
    assert read_value(list[dict[str, Any]], NESTED) == [
        {"name": "a", "updates": 3, "weights": {"adversarial": 40, "feature": 160}},
        {"name": 2024, "train": ["decoder"]},
    ]


def test_text_stays_what_was_typed():
    assert read_value(str, "2024_11") == "2024_11"
    assert read_value(str | None, "2025") == "2025"
    assert read_value(list[str], "2024") == ["2024"]
    assert read_value(int, "12") == 12


def test_an_open_bracket_is_refused():
    with pytest.raises(ValueError, match="missing"):
        read_value(list[dict[str, Any]], "[{name: a, weights: {feature: 1}]")
