"""Parse `key=value` overrides by the types of the schema, and set them in a composed configuration.

Where the schema expects text, it stays as it was typed: `name=2024_11` is that name, and a path may hold any character.
Renamed keys are accepted under their old names; a printed line gives the new one.
"""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from moss_train.config.old_names import new_name, removal_reason
from moss_train.config.section import Section, Texts, alternatives, hints_of, is_section, section_of
from moss_train.utils.errors import ConfigError

_NULLS = ("null", "none", "~")
_TRUTH = {"true": True, "false": False}
_CLOSING = {"[": "]", "{": "}"}


def read_value(hint: Any, text: str) -> Any:
    """Convert the typed text of a value to a declared type; text that fits none stays text and is refused later.

    Raises:
        ValueError: a list or mapping without its closing bracket.
    """
    kinds, _ = alternatives(hint)
    text = text.strip() if str not in kinds else text
    items = next((kind for kind in kinds if get_origin(kind) is list), None)
    if text.startswith("[") and (items or Any in kinds) and not os.path.lexists(text):
        return [read_value(get_args(items)[0] if items else Any, part) for part in split(_inside(text), ",")]
    if text.startswith("{") and any(kind is Any or get_origin(kind) is dict or is_section(kind) for kind in kinds):
        pairs = [split(part, ":", most=1) for part in split(_inside(text), ",")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a mapping is written {key: value, key: value}")
        return {_unquoted(key): read_value(hint_inside(hint, _unquoted(key)), value) for key, value in pairs}
    if items and not any(kind in (bool, int, float, str) or get_origin(kind) is Literal for kind in kinds):
        item = get_args(items)[0]
        if type(None) in kinds and text.lower() in _NULLS:
            return None
        return [_scalar(item, text)] if str in alternatives(item)[0] else _scalar(Any, text)
    return _scalar(hint, text)


def hint_inside(hint: Any, key: str) -> Any:
    """Return the declared type of a key inside a section, mapping or list; None when there is no such key."""
    found = None
    for kind in alternatives(hint)[0]:
        if is_section(kind):
            found = hints_of(kind).get(key, found)
        elif kind is Any:
            found = Any
        elif get_origin(kind) is dict:
            found = get_args(kind)[1]
            if found is Any:  # text if a `Texts` mark names the key, a mapping if one names keys inside, else anything
                marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Texts)]
                keys = [name for mark in marks for name in mark.keys]
                inner = tuple(name.partition(".")[2] for name in keys if name.startswith(f"{key}."))
                found = Annotated[dict[str, Any] | None, Texts(inner)] if inner else Any
                found = str | None if key in keys else found
        elif get_origin(kind) is list and key.isdecimal():
            found = get_args(kind)[0]
    return found


def split(text: str, separator: str, most: int = -1) -> list[str]:
    """Split a text at separators outside of quotes and brackets; the parts are stripped.

    Raises ValueError for a quote or bracket that is not closed.
    """
    parts: list[str] = []
    closers: list[str] = []
    part = quote = ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[place - 1] != "\\" else quote
        elif letter in "'\"" and (not part.strip() or part.rstrip().endswith((":", ",", "[", "{"))):
            quote = letter
        elif letter in _CLOSING and (closers or not part.strip() or part.rstrip().endswith(":")):
            closers.append(_CLOSING[letter])
        elif closers and letter == closers[-1]:
            closers.pop()
        elif letter == separator and not closers and len(parts) != most:
            parts.append(part.strip())
            part = ""
            continue
        part += letter
    if quote or closers:
        raise ValueError(f"{quote or closers[-1]} is missing")
    return [*parts, part.strip()] if part.strip() or parts else []


def _inside(text: str) -> str:
    text = text.strip()
    if not text.endswith(_CLOSING[text[0]]):
        raise ValueError(f"{_CLOSING[text[0]]} is missing at its end")
    return text[1:-1]


def _unquoted(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    return text


def _scalar(hint: Any, text: str) -> Any:
    kinds, _ = alternatives(hint)
    anything = Any in kinds
    plain = _unquoted(text)
    if plain != text.strip() and (anything or str in kinds):
        return plain  # in quotes it is text
    low = plain.lower()
    if low in _NULLS and (anything or type(None) in kinds) and not (low != "null" and str in kinds):
        return None
    for options in (get_args(kind) for kind in kinds if get_origin(kind) is Literal):
        if plain in options:
            return plain
    if low in _TRUTH and (anything or bool in kinds):
        return _TRUTH[low]
    for kind in (int, float):
        if anything or kind in kinds or float in kinds:
            try:
                return kind(plain)
            except ValueError:
                pass
    if str in kinds or anything:
        return text if str in kinds else plain
    return _scalar(Any, plain)  # a number for what looks like one, so that an error shows it without quotes


def join_repeated(schema: type[Section], assignments: list[tuple[str, str, str]]) -> list[tuple[str, str, Any]]:
    """Join a key that is given several times and takes a list of texts: shells expand `key={a,b}` to that."""
    joined: dict[str, list[str]] = {}
    result: list[tuple[str, str, Any]] = []
    for key, sign, text in assignments:
        items = [kind for kind in alternatives(find_hint(schema, key))[0] if get_origin(kind) is list]
        takes_texts = items and str in alternatives(get_args(items[0])[0])[0]
        if sign == "~" or not takes_texts or text.startswith("["):
            joined.pop(key, None)  # what is typed later counts more, and begins anew
            result.append((key, sign, text))
        elif key in joined:
            joined[key].append(text)
        else:
            joined[key] = [text]
            result.append((key, sign, joined[key]))
    return [(key, sign, text[0] if isinstance(text, list) and len(text) == 1 else text) for key, sign, text in result]


def find_hint(schema: type[Section], key: str) -> Any:
    """Return the declared type at a dotted key, None when there is no such key."""
    return functools.reduce(hint_inside, key.split("."), schema)


def is_removed(section: type[Section], key: str, path: str = "") -> bool:
    """Return whether a key no longer has an effect; if so, print why."""
    if reason := removal_reason(section, key):
        print(f"moss_train: {path}{key} has no effect any more: {reason}", file=sys.stderr)
    return reason is not None


def present_key(schema: type[Section], key: str) -> str:
    """Return the current name of a typed key; if it differs, print it."""
    hint: Any = schema
    parts = []
    for part in key.split("."):
        section = section_of(hint)
        parts.append(new_name(section, part) if section else part)
        hint = hint_inside(hint, parts[-1])
    if ".".join(parts) != key:
        print(f"moss_train: {key} is now called {'.'.join(parts)}", file=sys.stderr)
    return ".".join(parts)


def with_present_names(hint: Any, values: Any, path: str = "") -> Any:
    """Return the data of YAML files under the current names of its keys; print each name that differs."""
    if isinstance(values, list):
        return [with_present_names(hint_inside(hint, "0"), item, f"{path}{i}.") for i, item in enumerate(values)]
    section = section_of(hint)
    if section is None or not isinstance(values, dict):
        return values
    # The shipped files have current names only, so a value under an old name is the user's and overrides theirs.
    names = {key: new_name(section, key) for key in values}
    older = {new for key, new in names.items() if new != key}
    result = {}
    for key, value in values.items():
        if is_removed(section, key, path):
            continue
        new = names[key]
        if new != key:
            print(f"moss_train: {path}{key} is now called {path}{new}", file=sys.stderr)
        if new != key or key not in older:
            result[new] = with_present_names(hint_inside(hint, new), value, f"{path}{new}.")
    return result


def assign(
    schema: type[Section], values: dict[str, Any], key: str, sign: str, text: Any, groups: Sequence[str]
) -> None:
    """Set one key of composed data to what was typed."""
    hint = find_hint(schema, key)
    if hint is None:
        raise ConfigError(
            "unknown_key", key, text, _nearest(key, [*dotted_keys(schema, key), *_set_keys(values), *groups])
        )
    place: Any = values
    *parents, last = key.split(".")
    for number, part in enumerate(parents):
        path, following = ".".join(parents[: number + 1]), [*parents, last][number + 1]
        if isinstance(place, list):
            place = place[_index(place, part, path)]
            continue
        if place.get(part) is None:  # what is null becomes a mapping
            if following.isdecimal():
                raise ConfigError("value", f"{path}.{following}", None, "in a list, which is empty here")
            place[part] = {}
        if not isinstance(place[part], dict | list):
            raise ConfigError("conflict", path, place[part], f"has no key {following}")
        place = place[part]
    entry: Any = last
    if isinstance(place, list):
        if last == str(len(place)) and sign != "~" and str(text).startswith("{"):
            place.append({})  # one more entry
        entry = _index(place, last, key)
    if sign == "~":
        if isinstance(place, dict) and entry not in place:
            raise ConfigError("unknown_key", key, None, _nearest(key, dotted_keys(schema, key)))
        del place[entry]
        return
    try:
        value = _escaped(text if isinstance(text, list) else read_value(hint, text))
    except ValueError as error:
        raise ConfigError("syntax", f"{key}={text}", None, str(error)) from error
    is_section_only = all(is_section(kind) or kind is type(None) for kind in alternatives(hint)[0])
    if value is not None and not isinstance(value, dict) and is_section_only:
        inside = ", ".join(f"{key}.{name}" for name in hints_of(section_of(hint)))
        raise ConfigError("conflict", key, text, f"holds several values, not one: set {inside}")
    if isinstance(value, dict):
        _check_keys(schema, key, value)
        old = place[entry] if isinstance(place, list) else place.get(entry)
        value = _merged(old, value) if isinstance(old, dict) else value
    place[entry] = value


def _escaped(value: Any) -> Any:
    """Escape `${` in a path that exists, so that it is not read as a reference."""
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    path = os.path.expanduser(value) if isinstance(value, str) and "${" in value else ""
    if path and (os.path.lexists(path) or (os.sep in path and Path(path).parent.is_dir())):
        return value.replace("${", "\\${")
    return value


def _index(place: list[Any], part: str, path: str) -> int:
    if not part.isdecimal() or int(part) >= len(place):
        parent = path.rpartition(".")[0]
        found = f"has the entries 0 to {len(place) - 1} (see --cfg job)" if place else "is an empty list"
        raise ConfigError("unknown_key", path, None, f"{parent} {found}")
    return int(part)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with some keys changed; with another class as `_target_` none of the old arguments are kept."""
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


def dotted_keys(hint: Any, like: str = "", prefix: str = "") -> list[str]:
    """List every dotted key of a schema, parents first; list entries have the number found in the key `like`, or 0."""
    number = next((part for part in like.split(".") if part.isdecimal()), "0")
    keys: list[str] = []
    for kind in alternatives(hint)[0]:
        if is_section(kind):
            for name, inner in hints_of(kind).items():
                keys += [f"{prefix}{name}", *dotted_keys(inner, like, f"{prefix}{name}.")]
        elif get_origin(kind) is list and is_section(section_of(kind.__args__[0])):
            keys += [f"{prefix}{number}", *dotted_keys(kind.__args__[0], like, f"{prefix}{number}.")]
    return keys


def _set_keys(values: Any, prefix: str = "") -> list[str]:
    """List every dotted key that has a value: mappings may have keys that no schema names, such as loss weights."""
    if not isinstance(values, dict):
        return []
    return [key for name, item in values.items() for key in (f"{prefix}{name}", *_set_keys(item, f"{prefix}{name}."))]


def _nearest(key: str, known: list[str]) -> str:
    """Suggest a sibling of a similar name, the same name elsewhere, a similar key anywhere, or list the siblings.

    For a key without dots the same name elsewhere comes first: its section was left out.
    """
    from difflib import get_close_matches

    parent, _, last = key.rpartition(".")
    known = list(dict.fromkeys(known))
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    prefix = f"{parent}." if parent else ""
    # In a mapping with free keys, such as objective.weights, no keys are known.
    parents = get_close_matches(parent, known, n=1, cutoff=0.8) if parent and not siblings else []
    free = [name for name in parents if name != parent and not any(other.startswith(f"{name}.") for other in known)]
    elsewhere = get_close_matches(key, [name for name in known if name.rpartition(".")[2] == last], n=1, cutoff=0.0)
    candidates = [
        *(elsewhere if not parent else []),
        *(prefix + name for name in get_close_matches(last, siblings, n=1)),
        *(f"{name}.{last}" for name in free),
        *elsewhere,
        *(get_close_matches(key, known, n=1, cutoff=0.7) if not siblings else []),
    ]
    if candidates:
        return f"did you mean {candidates[0]}?"
    if not siblings and parent:
        return _nearest(parent, known) if parent not in known else f"{parent} has no keys"
    return f"the keys of {parent} are {', '.join(siblings)}" if parent else f"the keys are {', '.join(siblings)}"
