"""The layers of the package and their allowed dependencies, read from the import statements of every file."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parents[1] / "moss_train"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    0: {"batch", "audio", "config", "utils"},
    1: {"model", "discriminators", "losses", "semantic", "plotting"},
    2: {"data", "evaluation", "export"},
    3: {"training", "inference"},
    4: {"cli", "__main__", "commands"},
}
LAYER_OF = {package: layer for layer, packages in LAYERS.items() for package in packages}

FENCES = {
    "hydra": {"cli"},
    "lightning": {"training"},
    "pytorch_lightning": {"training"},
    "wandb": {"training"},
    # In evaluation, only imported when used: classes of other codecs and of the networks behind two metrics.
    # In utils, only to read a configuration before its model is loaded.
    "transformers": {
        "model",
        "semantic",
        "utils/hub.py",
        "export/verify.py",
        "evaluation/metrics/speaker.py",
        "evaluation/metrics/asr.py",
    },
    "webdataset": {"data"},
    "soundfile": {"audio", "data"},
    "auraloss": {"losses", "evaluation"},
    "pesq": {"evaluation"},
    "pystoi": {"evaluation"},
    "matplotlib": {"evaluation", "plotting"},
    "faster_whisper": {"evaluation"},
    "speechmos": {"evaluation"},
    # Both are extras: onnx_graph is imported when a graph is written, and the runtime imports onnxruntime on use.
    "onnx": {"export/onnx_graph.py", "export/onnx.py"},
    "onnxruntime": {"export/onnx_runtime.py"},
}
EXTRAS = {"matplotlib", "pystoi", "pesq", "faster_whisper", "speechmos"}
# Only checks whether a package can be imported, and its version.
ENVIRONMENT_CHECK = "commands/doctor.py"
MODEL_IMPORTS = {"torch", "transformers"} | set(sys.stdlib_module_names)


@dataclass(frozen=True)
class Import:
    """An imported module, and whether it is imported together with the file."""

    module: str
    line: int
    at_import: bool
    relative: bool


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    return tuple(iterate_imports(path))


def iterate_imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text("utf-8"))
    later = (block for block in ast.walk(tree) if isinstance(block, ast.FunctionDef) or is_for_type_checking(block))
    inner = {id(node) for block in later for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, id(node) not in inner, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = f"{absolute(path, node)}.{alias.name}"
                yield Import(module, node.lineno, id(node) not in inner, node.level > 0)


def is_for_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def absolute(path: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = ["moss_train", *path.relative_to(PACKAGE).parts[: -node.level]]
    return ".".join([*package, *([node.module] if node.module else [])])


def package_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def found(path: Path, entry: Import) -> str:
    return f"{name(path)}:{entry.line} imports {entry.module}"


def goes_up(package: str, module: str) -> bool:
    """Tell whether a module is in a higher layer than a package, or in another package of the same layer."""
    parts = module.split(".")
    if parts[0] != "moss_train" or len(parts) < 2 or parts[1] == package or parts[1] not in LAYER_OF:
        return False
    same_top = LAYER_OF[package] == LAYER_OF[parts[1]] in (0, 4)
    return not (LAYER_OF[parts[1]] < LAYER_OF[package] or same_top)


def test_imports_go_down_or_stay_in_the_room():
    files = [path for path in FILES if package_of(path) != "__init__"]  # without the public interface
    assert {package_of(path) for path in files} == LAYER_OF.keys()
    assert [found(path, e) for path in files for e in imports_of(path) if goes_up(package_of(path), e.module)] == []


def test_third_party_packages_stay_behind_their_fences():
    offenders = []
    for path in (path for path in FILES if name(path) != ENVIRONMENT_CHECK):
        for entry in imports_of(path):
            allowed = FENCES.get(entry.module.split(".")[0])
            if allowed is not None and not {package_of(path), name(path)} & allowed:
                offenders.append(found(path, entry))
    assert offenders == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").rglob("*.py")), ids=name)
def test_the_model_runs_where_the_package_is_not_installed(path):
    for entry in imports_of(path):
        top = entry.module.split(".")[0]
        if entry.relative:
            assert entry.module.startswith("moss_train.model."), f"{name(path)}:{entry.line} leaves the folder"
        else:
            assert top in MODEL_IMPORTS, f"{name(path)}:{entry.line} imports {entry.module}"


def siblings(path: Path) -> set[str]:
    """Return the files of the model folder that one of them imports, including under TYPE_CHECKING."""
    return {entry.module.split(".")[2] for entry in imports_of(path) if entry.relative}


def test_the_modelling_file_imports_every_file_that_ships():
    """Several releases of transformers copy only the files that the model file itself imports."""
    for path in (PACKAGE / "model").glob("*_moss_audio_tokenizer.py"):
        reached = {path.stem}
        while more := {s for stem in reached for s in siblings(PACKAGE / "model" / f"{stem}.py")} - reached:
            reached |= more
        assert siblings(path) == reached - {path.stem}, f"{name(path)} does not import all that it needs"
    assert siblings(PACKAGE / "model" / "modeling_moss_audio_tokenizer.py") == {
        path.stem
        for path in (PACKAGE / "model").glob("*.py")
        if not path.stem.startswith(("__init__", "modeling", "feature_extraction"))
    }


def test_extras_are_imported_only_when_used():
    imports = [(path, entry) for path in FILES for entry in imports_of(path) if entry.at_import]
    assert [found(path, entry) for path, entry in imports if entry.module.split(".")[0] in EXTRAS] == []


def test_the_package_has_no_circular_imports():
    """Wherever the import is: at the top, in a function or under TYPE_CHECKING."""
    files = {module_name(path): path for path in FILES}
    graph = {
        name: {target for entry in imports_of(path) for target in known_modules(entry.module, files)} - {name}
        for name, path in files.items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_sub_packages_depend_on_each_other_in_one_direction():
    """A folder of a package, or a file beside the folders, may depend on another one, but never in both directions."""
    files = {module_name(path): path for path in FILES if len(path.relative_to(PACKAGE).parts) > 1}
    part = {name: ".".join(name.split(".")[:3]) for name in files if not files[name].name.startswith("__init__")}
    graph: dict[str, set[str]] = {}
    for name, place in part.items():
        targets = {
            part[t] for entry in imports_of(files[name]) for t in known_modules(entry.module, files) if t in part
        }
        graph.setdefault(place, set()).update(targets - {place})
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def known_modules(imported: str, files: dict[str, Path]) -> set[str]:
    """Return the module that an imported name is, or belongs to."""
    return {next((name for name in (imported, imported.rpartition(".")[0]) if name in files), imported)} & files.keys()


def test_the_fence_reader_sees_every_form(tmp_path):
    file = PACKAGE / "model" / "example.py"
    node = ast.parse("from ..losses import mel").body[0]
    assert isinstance(node, ast.ImportFrom)
    assert absolute(file, node) == "moss_train.losses"
    source = tmp_path / "source.py"
    source.write_text("import a.b\nfrom c import d\ndef f():\n    import e\n")
    assert [(entry.module, entry.at_import) for entry in imports_of(source)] == [
        ("a.b", True),
        ("c.d", True),
        ("e", False),
    ]


SIDE_EFFECTS = """
import importlib, json, logging, os, random, sys, threading, warnings
import numpy, torch, torch.utils.data, torchaudio.functional, transformers
import hydra, lightning, rich.console, soundfile, webdataset
def state():
    return {
        "threads": [torch.get_num_threads(), threading.active_count()],
        "handlers": len(logging.getLogger().handlers),
        "level": logging.getLogger().level,
        "torch random": torch.get_rng_state().sum().item(),
        "random": hash(random.getstate()),
        "numpy random": int(numpy.random.get_state()[1].sum()),
        "environment": sorted(os.environ.items()),
        "folder": os.getcwd(),
        "dtype": str(torch.get_default_dtype()),
        "matmul": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cuda": torch.cuda.is_initialized(),
        "hook": sys.excepthook is sys.__excepthook__,
    }
before, failed = state(), {}
for module in json.loads(sys.argv[1]):
    try:
        importlib.import_module(module)
    except Exception as error:
        failed[module] = repr(error)
after = state()
print(json.dumps({"changed": {k: [before[k], after[k]] for k in before if before[k] != after[k]}, "failed": failed}))
"""


def module_name(path: Path) -> str:
    parts = ("moss_train", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


@pytest.mark.processes
def test_importing_every_module_changes_nothing(tmp_path):
    modules = [module_name(path) for path in FILES if path.name != "__main__.py"]
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    command = [sys.executable, "-c", SIDE_EFFECTS, json.dumps(modules)]
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "", "HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"changed": {}, "failed": {}}
    assert list(work.iterdir()) == []


SCRIPTS = sorted(path for folder in ("recipes", "tools") for path in (PACKAGE.parent / folder).rglob("*.py"))


def test_every_script_imports_names_that_exist():
    missing = []
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("moss_train", "tools"):
                module = importlib.import_module(node.module or "")
                missing += [
                    f"{path}: {node.module}.{name.name}" for name in node.names if not exists(module, name.name)
                ]
    assert len(SCRIPTS) > 40
    assert missing == []


def exists(module: ModuleType, name: str) -> bool:
    is_package = hasattr(module, "__path__")
    return hasattr(module, name) or (is_package and find_spec(f"{module.__name__}.{name}") is not None)
