"""Write recipes/guides/configuration.md: every key of every command with its type, default and meaning.

    python tools/list_configuration.py            # a test compares the file with this script's output

Keys and types come from the schema, and meanings from the comments in configs/*.yaml. The keys of list entries, which
those files do not show, take their meanings from the comments in the schema.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # use this tree, even if another is installed

from moss_train.config.old_names import REMOVED, RENAMED, RENAMED_COLUMNS
from moss_train.config.schema import COMMANDS, FitConfig
from moss_train.config.section import Section, alternatives, describe, hints_of, is_required, is_section, to_plain
from moss_train.utils.files import config_directory

PAGE = Path(__file__).parents[1] / "recipes/guides/configuration.md"
KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?P<value>(?: [^#]*)?)(?:#\s*(?P<comment>.*))?$")
HEAD = """\
# Every key of every command

Made by `python tools/list_configuration.py` from the schema and the comments of `configs/*.yaml`; do not edit it.

A key is given on the command line as `key=value`; `0` in a key stands for the number of a list entry, as in
`stages.0.schedule=wsd`. `--cfg job` prints what a command would use.
"""


def read_comments(text: str) -> dict[str, str]:
    """Return the comments of a YAML file by dotted key: the comments above and beside a key, joined into one line."""
    comments: dict[str, str] = {}
    above: list[str] = []
    parents: list[tuple[int, str]] = []
    last = ""
    for number, line in enumerate(text.splitlines()):
        stripped = line.strip()
        if stripped.startswith("#"):
            if line.startswith(" " * 8) and last:
                comments[last] = f"{comments.get(last, '')} {stripped.lstrip('# ')}"
            elif number:
                above.append(stripped[1:].removeprefix(" "))
        elif match := KEY.match(line):
            indent = len(match["indent"])
            parents = [(depth, key) for depth, key in parents if depth < indent] + [(indent, match["key"])]
            last = ".".join(key for _, key in parents)
            beside = [match["comment"]] if match["comment"] else []
            lines = [("<br>" if part.startswith("  ") else "") + part.strip() for part in [*above, *beside]]
            if lines:
                comments[last] = " ".join(lines)
            above = []
        else:
            above, last = [], ""
    return comments


def field_comments(section: type[Section]) -> dict[str, str]:
    """Return the comments beside the fields of a section's class, by field name."""
    found = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(section), re.MULTILINE)
    return dict(found)


def rows(schema: type[Section], comments: dict[str, str], shown: Any, prefix: str = "") -> Iterator[tuple[str, ...]]:
    """Yield (key, type, default, meaning) for every key of a section and of its nested sections."""
    own = field_comments(schema)
    defaults = {field.name: field for field in fields(schema)}  # type: ignore[arg-type]
    for name, hint in hints_of(schema).items():
        key = f"{prefix}{name}"
        value = shown.get(name) if isinstance(shown, dict) and name in shown else default_of(defaults[name])
        meaning = comments.get(key) or own.get(name, "")
        kinds = alternatives(hint)[0]
        inner = next((kind for kind in kinds if is_section(kind)), None)
        entry = next((kind.__args__[0] for kind in kinds if getattr(kind, "__origin__", None) is list), None)
        if inner is not None:
            meaning = meaning or (inner.__doc__ or "").strip().splitlines()[0]
            yield (
                key,
                "section" + (", or null" if type(None) in kinds else ""),
                "`null`" if value is None else "",
                meaning,
            )
            yield from rows(inner, comments, value if isinstance(value, dict) else {}, f"{key}.")
        elif entry is not None and is_section(entry):
            yield key, "a list of sections", "", meaning
            yield from rows(entry, comments, {}, f"{key}.0.")
        elif isinstance(value, dict) and value and not isinstance(next(iter(value.values())), list):
            yield key, kind_of(hint), "", meaning
            for part, item in value.items():
                yield f"{key}.{part}", "", text_of(item), comments.get(f"{key}.{part}", "")
        else:
            yield key, kind_of(hint), text_of(value), meaning


def default_of(field: Any) -> Any:
    """Return a field's default as plain data, or `???` if it has none."""
    if is_required(field):
        return "???"
    return to_plain(field.default_factory() if callable(field.default_factory) else field.default)


def text_of(value: Any) -> str:
    """Return a value as YAML on one line."""
    if value == "???":
        return "required"
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).strip()
    return f"`{text.removesuffix('...').strip()}`"


def kind_of(hint: Any) -> str:
    """Describe the values that a key accepts, for a list also its items."""
    words = describe(hint).replace(" (a number as text needs quotes in YAML)", "")
    entry = next(
        (kind.__args__[0] for kind in alternatives(hint)[0] if getattr(kind, "__origin__", None) is list), None
    )
    return words if entry is None else words.replace("a list", f"a list of: {kind_of(entry)}")


def cell(text: str) -> str:
    """Return a text with the characters escaped that would end a table cell."""
    return text.replace("|", "\\|")


def page() -> str:
    """Return the whole page as Markdown."""
    parts = [HEAD]
    for command, schema in COMMANDS.items():
        text = (config_directory() / f"{command}.yaml").read_text("utf-8")
        shown = yaml.safe_load(text)
        found = list(rows(schema, read_comments(text), shown))
        if command == "estimate":
            inherited = hints_of(FitConfig)
            found = [row for row in found if row[0].partition(".")[0] not in inherited]
            parts.append("## estimate\n\nEvery key of `fit` and:\n")
        else:
            parts.append(f"## {command}\n")
        parts.append("| key | value | default | meaning |\n|---|---|---|---|")
        parts += [
            f"| `{key}` | {cell(kind)} | {cell(value)} | {cell(meaning)} |" for key, kind, value, meaning in found
        ]
        parts.append("")
    parts.append(renamed_keys())
    return "\n".join(parts)


def renamed_keys() -> str:
    """Return the table of old and new key names."""
    lines = [
        "## Renamed keys\n",
        "The old name is still read, from the command line, from files and from runs that began with it; a line names",
        "the new one.\n",
        "| command | old | new |",
        "|---|---|---|",
    ]
    places = {
        section: (command, prefix)
        for command, schema in COMMANDS.items()
        for section, prefix in walk(schema)
        if not (command == "estimate" and section in {name for name, _ in walk(FitConfig)})
    }
    for section, names in RENAMED.items():
        command, prefix = places[section]
        lines += [f"| {command} | `{prefix}{old}` | `{prefix}{new}` |" for old, new in names.items()]
    for section, reasons in REMOVED.items():
        command, prefix = places[section]
        lines += [f"| {command} | `{prefix}{old}` | none: {reason} |" for old, reason in reasons.items()]
    lines += [
        "\n## Renamed columns of tables\n",
        "Tables of older runs and evaluations are read under the new names; a run that resumes gets the new ones.\n",
        "| old | new |",
        "|---|---|",
        *(f"| `{old}` | `{new}` |" for old, new in RENAMED_COLUMNS.items()),
    ]
    return "\n".join(lines) + "\n"


def walk(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name of every section class and the prefix of its keys."""
    yield schema.__name__, prefix
    for name, hint in hints_of(schema).items():
        for kind in alternatives(hint)[0]:
            item = kind.__args__[0] if getattr(kind, "__origin__", None) is list else kind
            if is_section(item):
                yield from walk(item, f"{prefix}{name}.{'0.' if item is not kind else ''}")


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    PAGE.write_text(page(), "utf-8")
