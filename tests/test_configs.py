"""Every YAML file is composed, and every class that it names is checked against its arguments."""

from pathlib import Path

import pytest
import yaml

from moss_train.cli.compose import compose
from moss_train.cli.help import command_help, default_groups, find_commands, group_options
from moss_train.config.build import check_node, iterate_values
from moss_train.utils.files import config_directory

CONFIGS = config_directory()
ALL = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
COMMANDS = [name for name in ALL if "/" not in name]
OPTIONS = [name for name in ALL if "/" in name]
# Arguments that training passes to the parts in the configuration, by place of the part.
GIVEN_AT_RUN_TIME = {"semantic": {"latent_dim": None}, "objective.losses.reconstruction": {"sampling_rate": None}}


def check_targets(config):
    for place, node in iterate_values(config):
        if isinstance(node, dict) and "_target_" in node:
            check_node(node, place, GIVEN_AT_RUN_TIME.get(place))


def command_of(group):
    """Return the command whose defaults list includes the group."""
    return next((command for command in COMMANDS if group in groups_of(command)), None)


def groups_of(command):
    return default_groups(yaml.safe_load((CONFIGS / f"{command}.yaml").read_text("utf-8")) or {})


def mandatory_groups(command):
    """Return the first option of every group without a default."""
    open_groups = [group for group, default in groups_of(command).items() if default == "???"]
    return {group: sorted((CONFIGS / group).glob("*.yaml"))[0].stem for group in open_groups}


def test_every_command_has_a_configuration_and_every_configuration_a_command():
    assert sorted(find_commands()) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes_and_names_existing_classes(command):
    config = compose(command, [f"{group}={name}" for group, name in mandatory_groups(command).items()])
    assert len(config) > 0
    check_targets(config)


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_with_its_command(option):
    group, _, name = option.rpartition("/")
    command = command_of(group)
    assert command is not None, f"no command has the group {group}"
    check_targets(compose(command, [f"{group}={name}"]))


@pytest.mark.parametrize("option", OPTIONS)
def test_help_lists_it_with_a_short_whole_sentence(option):
    group, _, name = option.rpartition("/")
    sentence = group_options(group, [CONFIGS])[name]
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    assert len(sentence) <= 100
    assert f"{name} " in command_help("estimate")
    assert sentence in command_help("estimate")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_commented_file(command):
    text = command_help(command)
    for line in (CONFIGS / f"{command}.yaml").read_text("utf-8").splitlines():
        assert line.strip() in text


@pytest.mark.parametrize("name", ALL)
def test_file_is_commented_and_free_of_machine_paths(name):
    text = Path(CONFIGS / f"{name}.yaml").read_text("utf-8")
    assert "#" in text, "the comments are the documentation that --help prints"
    assert "/home/" not in text
    assert max(map(len, text.splitlines())) <= 140
