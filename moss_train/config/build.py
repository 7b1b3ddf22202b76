"""Build the objects that configurations and checkpoints name by `_target_`.

Such a file may be untrusted, so names are only looked up in a list: for a name that is not listed nothing is imported
and no attribute is read. The only other names allowed are classes of packages that the user enabled in this process,
with `plugins=[my_package]` on the command line or with `allow_package` in Python.
"""

import functools
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moss_train.config.section import nearest
from moss_train.utils.errors import UserError, first_line

TARGETS = frozenset(
    {
        "moss_train.discriminators.ComplexSTFTDiscriminator",
        "moss_train.discriminators.MultiPeriodDiscriminator",
        "moss_train.discriminators.MultiResolutionSTFTDiscriminator",
        "moss_train.discriminators.PeriodDiscriminator",
        "moss_train.losses.CodebookLoss",
        "moss_train.losses.CommitmentLoss",
        "moss_train.losses.ComplexSTFTLoss",
        "moss_train.losses.FeatureMatchingLoss",
        "moss_train.losses.LeastSquaresLoss",
        "moss_train.losses.MidSideLoss",
        "moss_train.losses.MultiScaleMelLoss",
        "moss_train.losses.RelativeSquaredErrorLoss",
        "moss_train.losses.WaveformLoss",
        "moss_train.model.MossAudioTokenizerConfig.from_stages",
        "moss_train.semantic.ByteText",
        "moss_train.semantic.PretrainedText",
        "moss_train.semantic.TextLM",
        "torch.nn.GELU",
        "torch.nn.Identity",
        "torch.nn.LayerNorm",
        "torch.nn.LeakyReLU",
        "torch.nn.RMSNorm",
        "torch.nn.SiLU",
        "torch.optim.AdamW",
    }
)
"""Everything that a `_target_` may name. A new class of the project that configurations can choose is added here by
hand; it has to be safe with any plain values as arguments, because these may be untrusted."""

MAX_DEPTH = 64
"""Deepest nesting of containers; no real configuration comes near it."""

MAX_VALUES = 100_000
"""Most values at one depth; a pickle may refer to one list many times, so that a small file expands without limit."""

_SPECIAL_KEYS = frozenset({"_target_", "_partial_"})
_allowed_packages: set[str] = set()


def allow_package(name: str) -> None:
    """Import a package and let `_target_` name its classes too, in this process.

    For packages that the user names on the command line or in Python; never call it with a name from a file. Later,
    only modules that are already imported are searched, and only for classes that the package itself defines.

    Raises:
        UserError: there is no such package, it cannot be imported, or it belongs to Python or to moss_train.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"plugins: {name!r} is not the name of a Python package")
    if not _may_be_own(name):
        raise UserError(f"plugins: {name} is no package of your own, and its classes stay closed")
    try:
        importlib.import_module(name)
    except ImportError as error:
        hint = "install it, or put the folder that holds it on PYTHONPATH"
        raise UserError(f"plugins: {name} cannot be imported ({first_line(error)}): {hint}") from error
    _allowed_packages.add(name)


def build(node: Mapping[str, Any], *, path: str = "", **kwargs: Any) -> Any:
    """Build a `_target_` node and every node inside it, for configurations and for what a checkpoint stores as data.

    Args:
        node: plain mapping with `_target_` and the arguments; its interpolations have to be resolved.
        path: dotted place of the node in the configuration, for error messages only.
        kwargs: arguments that are objects (parameters, modules). They override those of the node and are passed as is.

    Returns:
        The object, or a `functools.partial` if the node has `_partial_: true`. Containers become dicts and lists.

    Raises:
        UserError: a name outside the list, an unknown or missing argument, a value that the constructor refuses.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        example = "_target_: moss_train.losses.MultiScaleMelLoss"
        raise UserError(f"{path or 'the node'} has no _target_: name the class to build, as in {example}")
    for place, value in list(iterate_values(node, path)):  # list them all first: fails if there are too many
        if isinstance(value, Mapping) and "_target_" in value:
            check_node(value, place, kwargs if value is node else None)
        elif isinstance(value, str) and "${" in value:
            raise UserError(f"{place} = {value!r} holds an interpolation: resolve the configuration before building it")
    return _construct(node, path, kwargs)


def iterate_values(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of plain data and of everything inside it, one depth after the other.

    Raises UserError for too many values, and for endlessly nested containers, on which a recursion would fail.
    """
    level = [(path, node)]
    for _ in range(MAX_DEPTH):
        yield from level
        children = (
            (f"{place}.{key}" if place else str(key), child)
            for place, value in level
            if isinstance(value, Mapping | list | tuple)
            for key, child in (value.items() if isinstance(value, Mapping) else enumerate(value))
        )
        level = list(itertools.islice(children, MAX_VALUES + 1))
        if not level:
            return
        if len(level) > MAX_VALUES:
            raise UserError(f"{_place(path)}more than {MAX_VALUES} values in one node")
    raise UserError(f"{_place(path)}more than {MAX_DEPTH} containers lie inside each other")


def resolve_target(name: Any, path: str = "") -> Callable[..., Any]:
    """Return the object with an allowed name: a class, or the one class method of `TARGETS`.

    Raises:
        UserError: the name is not allowed, or an allowed package has no such class.
    """
    if isinstance(name, str):
        if name in TARGETS:
            parts = name.split(".")
            length = next(i for i, part in enumerate(parts) if part[0].isupper())
            listed: Any = importlib.import_module(".".join(parts[:length]))
            return functools.reduce(getattr, parts[length:], listed)
        for package in (package for package in sorted(_allowed_packages) if name.startswith(f"{package}.")):
            module, _, last = name.rpartition(".")
            found = vars(sys.modules[module]).get(last) if module in sys.modules else None
            if not inspect.isclass(found):
                raise UserError(
                    f"{_place(path)}_target_ {name!r}: {package} has no such class in a module that it imports"
                )
            home = str(found.__module__)
            if home != package and not home.startswith(f"{package}."):
                raise UserError(
                    f"{_place(path)}_target_ {name!r} is not allowed: the class comes from {home}, not {package}"
                )
            return found
    package = name.partition(".")[0] if isinstance(name, str) and "." in name else ""
    hint = f"use one of {', '.join(sorted(TARGETS))}"
    if package.isidentifier() and _may_be_own(package) and package != "torch":
        hint = f"if the package is your own, open it with plugins=[{package}]"
    raise UserError(f"{_place(path)}_target_ {name!r} is not allowed: {hint}")


def check_node(node: Mapping[str, Any], path: str = "", given: Mapping[str, Any] | None = None) -> None:
    """Check one node's name and argument names against the signature, without building anything.

    Arguments in `given` count as present. Raises UserError as `build` does.
    """
    strange = {str(key) for key in node if str(key).startswith("_") and str(key).endswith("_")} - _SPECIAL_KEYS
    if strange:
        raise UserError(f"{_place(path)}the keys {sorted(strange)} are not supported: give arguments by their names")
    target = resolve_target(node["_target_"], path)
    keys = {str(key) for key in node if key not in _SPECIAL_KEYS} | set(given or {})
    parameters = inspect.signature(target).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in sorted(keys - set(names)):
            raise UserError(
                f"{_place(path)}{node['_target_']} has no argument {key!r}: {nearest(key, names, 'it takes')}"
            )
    required = [p.name for p in parameters if p.default is p.empty and p.name in names]
    missing = [name for name in required if name not in keys]
    if missing and not node.get("_partial_"):
        raise UserError(f"{_place(path)}{node['_target_']} needs {', '.join(missing)}")


def _construct(node: Mapping[str, Any], path: str, given: Mapping[str, Any]) -> Any:
    """Build the inner nodes of a checked node, then the node."""
    target = resolve_target(node["_target_"], path)
    own = {str(key): value for key, value in node.items() if key not in _SPECIAL_KEYS and key not in given}
    arguments = {key: _construct_value(value, f"{path}.{key}" if path else key) for key, value in own.items()}
    if node.get("_partial_"):
        return functools.partial(target, **arguments, **given)
    try:
        return target(**arguments, **given)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{_place(path)}{node['_target_']} refused its arguments: {error}") from error


def _construct_value(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return _construct(value, path, {})
        return {key: _construct_value(child, f"{path}.{key}") for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_construct_value(child, f"{path}.{index}") for index, child in enumerate(value)]
    return value


def _may_be_own(name: str) -> bool:
    """Whether a package can be the user's own; enabling one of Python's would let a file start programs."""
    return name.partition(".")[0] not in {*sys.stdlib_module_names, "moss_train"}


def _place(path: str) -> str:
    return f"{path}: " if path else ""
