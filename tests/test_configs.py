"""Every YAML file is composed, and every class it names is looked up with its arguments."""

from pathlib import Path

import pytest
import yaml

from moss_train.cli.compose import compose
from moss_train.cli.help import default_groups, find_verbs, group_options, verb_help
from moss_train.config.build import check_node, iterate_targets
from moss_train.utils.files import config_directory

CONFIGS = config_directory()
ALL = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
VERBS = [name for name in ALL if "/" not in name]
OPTIONS = [name for name in ALL if "/" in name]
# What training hands to the parts that configurations name, by the part's place.
GIVEN_AT_RUN_TIME = {"semantic": {"latent_dim": None}, "objective.losses.reconstruction": {"sampling_rate": None}}


def check_targets(config):
    for place, node in iterate_targets(config):
        check_node(node, place, GIVEN_AT_RUN_TIME.get(place))


def verb_of(group):
    """The verb whose defaults list names the group."""
    return next((verb for verb in VERBS if group in groups_of(verb)), None)


def groups_of(verb):
    return default_groups(yaml.safe_load((CONFIGS / f"{verb}.yaml").read_text("utf-8")) or {})


def mandatory_groups(verb):
    """The first option of every group without a default."""
    open_groups = [group for group, default in groups_of(verb).items() if default == "???"]
    return {group: sorted((CONFIGS / group).glob("*.yaml"))[0].stem for group in open_groups}


def test_every_verb_has_a_configuration_and_every_configuration_a_verb():
    assert sorted(find_verbs()) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_verb_composes_and_names_existing_classes(verb):
    config = compose(verb, [f"{group}={name}" for group, name in mandatory_groups(verb).items()])
    assert len(config) > 0
    check_targets(config)


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_with_its_verb(option):
    group, _, name = option.rpartition("/")
    verb = verb_of(group)
    assert verb is not None, f"no verb has the group {group}"
    check_targets(compose(verb, [f"{group}={name}"]))


@pytest.mark.parametrize("option", OPTIONS)
def test_help_lists_it_with_a_short_whole_sentence(option):
    group, _, name = option.rpartition("/")
    sentence = group_options(group, [CONFIGS])[name]
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    assert len(sentence) <= 100
    assert f"{name} " in verb_help("estimate")
    assert sentence in verb_help("estimate")


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_the_commented_file(verb):
    text = verb_help(verb)
    for line in (CONFIGS / f"{verb}.yaml").read_text("utf-8").splitlines():
        assert line.strip() in text


@pytest.mark.parametrize("name", ALL)
def test_file_is_commented_and_free_of_machine_paths(name):
    text = Path(CONFIGS / f"{name}.yaml").read_text("utf-8")
    assert "#" in text, "the comments are the documentation that --help prints"
    assert "/home/" not in text
    assert max(map(len, text.splitlines())) <= 140
