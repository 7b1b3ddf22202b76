"""Make the texts of `--help` from the command modules, without importing them, and their commented YAML files."""

import ast
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moss_train.utils.files import PACKAGE_DIRECTORY, config_directory

_OPTIONS = """\
  -h, --help         this text
  --cfg job          print the composed configuration and stop
  --config-dir DIR   a folder with your own YAML files, laid out like configs/ (DIR/experiment/mine.yaml)
  --traceback        show the Python traceback of an error
  --version          the version of moss_train"""

_OVERRIDES = """\
  key=value          changes a value; nested keys take dots: data.path=/my/audio
  key=[a,b]          a list; quote it when the shell would expand it
  group=name         chooses one of the files of a group, as in experiment=finetune
  +key=value, ~key   adds a key, removes a key
  A key given several times becomes a list if it names paths (data.train, input, validation.data), so that
  data.train=/shards/{speech,music} may be left to the shell. Paths may hold spaces and other special characters;
  quote them for the shell only. A leading ~ is the home folder."""


def find_commands() -> dict[str, str]:
    """Return the summary of every command by name, read from the sources so that no command is imported."""
    directory = PACKAGE_DIRECTORY / "commands"
    files = sorted(path for path in directory.glob("*.py") if not path.name.startswith("_"))
    return {path.stem: _constant(path, "SUMMARY", "") for path in files}


def program_help(commands: dict[str, str]) -> str:
    """Return the text of `moss_train --help`: every command with its summary, the options, the override syntax."""
    width = max(map(len, commands), default=0)
    lines = [f"  {command:<{width}}  {summary}" for command, summary in commands.items()]
    return "\n".join(
        [
            "Trains neural audio tokenizers from raw audio and hands them over as Hugging Face models.",
            "\nUsage: python -m moss_train <command> [options] [key=value ...]",
            "\nCommands:",
            *lines,
            f"\nOptions:\n{_OPTIONS}",
            f"\nValues:\n{_OVERRIDES}",
            "\npython -m moss_train <command> --help shows a command's configuration with its comments.",
        ]
    )


def command_help(command: str, extra_directory: Path | None = None) -> str:
    """Return the text of `<command> --help`: usage, experiments, groups, the commented YAML, examples."""
    directories = [directory for directory in (config_directory(), extra_directory) if directory is not None]
    text = (directories[0] / f"{command}.yaml").read_text("utf-8")
    config = yaml.safe_load(text) or {}
    module = PACKAGE_DIRECTORY / "commands" / f"{command}.py"
    parts = [
        _constant(module, "SUMMARY", ""),
        f"\nUsage: python -m moss_train {command} [options] [key=value ...]",
        f"\nOptions:\n{_OPTIONS}",
        f"\nValues:\n{_OVERRIDES}",
    ]
    start = f"python -m moss_train {command}"
    groups = default_groups(config)
    for group in sorted(groups, key=lambda name: name != "experiment"):
        options = group_options(group, directories)
        if group == "experiment":
            start = f"{start} experiment={next(iter(options), '<name>')}"
        if not options:
            continue
        title = "Experiments" if group == "experiment" else f"Group {group}"
        parts.append(f"\n{title} ({group}=<name>):")
        width = max(map(len, options))
        for name, comment in options.items():
            default = " (default)" if name == groups[group] else ""
            parts.append(f"  {name:<{width}}  {comment}{default}".rstrip())
    required = " ".join(f"{key}=<{key}>" for key, value in config.items() if value == "???")
    examples = [f"{start} {required}".rstrip(), f"{start} {required} --cfg job".replace("  ", " ")]
    parts += [
        f"\nConfiguration (configs/{command}.yaml):\n{textwrap.indent(text.strip(), '  ')}",
        "\nExamples:",
        *(f"  {example}" for example in _constant(module, "EXAMPLES", ()) or examples),
    ]
    return "\n".join(parts)


def group_options(group: str, directories: Sequence[Path]) -> dict[str, str]:
    """Return the files of a config group by name, with the first comment line of each."""
    options = {}
    for directory in directories:
        for path in sorted((directory / group).glob("*.yaml")):
            lines = path.read_text("utf-8").splitlines()
            comments = (line for line in lines if line.startswith("#") and not line.startswith("# @package"))
            options[path.stem] = next(comments, "").lstrip("# ").rstrip()
    return options


def default_groups(config: dict[str, Any]) -> dict[str, str | None]:
    """Return the groups in a command's defaults list, each with its default option."""
    chosen = [item for entry in config.get("defaults") or [] if isinstance(entry, dict) for item in entry.items()]
    return {
        key.removeprefix("optional ").removeprefix("override ").split("@")[0].lstrip("/"): name for key, name in chosen
    }


def _constant(path: Path, name: str, default: Any) -> Any:
    for statement in ast.parse(path.read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    return default
