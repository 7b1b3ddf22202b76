"""Values as they are typed on the command line, read for the type that a key has.

Where text is meant, text stays as it was typed: `name=2024_11` is that name, and a path may hold any character.
"""

import os
from typing import Any, Literal, get_args, get_origin

from moss_train.config.section import Texts, alternatives, is_section

_NULLS = ("null", "none", "~")
_TRUTH = {"true": True, "false": False}
_CLOSING = {"[": "]", "{": "}"}


def read_value(hint: Any, text: str) -> Any:
    """Return what a typed text means for a declared type; text that fits none stays text and is refused later.

    Raises:
        ValueError: a list or mapping without its closing bracket.
    """
    kinds, _ = alternatives(hint)
    text = text.strip() if not _is_text(kinds) else text
    items = next((kind for kind in kinds if get_origin(kind) is list), None)
    if text.startswith("[") and (items or Any in kinds) and not os.path.lexists(text):
        return [read_value(get_args(items)[0] if items else Any, part) for part in split(_inside(text), ",")]
    if text.startswith("{") and any(map(_is_mapping, kinds)):
        pairs = [split(part, ":", most=1) for part in split(_inside(text), ",")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a mapping is written {key: value, key: value}")
        return {_unquoted(key): read_value(hint_inside(hint, _unquoted(key)), value) for key, value in pairs}
    if items and not any(_is_plain(kind) for kind in kinds):
        item = get_args(items)[0]
        if type(None) in kinds and text.lower() in _NULLS:
            return None
        return [_scalar(item, text)] if str in alternatives(item)[0] else _scalar(Any, text)
    return _scalar(hint, text)


def hint_inside(hint: Any, key: str) -> Any:
    """Return the declared type of a key inside a section, mapping or list; None when there is no such key."""
    from moss_train.config.section import hints_of

    found = None
    for kind in alternatives(hint)[0]:
        if is_section(kind):
            found = hints_of(kind).get(key, found)
        elif kind is Any:
            found = Any
        elif get_origin(kind) is dict:
            found = get_args(kind)[1]
            if found is Any:
                found = _hint_of_node(hint, key)
        elif get_origin(kind) is list and key.isdigit():
            found = get_args(kind)[0]
    return found


def split(text: str, separator: str, most: int = -1) -> list[str]:
    """Split a text where a separator stands outside of quotes and brackets; the parts are stripped."""
    parts: list[str] = []
    closers: list[str] = []
    part = quote = ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[place - 1] != "\\" else quote
        elif letter in "'\"" and not part.strip():
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


def _hint_of_node(hint: Any, key: str) -> Any:
    """Return the type of a key of a free mapping: text where it is marked so, a mapping with such keys, or anything."""
    from typing import Annotated

    marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Texts)]
    keys = [name for mark in marks for name in mark.keys]
    if key in keys:
        return str | None
    inner = tuple(name.partition(".")[2] for name in keys if name.startswith(f"{key}."))
    return Annotated[dict[str, Any] | None, Texts(inner)] if inner else Any


def _is_mapping(kind: Any) -> bool:
    return kind is Any or get_origin(kind) is dict or is_section(kind)


def _is_plain(kind: Any) -> bool:
    return kind in (bool, int, float, str) or get_origin(kind) is Literal


def _is_text(kinds: list[Any]) -> bool:
    return str in kinds


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
        return plain  # quotes say that it is text
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
    return _guessed(plain)


def _guessed(text: str) -> Any:
    """Return a number for what looks like one, so that an error shows the value without quotes."""
    return _scalar(Any, text)
