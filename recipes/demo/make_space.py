"""Write the page, moss_train and a model into one folder that can be pushed as a Space on the Hugging Face hub.

python recipes/demo/make_space.py my-tokenizer out/space
"""

import argparse
import shutil
import sys
from pathlib import Path

import moss_train
from moss_train.export import export
from moss_train.utils.errors import UserError

HERE = Path(__file__).parent
PAGE = ("app.py", "README.md", "requirements.txt")


def make_space(model: str, out: Path) -> None:
    """Write the folder.

    Raises:
        UserError: there is no model at `model`, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists: choose another folder or delete it")
    export(model, out / "model")
    for name in PAGE:
        shutil.copyfile(HERE / name, out / name)
    package = Path(moss_train.__file__).parent
    shutil.copytree(package, out / "moss_train", ignore=shutil.ignore_patterns("__pycache__", "configs"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run, checkpoint, export folder or hub name")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    options = parser.parse_args()
    try:
        make_space(options.model, options.out)
    except UserError as error:
        sys.exit(f"make_space.py: {error}")


if __name__ == "__main__":
    main()
