"""The committed figures equal those that the code draws."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("draw_figures", ROOT / "tools" / "draw_figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_figures_are_current(figures):
    guides = ROOT / "recipes" / "guides"
    assert (guides / "architecture.svg").read_text("utf-8") == figures.draw_architecture("cat_1b6")
    assert (guides / "batch.svg").read_text("utf-8") == figures.draw_batch()


def test_a_name_that_is_gone_ends_the_script(figures):
    figures.check_name("training.module.CatModule.training_step")
    with pytest.raises(AttributeError):
        figures.check_name("training.module.CatModule.no_such_method")
