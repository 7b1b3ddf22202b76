"""Write tests/public_api.txt: every name that users of the package may rely on.

    python tools/list_public_api.py            # a test compares the file with this script's output

The list holds public Python names with their parameters, the commands and their configuration keys, and the columns of
the tables that `fit` and `evaluate` write. `<domain>`, `<level>` and `<levels>` stand for names and numbers of the run.
If a line disappears or changes, programs that use it break: record it in .github/CHANGELOG.md.
"""

import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # use this tree, even if another is installed

import moss_train
from moss_train.cli.help import find_commands
from moss_train.config.fit_schema import FitConfig
from moss_train.config.overrides import dotted_keys
from moss_train.config.schema import COMMANDS, EvaluationMetric
from moss_train.evaluation.metrics.base import columns_of
from moss_train.evaluation.metrics.codes import CodebookUsage, codebook_columns
from moss_train.evaluation.metrics.registry import build_metrics
from moss_train.evaluation.report.tables import Table, codebook_csv, comma_separated
from moss_train.evaluation.results import ClipRow
from moss_train.training.callbacks.metrics import metric_columns
from moss_train.training.callbacks.validation import ValidationPlan
from moss_train.training.callbacks.validation_data import HeldOutClip
from moss_train.training.step.objective import Objective

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests/public_api.txt"
WITH_METHODS = ("MossAudioTokenizerModel", "MossAudioTokenizerConfig")
METRICS = tuple(name for name in get_args(EvaluationMetric) if name != "text_model")


def public_api() -> str:
    """Return the whole list."""
    parts = {
        "Python": [*exported_names(), *names_of_the_guides()],
        "Commands": sorted(find_commands()),
        "Configuration keys": list(configuration_keys()),
        "Columns of metrics.csv": metric_columns(Objective(24_000)),
        "Columns of validation.csv": [placeholders(name) for name in validation_columns()],
        "Columns of codebooks.csv": [placeholders(name) for name in codebook_columns(1)],
        "Columns of audio_hours.csv": ["update", "<domain>"],
        "Columns of table.csv of evaluate": evaluation_columns(),
        "Columns of codebook.csv of evaluate": codebook_csv([CodebookUsage(1, 2, 3, *[0.5] * 6)])
        .splitlines()[0]
        .split(","),
        "Keys of per_clip.jsonl of evaluate": [field.name for field in fields(ClipRow)],
    }
    return "\n".join("\n".join([f"## {title}", *lines, ""]) for title, lines in parts.items())


def exported_names() -> Iterator[str]:
    """Yield the public names of the package, its modules and its sub-packages, with their parameters."""
    packages = [item.name for item in pkgutil.walk_packages(moss_train.__path__, "moss_train.") if item.ispkg]
    modules = [f"moss_train.{item.name}" for item in pkgutil.iter_modules(moss_train.__path__) if not item.ispkg]
    for name in ["moss_train", *sorted([*packages, *modules])]:
        if name == "moss_train.__main__":
            continue
        home = importlib.import_module(name)
        for public in sorted(getattr(home, "__all__", own_names(home) if name in modules else ())):
            value = getattr(home, public)
            yield f"{name}.{public}{parameters(value)}"
            if name == "moss_train" and public in WITH_METHODS:
                yield from (f"{name}.{public}.{method}" for method in methods(value))


def own_names(module: ModuleType) -> list[str]:
    """Return the classes and functions that a module defines."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


def names_of_the_guides() -> Iterator[str]:
    """Yield the names that the documentation imports from modules without exports of their own."""
    found = set()
    for page in [ROOT / "README.md", *ROOT.glob("recipes/**/*.md")]:
        for module, names in re.findall(r"^from (moss_train\.[\w.]+) import ([\w, ]+)$", page.read_text("utf-8"), re.M):
            found |= {(module, name.strip()) for name in names.split(",")}
    for module, name in sorted(found):
        home = importlib.import_module(module)
        if name not in getattr(home, "__all__", ()):
            yield f"{module}.{name}{parameters(getattr(home, name))}"


def parameters(value: Any) -> str:
    """Return the parameters of a function or class with their defaults, or nothing for other values."""
    if not callable(value):
        return ""
    signature = inspect.signature(value)
    plain = [entry.replace(annotation=inspect.Parameter.empty) for entry in signature.parameters.values()]
    text = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text).replace("<factory>", "...")


def methods(kind: type) -> Iterator[str]:
    """Yield the public methods and properties defined by a class and its bases inside the package."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("moss_train.")]
    for name in sorted({name for base in own for name in vars(base) if not name.startswith("_")}):
        value = inspect.getattr_static(kind, name)
        if isinstance(value, classmethod | staticmethod) or inspect.isfunction(value):
            yield f"{name}{parameters(getattr(kind, name))}"
        elif isinstance(value, property):
            yield name


def configuration_keys() -> Iterator[str]:
    """Yield every key of every command; keys of `fit` are also keys of `estimate` and are not repeated there."""
    inherited = set(dotted_keys(FitConfig))
    for command, schema in COMMANDS.items():
        keys = [key for key in dotted_keys(schema) if not key.endswith(".0")]
        yield from (f"{command} {key}" for key in keys if command != "estimate" or key not in inherited)


def validation_columns() -> tuple[str, ...]:
    """Return the columns of a validation on one domain and one number of levels, with text and a custom metric."""
    clip = HeldOutClip("clip", "<domain>", torch.zeros(1, 1), 1, "text", "asr")
    metric = SimpleNamespace(columns=[SimpleNamespace(key="<metric>", is_higher_better=True)])
    return ValidationPlan([clip], (1,), 1, {"metric": metric}, 1).columns  # type: ignore[dict-item]


def placeholders(column: str) -> str:
    """Return a column name with a placeholder for its number: of levels, or of a single codebook."""
    name = "<level>" if column.startswith(("usage/", "perplexity/")) else "<levels>"
    return re.sub(r"/1$", f"/{name}", column)


def evaluation_columns() -> list[str]:
    """Return the columns of an evaluation with every metric of `evaluate`."""
    columns = columns_of(build_metrics(METRICS))
    header = comma_separated(Table("", columns, ())).splitlines()[0].split(",")
    return [name for name in header if not name.endswith(("_low", "_high", "_clips"))] + [
        "<column>_low",
        "<column>_high",
        "<column>_clips",
    ]


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    LIST.write_text(public_api(), "utf-8")
