"""Builds the objects that configurations and checkpoints name."""

import difflib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

from moss_train.utils.errors import UserError

TORCH_TARGETS = frozenset(
    {
        "torch.optim.AdamW",
        "torch.nn.GELU",
        "torch.nn.Identity",
        "torch.nn.LayerNorm",
        "torch.nn.LeakyReLU",
        "torch.nn.RMSNorm",
        "torch.nn.SiLU",
    }
)
_SPECIAL_KEYS = frozenset({"_target_", "_partial_", "_recursive_", "_convert_"})
_CLOSED_ROOMS = ("moss_train.cli.main", "moss_train.commands", "moss_train.utils")
_FUNCTION_ROOMS = tuple(f"moss_train.{room}." for room in ("model", "discriminators", "losses", "semantic", "training"))


def build(node: Mapping[str, Any], *, path: str = "", **kwargs: Any) -> Any:
    """Build a `_target_` node and every node inside it, for configurations and for what a checkpoint stores as data.

    Args:
        node: plain mapping with `_target_` and the arguments; interpolations are resolved before.
        path: dotted place of the node in the configuration, for error messages only.
        kwargs: live arguments (parameters, modules). They replace the node's and are passed on as they are.

    Returns:
        The object, or a `functools.partial` when the node says `_partial_: true`. Containers arrive as dicts and lists.

    Raises:
        UserError: a name outside the allow-list, an unknown or missing argument, a value that the constructor refuses.
    """
    if "_target_" not in node:
        raise UserError(f"{path or 'the node'} has no _target_: name the class to build, as in _target_: {_example()}")
    _check_tree(node, path, kwargs)
    try:
        factory = hydra.utils.instantiate({**node, "_partial_": True, "_convert_": "all"})
        arguments = {**factory.keywords, **kwargs}
        if node.get("_partial_"):
            return functools.partial(factory.func, **arguments)
        return factory.func(**arguments)
    except InstantiationException as error:
        raise _refused(node, path, error) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{_place(path)}{node['_target_']} refused its arguments: {error}") from error


def iterate_targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (dotted path, node) for every node with a `_target_` inside plain data, parents first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from iterate_targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from iterate_targets(value, f"{path}.{index}" if path else str(index))


def resolve_target(name: str, path: str = "") -> Any:
    """Return the class or function of an allowed name, so that data can never reach code outside the project.

    `moss_train.x.os.system` is refused as well: what counts is where the object was defined, not how it is reached.

    Raises:
        UserError: the name is not allowed, or nothing of that name exists.
    """
    if not isinstance(name, str) or not (name in TORCH_TARGETS or name.startswith("moss_train.")):
        raise UserError(
            f"{_place(path)}_target_ {name!r} is not allowed: use a class of moss_train or {_torch_names()}"
        )
    try:
        target = hydra.utils.get_object(name)
    except Exception as error:
        raise UserError(f"{_place(path)}_target_ {name!r} cannot be found: {_first_line(error)}") from error
    if name not in TORCH_TARGETS and not _may_be_named(target):
        raise UserError(f"{_place(path)}_target_ {name!r} is not a class or function that a configuration may name")
    return target


def check_node(node: Mapping[str, Any], path: str = "", given: Mapping[str, Any] | None = None) -> None:
    """Check one node's name and argument names against the signature, without building anything.

    Arguments that stand in `given` count as present. Raises UserError as `build` does.
    """
    strange = {key for key in node if str(key).startswith("_") and str(key).endswith("_")} - _SPECIAL_KEYS
    if strange:
        raise UserError(f"{_place(path)}the keys {sorted(strange)} are not supported: give arguments by their names")
    target = resolve_target(node["_target_"], path)
    keys = {str(key) for key in node if key not in _SPECIAL_KEYS} | set(given or {})
    parameters = inspect.signature(target).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in sorted(keys - set(names)):
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(names) or 'none'}"
            raise UserError(f"{_place(path)}{node['_target_']} has no argument {key!r}: {hint}")
    required = [p.name for p in parameters if p.default is p.empty and p.name in names]
    missing = [name for name in required if name not in keys]
    if missing and not node.get("_partial_"):
        raise UserError(f"{_place(path)}{node['_target_']} needs {', '.join(missing)}")


def _may_be_named(target: Any) -> bool:
    """Allow classes of the rooms that hold parts; functions and class methods only where none touches files."""
    module = getattr(target, "__module__", None) or ""
    if inspect.isclass(target):
        return module.startswith("moss_train.") and not module.startswith(_CLOSED_ROOMS)
    return (inspect.isfunction(target) or inspect.ismethod(target)) and module.startswith(_FUNCTION_ROOMS)


def _check_tree(node: Mapping[str, Any], path: str, given: Mapping[str, Any]) -> None:
    for place, child in iterate_targets(node, path):
        check_node(child, place, given if child is node else None)
    for place, text in _iterate_strings(node, path):
        if "${" in text:
            raise UserError(f"{place} = {text!r} holds an interpolation: resolve the configuration before building it")


def _iterate_strings(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _iterate_strings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _iterate_strings(value, path)


def _refused(node: Mapping[str, Any], path: str, error: InstantiationException) -> Exception:
    """Turn Hydra's wrapper back into what happened: a refused value, or the bug that was raised inside."""
    cause = error.__cause__
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    key = str(error).rpartition("full_key: ")[2].strip() if "full_key: " in str(error) else ""
    place = ".".join(part for part in (path, key) if part)
    if cause is None or isinstance(cause, TypeError | ValueError):
        return UserError(f"{_place(place)}{node['_target_']} cannot be built: {_first_line(cause or error)}")
    return cause if isinstance(cause, Exception) else error


def _place(path: str) -> str:
    return f"{path}: " if path else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _torch_names() -> str:
    return ", ".join(sorted(TORCH_TARGETS))


def _example() -> str:
    return "moss_train.losses.MultiScaleMelLoss"
