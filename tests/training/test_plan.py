import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "cat_1b6"


def test_the_plan_is_what_its_script_computes():
    done = subprocess.run([sys.executable, RECIPE / "plan.py"], check=True, capture_output=True, text=True)
    assert done.stdout == (RECIPE / "README.md").read_text()
