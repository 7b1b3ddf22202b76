"""Composes a verb's configuration with Hydra and turns what can go wrong into one clear line each."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from yaml import YAMLError

from moss_train.cli.help import JOINED_KEYS, group_options
from moss_train.utils.errors import UserError
from moss_train.utils.files import read_yaml
from moss_train.utils.paths import config_directory


def compose(verb: str, overrides: Sequence[str] = (), extra_directory: Path | None = None) -> DictConfig:
    """Compose `configs/<verb>.yaml` with the overrides; `extra_directory` is searched after the shipped configs.

    Raises:
        UserError: a group option, key, value or reference that does not exist, with the nearest that does.
    """
    prepared = prepare_overrides(overrides)
    _refuse_ambiguous_groups([_parse(override) for override in prepared], extra_directory)
    if extra_directory is not None:
        _refuse_hidden_files(extra_directory)
    try:
        config = _compose(verb, prepared, extra_directory)
    except MissingConfigException as error:
        raise UserError(_explain_missing_config(error, extra_directory)) from error
    except YAMLError as error:
        raise UserError(f"a configuration file is not plain YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, verb, prepared, extra_directory)) from error
    _refuse_overwritten_containers(verb, prepared, extra_directory)
    return config


def to_plain(config: DictConfig, verb: str) -> dict[str, Any]:
    """Return dicts, lists and values with every reference resolved. Raises UserError when a mandatory value is open."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if not missing:
            return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise UserError(_explain_reference(error)) from error
    give = " ".join(f"{key}=<{key.split('.')[-1]}>" for key in missing)
    noun = "is required" if len(missing) == 1 else "are required"
    raise UserError(f"{', '.join(missing)} {noun}: add {give} (see python -m moss_train {verb} --help)")


def to_yaml(config: DictConfig) -> str:
    """Return the YAML of `--cfg job`: resolved, except where a reference waits for a mandatory value."""
    try:
        return OmegaConf.to_yaml(config, resolve=True)
    except InterpolationToMissingValueError:
        return OmegaConf.to_yaml(config)
    except OmegaConfBaseException as error:
        raise UserError(_explain_reference(error)) from error


def prepare_overrides(overrides: Sequence[str]) -> list[str]:
    """Quote paths that Hydra's grammar would refuse or split, and join repeated path keys into one list.

    The shell turns `data.train=/shards/{speech,music}` into two overrides of one key; they become
    `data.train=['/shards/speech','/shards/music']`.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if sign and key in JOINED_KEYS and not value.startswith("["):
            values.setdefault(key, []).append(os.path.expanduser(value))
    joined = {key for key, paths in values.items() if len(paths) > 1}
    prepared = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in joined or value.startswith("["):
            prepared.append(_quote_path(override))
        elif values[key]:
            prepared.append(f"{key}=[{','.join(map(_quoted, values[key]))}]")
            values[key] = []
    return prepared


def _compose(verb: str, overrides: Sequence[str], extra_directory: Path | None) -> DictConfig:
    search = [f"hydra.searchpath=[{_quoted(f'file://{extra_directory}')}]"] if extra_directory else []
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3", job_name=verb):
        return hydra.compose(verb, overrides=[*overrides, *search])


def _quote_path(override: str) -> str:
    key, sign, text = override.partition("=")
    value = os.path.expanduser(text) if text.startswith("~") else text
    if not sign or not value:
        return override
    named = os.path.lexists(value) or (os.sep in value and Path(value).parent.is_dir())
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
        hidden = "${" in value and named
        plain = not parsed.is_sweep_override() and not hidden and parsed.value() == value
        if plain or not (parsed.is_sweep_override() or isinstance(parsed.value(), str)):
            return f"{key}={value}"
    except HydraException:
        pass  # not Hydra's grammar: quoted below when it names a path, else Hydra's own message stands
    return f"{key}={_quoted(value)}" if named and value[0] not in "'\"[{" else f"{key}={value}"


def _quoted(value: str) -> str:
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return "'" + escaped.replace("${", "\\${") + "'"


def _parse(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, sign, value = text.partition("=")
        hint = f"special characters need quotes, as in \"{key}='{value}'\"" if sign else f"write {key}=<value>"
        raise UserError(f"cannot read {text!r}: {hint}") from error
    if not override.key_or_group:
        raise UserError(f"cannot read {text!r}: write key=value")
    if override.is_sweep_override():
        raise UserError(f"{text!r} gives several values: write a list as {override.key_or_group}=[a,b]")
    if override.key_or_group.split(".")[0] == "hydra":
        raise UserError(f"{text!r}: Hydra's own settings have no effect here; use --config-dir for more configs")
    return override


def _refuse_ambiguous_groups(overrides: list[Override], extra_directory: Path | None) -> None:
    """Hydra takes the last of two choices without a word, and fails on names that look like numbers."""
    chosen: set[str] = set()
    for override in overrides:
        group = override.key_or_group
        if not _is_group(override, extra_directory) or override.is_delete():
            continue
        if group in chosen:
            raise UserError(f"{group} is given several times: choose one")
        if not isinstance(override.value(), str | list):
            known = ", ".join(sorted(group_options(group, _directories(extra_directory))))
            raise UserError(f"unknown {group} {override.value()!r}: there are {known}")
        chosen.add(group)


def _refuse_hidden_files(directory: Path) -> None:
    """Hydra reads the shipped file of two with one name, so a file of the same name would have no effect."""
    shipped = config_directory()
    for path in sorted(directory.rglob("*.yaml")):
        same = shipped / path.relative_to(directory)
        if same.is_file() and not same.samefile(path):
            raise UserError(f"{path} has the name of a shipped configuration and would not be read: rename it")
        read_yaml(path)  # aliases that unfold without end are refused before Hydra unfolds them


def _refuse_overwritten_containers(verb: str, overrides: list[str], extra_directory: Path | None) -> None:
    """Hydra lets `training=3` replace everything under `training`; the verb would fail on what is gone."""
    parsed = [(text, _parse(text)) for text in overrides]
    values = [override for text, override in parsed if not _is_group(override, extra_directory)]
    flat = [override for override in values if not override.is_delete() and not isinstance(override.value(), dict)]
    if not flat:
        return
    base = _compose(verb, [text for text, override in parsed if override not in values], extra_directory)
    for override in flat:
        old = OmegaConf.select(base, override.key_or_group, throw_on_missing=False)
        if isinstance(old, DictConfig) and override.value() is not None:
            inside = ", ".join(f"{override.key_or_group}.{key!s}" for key in old)
            raise UserError(f"{override.key_or_group} holds several values, not one: set {inside}")
        if isinstance(old, ListConfig) and isinstance(override.value(), bool | int | float):
            raise UserError(f"{override.key_or_group} is a list: write {override.key_or_group}=[{override.value()}]")


def _is_group(override: Override, extra_directory: Path | None) -> bool:
    return any((directory / override.key_or_group).is_dir() for directory in _directories(extra_directory))


def _directories(extra_directory: Path | None) -> list[Path]:
    return [config_directory(), *([extra_directory] if extra_directory else [])]


def _explain_missing_config(error: MissingConfigException, extra_directory: Path | None) -> str:
    group, _, name = str(error.missing_cfg_file or "").rpartition("/")
    if not group:
        return f"there is no configuration {name!r} in {config_directory()}"
    known = sorted(group_options(group, _directories(extra_directory)))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? There are" if close else "there are"
    own = "" if extra_directory else "; your own are found with --config-dir"
    return f"unknown {group} {name!r}: {hint} {', '.join(known) or 'none'}{own}"


def _explain(error: Exception, verb: str, overrides: list[str], extra_directory: Path | None) -> str:
    open_group = re.match(r"You must specify '([^']+)'", str(error))
    if open_group is not None:
        options = ", ".join(sorted(group_options(open_group[1], _directories(extra_directory))))
        return f"{open_group[1]} is required: add {open_group[1]}=<name>; there are {options}"
    match = re.search(r"Could not (?:override|delete(?: from config\.)?) '([^']+)'", str(error))
    if match is None:
        return _explain_by_leaving_out(error, verb, overrides, extra_directory)
    key = match[1].split("@")[0]
    others = [override for override in overrides if _parse(override).key_or_group != key]
    try:
        known = _dotted_keys(OmegaConf.to_container(_compose(verb, others, extra_directory)))
        known += [path.name for path in sorted(config_directory().iterdir()) if path.is_dir()]
    except HydraException:
        return f"unknown key {key!r}"
    if key in known:
        return f"cannot set {key}: {_first_line(error)}"
    return f"unknown key {key!r}: {_nearest(key, known)}"


def _explain_by_leaving_out(error: Exception, verb: str, overrides: list[str], extra_directory: Path | None) -> str:
    """Name the override without which the configuration composes; the library's own message often names none."""
    for index, text in enumerate(overrides):
        try:
            _compose(verb, overrides[:index] + overrides[index + 1 :], extra_directory)
        except (HydraException, OmegaConfBaseException, ValueError):
            continue
        return _cannot_apply(text, error)
    groups = [text for text in overrides if _is_group(_parse(text), extra_directory)]
    for text in overrides:  # several are wrong: the first of them
        try:
            _compose(verb, [*(group for group in groups if group != text), text], extra_directory)
        except (HydraException, OmegaConfBaseException, ValueError) as its_own:
            return _cannot_apply(text, its_own)
    return _explain_reference(error)


def _cannot_apply(override: str, error: Exception) -> str:
    cause = _first_line(error.__cause__ or error)
    if cause == "list index out of range":
        cause = "the list has no such place (see --cfg job)"
    return f"cannot apply {override!r}: {cause}"


def _explain_reference(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    place = f"{key}: " if key else ""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return f"{place}{_first_line(cause)}"


def _dotted_keys(node: Any, prefix: str = "") -> list[str]:
    """List every key and list place of plain data, parents first."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    keys = []
    for key, value in items:
        keys += [f"{prefix}{key}", *_dotted_keys(value, f"{prefix}{key}.")]
    return keys


def _nearest(key: str, known: list[str]) -> str:
    """Suggest a sibling of a similar name, the same name elsewhere, a similar key anywhere, or list the siblings."""
    parent, _, last = key.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    prefix = f"{parent}." if parent else ""
    candidates = [
        *(prefix + name for name in difflib.get_close_matches(last, siblings, n=1)),
        *difflib.get_close_matches(key, [name for name in known if name.rpartition(".")[2] == last], n=1, cutoff=0.0),
        *(difflib.get_close_matches(key, known, n=1, cutoff=0.7) if not siblings else []),
    ]
    if candidates:
        return f"did you mean {candidates[0]}?"
    if not siblings and parent:
        return _nearest(parent, known) if parent not in known else f"{parent} has no keys"
    return f"the keys of {parent} are {', '.join(siblings)}" if parent else f"the keys are {', '.join(siblings)}"


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
