"""Values from the command line are parsed according to the type of their key."""

from typing import Any

import pytest

from moss_train.cli.compose import load_config
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


@pytest.mark.parametrize("name", ["a, b", "a: b", "a}b", "a]b"])
def test_text_in_quotes_may_hold_what_separates_entries(name):
    stage = f'stages=[{{name: "{name}", updates: 1, batch_seconds: 5}}]'
    config = load_config("fit", ["experiment=cat_tiny", "discriminators=[]", stage])
    assert [stage.name for stage in config.stages] == [name]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["data.train=a", "data.train=b"], ["a", "b"]),
        (["data.train=a", "data.train=b", "data.train=[c]"], ["c"]),
        (["data.train=a", "data.train=[b]", "data.train=c", "data.train=d"], ["c", "d"]),
        (["data.train=a", "~data.train", "data.train=b"], ["b"]),
    ],
)
def test_a_list_typed_after_others_replaces_them(typed, expected):
    assert load_config("fit", ["experiment=cat_tiny", *typed]).data.train == expected
