"""Compose a command's configuration: its YAML files, the chosen experiment, and what was typed on the command line.

Hydra reads the files and their defaults lists. What is typed as `key=value` is read here, by the types of the schema.
"""

import copy
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from moss_train.config.build import allow_package
from moss_train.config.schema import COMMANDS
from moss_train.config.section import Section, alternatives, hints_of, is_section, new_name, why_removed
from moss_train.config.text import hint_inside, read_value
from moss_train.utils.errors import ConfigError, UserError, first_line
from moss_train.utils.files import config_directory, read_yaml

MAX_FILES = 10_000
"""Of a folder of configurations; links may lead in a circle."""

COMMAND_LINE_ONLY = ("code", "plugins")
"""Keys that name code to run: a configuration file, which may be a stranger's, cannot set them."""


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

    Only for what `compose` made: it takes `plugins` from the overrides and from no file. A worker process gets objects
    of these packages pickled and imports them by name; the processes of other ranks read the same command line.
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
            raise ConfigError("required", ", ".join(missing), None, f"add {' '.join(map(_example, missing))}")
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _unresolved(error) from error
    assert isinstance(plain, dict)
    return COMMANDS[command].parse({str(key): value for key, value in plain.items()})


def to_yaml(values: dict[str, Any]) -> str:
    """Return the YAML of `--cfg job`: resolved, except where a reference waits for a required value."""
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
    """Compose plain data whose references and required values (`???`) are still open.

    Raises:
        ConfigError: a group option or key that does not exist, or a value that cannot be read.
    """
    directories = [config_directory(), *([config_dir] if config_dir else [])]
    if config_dir is not None:
        _check_files(config_dir)
    groups: dict[str, str] = {}
    assignments = []
    for override in overrides:
        key, sign, text = _split(override)
        if sign != "~" and any((directory / key).is_dir() for directory in directories):
            _choose(groups, key, text, directories)
        else:
            assignments.append((key, sign, text))
    schema = COMMANDS[command]
    read = _read_shipped_files if config_dir is None else _read_files
    values = _with_present_names(schema, copy.deepcopy(read(command, tuple(groups.items()), tuple(directories))))
    if config_dir is not None:
        _refuse_resolvers(values, config_dir)  # also of files elsewhere that its files name
    for key in COMMAND_LINE_ONLY:
        if values.get(key):
            raise ConfigError("conflict", key, values[key], "runs code, so it is taken from the command line only")
    assignments = [
        (_present_key(schema, key), sign, text) for key, sign, text in assignments if not _is_removed(schema, key)
    ]
    for key, sign, text in _join_repeated(schema, assignments):
        _assign(schema, values, key, sign, text, tuple(path.name for path in _groups(directories)))
    if any("${" in str(name) for name in values.get("plugins") or ()):
        raise ConfigError("value", "plugins", values["plugins"], "names of packages, without references to other keys")
    return values


def _split(override: str) -> tuple[str, str, Any]:
    """Split an override into its key, `~` or an empty text, and the text of its value."""
    if override.startswith("~"):
        return override[1:].partition("=")[0], "~", ""
    key, equals, text = override.lstrip("+").partition("=")
    if not key or not equals:
        raise ConfigError("syntax", repr(override), None, f"write {key or 'key'}=<value>")
    if key.split(".")[0] == "hydra":
        raise ConfigError("syntax", repr(override), None, "settings of Hydra have no effect; see --config-dir")
    return key, "", text


def _groups(directories: Sequence[Path]) -> list[Path]:
    return [path for directory in directories for path in sorted(directory.iterdir()) if path.is_dir()]


def _options(group: str, directories: Sequence[Path]) -> list[str]:
    return sorted({path.stem for directory in directories for path in (directory / group).glob("*.yaml")})


def _choose(groups: dict[str, str], group: str, name: str, directories: Sequence[Path]) -> None:
    if group in groups:
        raise ConfigError("conflict", group, name, f"is not the only {group}: choose one")
    known = _options(group, directories)
    if name not in known:
        import difflib

        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? There are" if close else "there are"
        own = "" if len(directories) > 1 else "; your own are found with --config-dir"
        raise ConfigError("value", group, name, f"a file of configs/{group}: {hint} {', '.join(known)}{own}")
    groups[group] = name


def _check_files(directory: Path) -> None:
    """Raise UserError for files of a folder that would have no effect or do more than give values.

    Hydra reads the shipped file of two with one name. Aliases that unfold without end are refused before Hydra unfolds
    them. References lead to other keys only: one to the environment would put a secret into a run's files.
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
        _refuse_resolvers(read_yaml(path), path)


def _refuse_resolvers(value: Any, path: Path) -> None:
    """Raise UserError for a text with a reference that calls something, as `${oc.env:HOME}` does, or cannot be read."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            _refuse_resolvers(item, path)
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
    groups = dict(chosen_groups)
    import hydra
    import yaml
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    content = yaml.safe_load((directories[0] / f"{command}.yaml").read_text("utf-8")) or {}
    for group in _open_groups(content):
        if group not in groups:
            options = ", ".join(_options(group, directories))
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


def _open_groups(content: dict[str, Any]) -> list[str]:
    """Return the groups of a defaults list that have no option."""
    entries = [entry for entry in content.get("defaults") or [] if isinstance(entry, dict)]
    pairs = [pair for entry in entries for pair in entry.items()]
    return [key.removeprefix("override ").lstrip("/").split("@")[0] for key, value in pairs if value == "???"]


def _join_repeated(schema: type[Section], assignments: list[tuple[str, str, str]]) -> list[tuple[str, str, Any]]:
    """Join a key that is given several times and takes a list of texts: the shell made that of `{a,b}`."""
    joined: dict[str, list[str]] = {}
    for key, sign, text in assignments:
        hint = find_hint(schema, key)
        items = [kind for kind in alternatives(hint)[0] if getattr(kind, "__origin__", None) is list] if hint else []
        if sign != "~" and items and str in alternatives(items[0].__args__[0])[0] and not text.startswith("["):
            joined.setdefault(key, []).append(text)
    result: list[tuple[str, str, Any]] = []
    for key, sign, text in assignments:
        if len(joined.get(key, ())) < 2 or text.startswith("["):
            result.append((key, sign, text))
        elif joined[key] is not None and (key, sign, joined[key]) not in result:
            result.append((key, sign, joined[key]))
    return result


def find_hint(schema: type[Section], key: str) -> Any:
    """Return the declared type at a dotted key, None when there is no such key."""
    hint: Any = schema
    for part in key.split("."):
        hint = hint_inside(hint, part)
        if hint is None:
            return None
    return hint


def _is_removed(section: type[Section], key: str, path: str = "") -> bool:
    """Whether a key has no effect any more; a line says why."""
    reason = why_removed(section, key)
    if reason:
        print(f"moss_train: {path}{key} has no effect any more: {reason}", file=sys.stderr)
    return reason is not None


def _present_key(schema: type[Section], key: str) -> str:
    """Return a typed key under its present name; a line names the new one."""
    hint: Any = schema
    parts = []
    for part in key.split("."):
        section = _section_of(hint) if hint is not None else None
        parts.append(new_name(section, part) if section else part)
        hint = hint_inside(hint, parts[-1]) if hint is not None else None
    if ".".join(parts) != key:
        print(f"moss_train: {key} is now called {'.'.join(parts)}", file=sys.stderr)
    return ".".join(parts)


def _with_present_names(hint: Any, values: Any, path: str = "") -> Any:
    """Return the data of YAML files under the present names of its keys; a line names each new one."""
    if isinstance(values, list):
        return [_with_present_names(hint_inside(hint, "0"), item, f"{path}{i}.") for i, item in enumerate(values)]
    section = _section_of(hint) if hint is not None else None
    if section is None or not isinstance(values, dict):
        return values
    # The shipped files have the present names only, so what stands under an older one was set on top of them.
    older = {new_name(section, key) for key in values if new_name(section, key) != key}
    result = {}
    for key, value in values.items():
        if _is_removed(section, key, path):
            continue
        new = new_name(section, key)
        if new != key:
            print(f"moss_train: {path}{key} is now called {path}{new}", file=sys.stderr)
        if new != key or key not in older:
            result[new] = _with_present_names(hint_inside(hint, new), value, f"{path}{new}.")
    return result


def _assign(
    schema: type[Section], values: dict[str, Any], key: str, sign: str, text: Any, groups: Sequence[str]
) -> None:
    """Set one key of composed data to what was typed."""
    hint = find_hint(schema, key)
    if hint is None:
        raise ConfigError(
            "unknown_key", key, text, _nearest(key, [*dotted_keys(schema, key), *_set_keys(values), *groups])
        )
    place, parts = values, key.split(".")
    for number, part in enumerate(parts[:-1]):
        place = _step(place, part, ".".join(parts[: number + 1]), parts[number + 1])
    last: Any = parts[-1]
    if isinstance(place, list):
        if last == str(len(place)) and sign != "~" and str(text).startswith("{"):
            place.append({})  # one more entry
        last = _index(place, last, key)
    if sign == "~":
        if isinstance(place, dict) and last not in place:
            raise ConfigError("unknown_key", key, None, _nearest(key, dotted_keys(schema, key)))
        del place[last]
        return
    value = _escaped(text) if isinstance(text, list) else _read(hint, key, text)
    if value is not None and not isinstance(value, dict) and _holds_several(hint):
        inside = ", ".join(f"{key}.{name}" for name in hints_of(_section_of(hint)))
        raise ConfigError("conflict", key, text, f"holds several values, not one: set {inside}")
    if isinstance(value, dict):
        _check_keys(schema, key, value)
        old = place[last] if isinstance(place, list) else place.get(last)
        value = _merged(old, value) if isinstance(old, dict) else value
    place[last] = value


def _read(hint: Any, key: str, text: str) -> Any:
    try:
        value = read_value(hint, text)
    except ValueError as error:
        raise ConfigError("syntax", f"{key}={text}", None, str(error)) from error
    return _escaped(value)


def _escaped(value: Any) -> Any:
    """Keep `${` of a path that exists from being read as a reference."""
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    path = os.path.expanduser(value) if isinstance(value, str) and "${" in value else ""
    if path and (os.path.lexists(path) or (os.sep in path and Path(path).parent.is_dir())):
        return value.replace("${", "\\${")
    return value


def _step(place: Any, part: str, path: str, following: str) -> Any:
    """Go one key down; what is null becomes a mapping."""
    if isinstance(place, list):
        return place[_index(place, part, path)]
    if place.get(part) is None:
        if following.isdigit():
            raise ConfigError("value", f"{path}.{following}", None, "in a list, which is empty here")
        place[part] = {}
    if not isinstance(place[part], dict | list):
        raise ConfigError("conflict", path, place[part], f"has no key {following}")
    return place[part]


def _index(place: list[Any], part: str, path: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        parent = path.rpartition(".")[0]
        raise ConfigError("unknown_key", path, None, f"{parent} has the entries 0 to {len(place) - 1} (see --cfg job)")
    return int(part)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with some keys changed; one of another class keeps none of the old arguments."""
    if "_target_" in new and new["_target_"] != old.get("_target_"):
        return new
    result = dict(old)
    for key, value in new.items():
        before = old.get(key)
        result[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


def _check_keys(schema: type[Section], path: str, value: dict[str, Any]) -> None:
    for key, item in value.items():
        inside = f"{path}.{key}"
        if find_hint(schema, inside) is None:
            raise ConfigError("unknown_key", inside, item, _nearest(inside, dotted_keys(schema, inside)))
        if isinstance(item, dict):
            _check_keys(schema, inside, item)


def _section_of(hint: Any) -> Any:
    return next((kind for kind in alternatives(hint)[0] if is_section(kind)), None)


def _holds_several(hint: Any) -> bool:
    """Whether a key holds a section and nothing else."""
    return all(is_section(kind) or kind is type(None) for kind in alternatives(hint)[0])


def dotted_keys(hint: Any, like: str = "", prefix: str = "") -> list[str]:
    """List every dotted key of a schema, parents first; numbers of list entries are those of the key `like`."""
    number = next((part for part in like.split(".") if part.isdigit()), "0")
    keys: list[str] = []
    for kind in alternatives(hint)[0]:
        if is_section(kind):
            for name, inner in hints_of(kind).items():
                keys += [f"{prefix}{name}", *dotted_keys(inner, like, f"{prefix}{name}.")]
        elif getattr(kind, "__origin__", None) is list and is_section(_section_of(kind.__args__[0])):
            keys += [f"{prefix}{number}", *dotted_keys(kind.__args__[0], like, f"{prefix}{number}.")]
    return keys


def _set_keys(values: Any, prefix: str = "") -> list[str]:
    """List every dotted key that has a value: mappings have keys that no schema names, as the weights of losses."""
    if not isinstance(values, dict):
        return []
    return [key for name, item in values.items() for key in (f"{prefix}{name}", *_set_keys(item, f"{prefix}{name}."))]


def _nearest(key: str, known: list[str]) -> str:
    """Suggest a sibling of a similar name, the same name elsewhere, a similar key anywhere, or list the siblings."""
    from difflib import get_close_matches

    parent, _, last = key.rpartition(".")
    known = list(dict.fromkeys(known))
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    prefix = f"{parent}." if parent else ""
    # Below a mapping of free names, as objective.weights, no keys are known.
    parents = get_close_matches(parent, known, n=1, cutoff=0.8) if parent and not siblings else []
    free = [name for name in parents if name != parent and not any(other.startswith(f"{name}.") for other in known)]
    candidates = [
        *(prefix + name for name in get_close_matches(last, siblings, n=1)),
        *(f"{name}.{last}" for name in free),
        *get_close_matches(key, [name for name in known if name.rpartition(".")[2] == last], n=1, cutoff=0.0),
        *(get_close_matches(key, known, n=1, cutoff=0.7) if not siblings else []),
    ]
    if candidates:
        return f"did you mean {candidates[0]}?"
    if not siblings and parent:
        return _nearest(parent, known) if parent not in known else f"{parent} has no keys"
    return f"the keys of {parent} are {', '.join(siblings)}" if parent else f"the keys are {', '.join(siblings)}"


def _example(key: str) -> str:
    return f"{key}=<{key.split('.')[-1]}>"


def _quoted(value: str) -> str:
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return "'" + escaped.replace("${", "\\${") + "'"


def _unresolved(error: Exception) -> UserError:
    """Return the error of a reference that cannot be resolved, with its key."""
    from omegaconf.errors import OmegaConfBaseException

    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return ConfigError("syntax", str(getattr(error, "full_key", None) or "a reference"), None, first_line(cause))
