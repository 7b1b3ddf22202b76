"""Compose a command's configuration: its YAML files, the chosen experiment, and the overrides of the command line.

Hydra reads the files and their defaults lists. The overrides, typed as `key=value`, are set by `config/overrides.py`.
"""

import copy
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from moss_train.cli.help import default_groups, group_options
from moss_train.config.build import allow_package
from moss_train.config.fit_schema import FitConfig
from moss_train.config.overrides import assign, is_removed, join_repeated, present_key, with_present_names
from moss_train.config.recipe_schema import ADVERSARIAL_TERMS
from moss_train.config.schema import COMMANDS
from moss_train.config.section import Section, nearest
from moss_train.utils.errors import ConfigError, UserError, first_line
from moss_train.utils.files import config_directory, read_yaml

MAX_FILES = 10_000
"""Most files in a folder of configurations: symbolic links may form a cycle."""


def load_config(command: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Any:
    """Load the configuration of a command as the command line would.

    Args:
        command: `fit`, `pack`, ...
        overrides: `key=value`, as typed. The packages of `plugins=[...]` are imported.
        config_dir: a folder with further YAML files, laid out like `configs/`.

    Returns:
        The command's configuration class, as `FitConfig`, complete and checked.

    Raises:
        ConfigError: an unknown key or group option, a required key that is missing, a wrong value.
    """
    config = parse_config(command, compose(command, overrides, None if config_dir is None else Path(config_dir)))
    open_plugins(config)
    return config


def open_plugins(config: Section) -> None:
    """Import the packages that `plugins` names and let `_target_` name their classes, in this process.

    Only for configurations made by `compose`, which takes `plugins` from the overrides and never from a file. Worker
    processes get pickled objects of these packages and import the packages by name; the other ranks read the same
    command line.
    """
    for name in getattr(config, "plugins", ()):
        allow_package(name)


def parse_config(command: str, values: dict[str, Any]) -> Any:
    """Resolve the references of composed data and build the command's configuration class."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.create(values)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            examples = " ".join(f"{key}=<{key.split('.')[-1]}>" for key in missing)
            raise ConfigError("required", ", ".join(missing), None, f"add {examples}")
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _unresolved(error) from error
    assert isinstance(plain, dict)
    return COMMANDS[command].parse({str(key): value for key, value in plain.items()})


def to_yaml(values: dict[str, Any]) -> str:
    """Return the YAML of `--cfg job`, with references resolved unless one of them needs a missing required value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

    config = OmegaConf.create(values)
    try:
        return OmegaConf.to_yaml(config, resolve=True)
    except InterpolationToMissingValueError:
        return OmegaConf.to_yaml(config)
    except OmegaConfBaseException as error:
        raise _unresolved(error) from error


def compose(command: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> dict[str, Any]:
    """Compose plain data; its references are not resolved yet, and required values may be missing (`???`).

    Raises:
        ConfigError: a group option or key that does not exist, or a value that cannot be read.
    """
    directories = [config_directory(), *([config_dir] if config_dir else [])]
    if config_dir is not None:
        _check_files(config_dir)
    groups: dict[str, str] = {}
    assignments = []
    for override in overrides:
        key, equals, text = override.lstrip("+").partition("=")
        sign = ""
        if override.startswith("~"):
            key, sign, text = override[1:].partition("=")[0], "~", ""
        elif not key or not equals:
            raise ConfigError("syntax", repr(override), None, f"write {key or 'key'}=<value>")
        elif key.split(".")[0] == "hydra":
            raise ConfigError("syntax", repr(override), None, "settings of Hydra have no effect; see --config-dir")
        if sign or not any((directory / key).is_dir() for directory in directories):
            assignments.append((key, sign, text))
        elif key in groups:
            raise ConfigError("conflict", key, text, f"is not the only {key}: choose one")
        elif text not in (known := sorted(group_options(key, directories))):
            own = "" if len(directories) > 1 else "; your own are found with --config-dir"
            raise ConfigError("value", key, text, f"a file of configs/{key}: {nearest(text, known, 'there are')}{own}")
        else:
            groups[key] = text
    schema = COMMANDS[command]
    read = _read_shipped_files if config_dir is None else _read_files
    values = with_present_names(schema, copy.deepcopy(read(command, tuple(groups.items()), tuple(directories))))
    if config_dir is not None:
        _check_references(values, config_dir)  # also in files elsewhere that its files include
    for key in ("code_dir", "plugins"):  # a configuration file may be untrusted
        if values.get(key):
            raise ConfigError("conflict", key, values[key], "runs code, so it is taken from the command line only")
    assignments = [
        (present_key(schema, key), sign, text) for key, sign, text in assignments if not is_removed(schema, key)
    ]
    assignments = join_repeated(schema, assignments)
    all_groups = [path.name for directory in directories for path in sorted(directory.iterdir()) if path.is_dir()]
    for key, sign, text in assignments:
        assign(schema, values, key, sign, text, all_groups)
    if any("${" in str(name) for name in values.get("plugins") or ()):
        raise ConfigError("value", "plugins", values["plugins"], "names of packages, without references to other keys")
    if issubclass(schema, FitConfig):
        _print_overridden_weights(values, assignments)
    return values


def _print_overridden_weights(values: dict[str, Any], assignments: Sequence[tuple[str, str, Any]]) -> None:
    """Print which typed weights of `objective` have no effect, because every stage that uses the loss has its own."""
    terms = [
        key.removeprefix("objective.weights.") for key, _, _ in assignments if key.startswith("objective.weights.")
    ]
    terms += [
        term for key, _, text in assignments if key == "objective.weights" for term in re.findall(r"(\w+) *:", text)
    ]
    if not isinstance(values.get("stages"), list):
        return  # refused when the schema reads it
    stages = [(number, stage) for number, stage in enumerate(values["stages"]) if isinstance(stage, dict)]
    for term in terms:
        users = [(i, stage) for i, stage in stages if term not in ADVERSARIAL_TERMS or stage.get("adversarial")]
        given = ((i, stage.get("weights")) for i, stage in users)
        own = [f"stages.{i}.weights.{term}" for i, weights in given if isinstance(weights, dict) and term in weights]
        if own and len(own) == len(users):
            print(f"moss_train: objective.weights.{term} has no effect: set {', '.join(own)}", file=sys.stderr)


def _check_files(directory: Path) -> None:
    """Raise UserError for files of a folder that would have no effect or do more than set values.

    Of two files with the same name Hydra reads the shipped one. Aliases that expand without limit are refused before
    Hydra expands them. References may only name other keys: one to the environment would put a secret into a run's
    files.
    """
    shipped = config_directory()
    folders = ((Path(folder), names) for folder, _, names in os.walk(directory, followlinks=True))
    for count, path in enumerate(folder / name for folder, names in folders for name in sorted(names)):
        if count >= MAX_FILES:
            raise UserError(f"{directory} has more than {MAX_FILES} files; give a folder of configurations only")
        if path.suffix != ".yaml":
            continue
        same = shipped / path.relative_to(directory)
        if same.is_file() and not same.samefile(path):
            raise UserError(f"{path} has the name of a shipped configuration and would not be read: rename it")
        _check_references(read_yaml(path), path)


def _check_references(value: Any, path: Path) -> None:
    """Raise UserError for a reference that calls a resolver, as `${oc.env:HOME}` does, or that cannot be parsed."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            _check_references(item, path)
    elif isinstance(value, str) and "${" in value:
        from omegaconf.errors import OmegaConfBaseException
        from omegaconf.grammar_parser import parse

        try:
            calls = _has_resolver(parse(value))
        except OmegaConfBaseException as error:
            raise UserError(f"{path}: {value!r} is no reference ({first_line(error)})") from error
        if calls:
            raise UserError(f"{path}: {value!r} is not allowed: a file's references name other keys, as ${{stages}}")


def _has_resolver(node: Any) -> bool:
    """Whether a parsed text holds a call, at any depth."""
    from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser

    if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
        return True
    return any(map(_has_resolver, getattr(node, "children", None) or ()))


def _read_files(command: str, chosen_groups: Sequence[tuple[str, str]], directories: Sequence[Path]) -> dict[str, Any]:
    import hydra
    import yaml
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = dict(chosen_groups)
    content = yaml.safe_load((directories[0] / f"{command}.yaml").read_text("utf-8")) or {}
    for group, option in default_groups(content).items():
        if option == "???" and group not in groups:
            options = ", ".join(sorted(group_options(group, directories)))
            raise ConfigError("required", group, None, f"add {group}=<name>; there are {options}")
    search = [f"hydra.searchpath=[{_quoted(f'file://{directory}')}]" for directory in directories[1:]]
    chosen = [f"{group}={_quoted(name)}" for group, name in groups.items()]
    try:
        with hydra.initialize_config_dir(str(directories[0]), version_base="1.3", job_name=command):
            composed = hydra.compose(command, overrides=[*chosen, *search])
    except yaml.YAMLError as error:
        raise UserError(f"a configuration file is not plain YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"the configuration files do not go together: {first_line(error)}") from error
    container = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


_read_shipped_files = cache(_read_files)  # which do not change


def _quoted(value: str) -> str:
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return "'" + escaped.replace("${", "\\${") + "'"


def _unresolved(error: Exception) -> UserError:
    """Return the error of a reference that cannot be resolved, with its key."""
    from omegaconf.errors import OmegaConfBaseException

    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return ConfigError("syntax", str(getattr(error, "full_key", None) or "a reference"), None, first_line(cause))
