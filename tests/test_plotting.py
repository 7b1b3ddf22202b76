"""Figures with arbitrary names as titles: no warnings, no parsing as formulas, no missing glyphs."""

import io
import warnings

import pytest
import torch

from moss_train.plotting import drawable, save_spectrograms


@pytest.mark.parametrize(
    "title", ["录音 001", "おはよう", "tab\there", "a$b_c$d", "\N{GRINNING FACE} \x00", "$x^{", ""]
)
def test_any_title_is_drawn_without_a_warning(title: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_spectrograms({title or "x": torch.zeros(1, 4000)}, 24000, io.BytesIO(), title=title)


def test_what_no_font_has_is_escaped() -> None:
    assert drawable("line\nbreak\tand tab") == "line break and tab"
    assert drawable("\U0010fffd") == "\\U0010fffd"
    assert drawable("Müller, $5") == "Müller, \\$5"
