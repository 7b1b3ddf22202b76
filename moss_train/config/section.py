"""The base of all configuration sections: a frozen dataclass that checks types and ranges when it is built.

YAML, command line, checkpoints and Python build the same classes, so a value is checked in one place. A field is
declared once, with its type, its range and its default:

    class CheckpointConfig(Section):
        every_updates: Count = 1000
        keep_last: Annotated[int, at_least(2)] = 2
"""

import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, Union, dataclass_transform, get_args, get_origin

from moss_train.config.old_names import rename_keys
from moss_train.utils.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """A condition on a value besides its type; `expected` completes the error "has to be <expected>"."""

    expected: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Texts:
    """Mark the keys of a free mapping whose values are text even if they look like numbers."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class HomeExpanded:
    """Mark text as a path: a leading ~ becomes the home folder, and it must not be empty.

    An empty path would be the current directory: with an unset shell variable, `data.path=$AUDIO` would pack all of it.
    """


def at_least(least: float) -> Rule:
    """Return the rule that a number is not below `least`."""
    return Rule(f"at least {least}", lambda value: least <= value < 2**63)


def within(least: float, most: float) -> Rule:
    """Return the rule that a number is in a closed range."""
    return Rule(f"from {least} to {most}", lambda value: least <= value <= most)


Count = Annotated[int, at_least(1)]
NonNegative = Annotated[int, at_least(0)]
Positive = Annotated[float, Rule("above 0", lambda value: 0 < value < math.inf)]
NonNegativeFloat = Annotated[float, Rule("at least 0", lambda value: 0 <= value < math.inf)]
Fraction = Annotated[float, within(0, 1)]
BelowOne = Annotated[float, Rule("at least 0 and below 1", lambda value: 0 <= value < 1)]
AboveZero = Annotated[float, Rule("above 0 and at most 1", lambda value: 0 < value <= 1)]
PathText = Annotated[str, HomeExpanded()]
Node = dict[str, Any]
"""A `_target_` with its arguments, which only the class itself can check."""


@dataclass_transform(frozen_default=True)
class Section:
    """A part of a configuration; a subclass becomes a frozen dataclass without a decorator.

    Raises:
        ConfigError: the first value that has the wrong type or is out of range, with its path from this section.
    """

    omits_null: ClassVar[bool] = False
    """Whether `to_plain` leaves out keys without a value (None)."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        for name, hint in hints_of(type(self)).items():
            object.__setattr__(self, name, convert(hint, getattr(self, name), name))
        self.check()

    def check(self) -> None:
        """Check conditions on several fields together; the type and range of each field are checked before."""

    @classmethod
    def of(cls, values: "Section | Mapping[str, Any]") -> Self:
        """Return a section unchanged, or build one from plain data."""
        return values if isinstance(values, cls) else cls.parse(to_plain(values))

    @classmethod
    def parse(cls, values: Mapping[str, Any], path: str = "") -> Self:
        """Build the section, and the sections inside it, from plain data.

        Args:
            values: by key; keys that are left out get their defaults. Old names of renamed keys are accepted.
            path: place of the section, for errors.

        Raises:
            ConfigError: an unknown key, a required one that is missing, a wrong value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("type", path, values, "a mapping of keys to values")
        values = rename_keys(cls, values)
        known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise ConfigError(
                    "unknown_key", f"{path}.{key}" if path else str(key), values[key], nearest(key, known)
                )
        missing = [name for name, field in known.items() if is_required(field) and name not in values]
        if missing:
            where = f"{path}.{missing[0]}" if path else missing[0]
            raise ConfigError("required", where, None, f"add {where}=<{missing[0]}>")
        try:
            return cls(**values)
        except ConfigError as error:
            raise (error.within(path) if path else error) from None

    def to_plain(self) -> dict[str, Any]:
        """Return dicts, lists and scalars, as a checkpoint stores them."""
        values = {name: getattr(self, name) for name in hints_of(type(self))}
        return {name: to_plain(value) for name, value in values.items() if value is not None or not self.omits_null}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values (plain data or sections) for some keys; keys and errors as in `parse`."""
        kept = {name: getattr(self, name) for name in hints_of(type(self))}
        return self.parse(kept | dict(rename_keys(type(self), changes)))


def to_plain(value: Any) -> Any:
    """Return a value of a section as dicts, lists and scalars."""
    if isinstance(value, Section):
        return value.to_plain()
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def known_keys(hint: Any, values: Any) -> Any:
    """Return stored data under the current names of its keys, without keys that the schema does not have."""
    if isinstance(values, list):
        items = next((get_args(kind)[0] for kind in alternatives(hint)[0] if get_origin(kind) is list), Any)
        return [known_keys(items, item) for item in values]
    section = section_of(hint)
    if section is None or not isinstance(values, Mapping):
        return values
    hints = hints_of(section)
    return {key: known_keys(hints[key], item) for key, item in rename_keys(section, values).items() if key in hints}


def _hints_of(cls: Any) -> dict[str, Any]:
    """Return the declared types of a section's fields, in their order, with their rules."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


hints_of: Callable[[Any], dict[str, Any]] = cache(_hints_of)


def is_required(field: "Field[Any]") -> bool:
    """Return whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def nearest(word: str, known: Any, otherwise: str = "the keys are") -> str:
    """Return the hint for an unknown word: a similar known one, or all known ones."""
    import difflib

    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), names, n=1)
    return f"did you mean {close[0]}?" if close else f"{otherwise} {', '.join(names) or 'none'}"


def alternatives(hint: Any) -> tuple[list[Any], list[Rule]]:
    """Split a declared type into the types a value may have, without rules, and the rules for all of them."""
    if get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        kinds, rules = alternatives(inner)
        return kinds, [*rules, *(extra for extra in extras if isinstance(extra, Rule))]
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in alternatives(part)[0]], []
    return [hint], []


def convert(hint: Any, value: Any, path: str) -> Any:
    """Return a value as its declared type; an int stays an int where a float is declared.

    Raises ConfigError with the path if it has another type or is out of range.
    """
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        inner, *extras = get_args(hint)
        value = convert(inner, value, path)
        for extra in extras:
            if isinstance(extra, HomeExpanded):
                if not value:
                    expected = "is empty: give a path, or . for the current directory (is a shell variable not set?)"
                    raise ConfigError("conflict", path, value, expected)
                value = os.path.expanduser(value)
            if isinstance(extra, Rule) and value is not None and not extra.holds(value):
                raise ConfigError("value", path, value, describe(hint))
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        others = [part for part in get_args(hint) if part is not type(None)]
        errors = []
        for part in others:
            try:
                return convert(part, value, path)
            except ConfigError as error:
                errors.append(error)
        # An error inside the value says more than that the value has none of the allowed types.
        deep = next((error for error in errors if error.path != path or error.kind == "conflict"), None)
        raise deep or ConfigError(errors[0].kind if len(others) == 1 else "value", path, value, describe(hint))
    if origin is list:
        (item,) = get_args(hint)
        if isinstance(value, str | os.PathLike) and str in alternatives(item)[0]:
            value = [value]
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise ConfigError("type", path, value, f"a list: write {path}=[{value!s}]")
        return [convert(item, part, f"{path}.{index}") for index, part in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError("type", path, value, "a mapping of keys to values")
        return {str(key): convert(get_args(hint)[1], item, f"{path}.{key}") for key, item in value.items()}
    if is_section(hint):
        if not isinstance(value, Mapping | hint):
            inside = ", ".join(f"{path}.{name}" for name in hints_of(hint))
            raise ConfigError("conflict", path, value, f"holds several values, not one: set {inside}")
        return value if isinstance(value, hint) else hint.parse(value, path)
    if origin is Literal:
        options = get_args(hint)
        if value in options and type(value) in {type(option) for option in options}:
            return value
        raise ConfigError("value", path, value, describe(hint))
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return value  # 3 and 3.0 are equal, and the hashes of older runs were made from the number as written
    is_nan = isinstance(value, float) and math.isnan(value)
    if isinstance(value, hint) and not is_nan and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError("type", path, value, describe(hint))


def is_section(hint: Any) -> bool:
    """Return whether a declared type is a section."""
    return isinstance(hint, type) and is_dataclass(hint) and issubclass(hint, Section)


def section_of(hint: Any) -> Any:
    """Return the section that a declared type allows; None when it allows none."""
    return next((kind for kind in alternatives(hint)[0] if is_section(kind)), None)


def describe(hint: Any) -> str:
    """Return in words which values a declared type takes."""
    kinds, rules = alternatives(hint)
    words = []
    for kind in (kind for kind in kinds if kind is not type(None)):
        if get_origin(kind) is Literal:
            options = ", ".join(map(str, get_args(kind)))
            words.append(options if len(get_args(kind)) == 1 else f"one of {options}")
        else:
            words.append(_WORDS.get(get_origin(kind) or kind, "a mapping of keys to values"))
    text = " or ".join(dict.fromkeys(words))
    if get_origin(hint) in (Union, types.UnionType):
        rules = [rule for part in get_args(hint) for rule in alternatives(part)[1]]
    text += "".join(f" {rule.expected}" if len(kinds) < 3 else f" ({rule.expected})" for rule in rules)
    return f"{text}, or null" if type(None) in kinds else text


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (a number as text needs quotes in YAML)",
    list: "a list",
    Any: "a value",
}
