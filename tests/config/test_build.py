import functools
import importlib
import inspect
import pkgutil
import sys
import tracemalloc

import pytest
import torch

import moss_train
from moss_train.config import build as build_module
from moss_train.config.build import (
    MAX_DEPTH,
    TARGETS,
    allow_package,
    build,
    iterate_values,
    resolve_target,
)
from moss_train.losses.reconstruction import MultiScaleMelLoss
from moss_train.model import MossAudioTokenizerConfig
from moss_train.semantic import ByteText
from moss_train.utils.errors import UserError

MEL = "moss_train.losses.MultiScaleMelLoss"
STAGE = {"patch_size": 4, "output_dimension": 8, "d_model": 8, "num_heads": 1, "num_layers": 1}
QUANTIZER = {"rvq_dim": 8, "num_quantizers": 2, "codebook_size": 4, "codebook_dim": 2}


def test_builds_the_class_with_its_arguments():
    loss = build({"_target_": MEL, "sampling_rate": 16000})
    assert isinstance(loss, MultiScaleMelLoss)
    assert loss.sampling_rate == 16000


def test_containers_arrive_plain():
    config = build(
        {
            "_target_": "moss_train.model.MossAudioTokenizerConfig.from_stages",
            "sampling_rate": 16000,
            "stages": [STAGE],
            "quantizer": QUANTIZER,
        }
    )
    assert isinstance(config, MossAudioTokenizerConfig)
    assert type(config.encoder_kwargs) is list
    assert type(config.quantizer_kwargs) is dict
    assert config.quantizer_kwargs["num_quantizers"] == 2


def test_live_arguments_are_passed_on_as_they_are():
    parameter = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [parameter], "weight_decay": 0.5}]
    optimizer = build({"_target_": "torch.optim.AdamW", "lr": 0.1, "betas": [0.8, 0.99]}, params=groups)
    assert optimizer.param_groups[0]["params"][0] is parameter
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.defaults["lr"] == 0.1


def test_given_arguments_replace_those_of_the_node():
    layer = build({"_target_": "torch.nn.LeakyReLU", "negative_slope": 0.1}, negative_slope=0.3)
    assert layer.negative_slope == 0.3


def test_partial_waits_for_its_last_arguments():
    make = build({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.2})
    assert isinstance(make, functools.partial)
    assert make([torch.nn.Parameter(torch.ones(1))]).defaults["lr"] == 0.2


def public_names():
    """Return every public name of every module of the package, and every public attribute of their classes."""
    modules = ["moss_train", *(found.name for found in pkgutil.walk_packages(moss_train.__path__, "moss_train."))]
    for module_name in modules:
        if module_name.endswith("__main__"):
            continue
        module = importlib.import_module(module_name)
        for name in dir(module):
            if not name.startswith("_"):
                yield f"{module_name}.{name}"
                value = getattr(module, name)
                if inspect.isclass(value):
                    yield from (f"{module_name}.{name}.{inner}" for inner in dir(value) if not inner.startswith("_"))


def test_of_all_names_of_the_package_only_those_of_the_list_are_accepted():
    accepted, refused = set(), set()
    for name in public_names():
        try:
            resolve_target(name)
            accepted.add(name)
        except UserError:
            refused.add(name)
    assert accepted == {name for name in TARGETS if name.startswith("moss_train.")}
    assert len(refused) > 3000  # enough names were tried
    assert {
        "moss_train.model.MossAudioTokenizerModel.from_pretrained",
        "moss_train.model.MossAudioTokenizerModel",
        "moss_train.training.run.preemption.requeue",
        "moss_train.training.run.preemption.stop_torchrun",
        "moss_train.training.run.fit.fit",
        "moss_train.training.CatModule.load_from_checkpoint",
        "moss_train.semantic.make_portable",
        "moss_train.discriminators.F",
    } <= refused


def test_whatever_the_list_names_is_a_class_but_for_the_architecture():
    others = {name for name in TARGETS if not inspect.isclass(resolve_target(name))}
    assert others == {"moss_train.model.MossAudioTokenizerConfig.from_stages"}


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.nn.GELU.load_state_dict",
        "moss_train_evil.Thing",
        "moss_train.config.build.allow_package",
        "moss_train.semantic.TextLM.__init__",
        "moss_train.semantic.TextLM ",
        ".moss_train.semantic.TextLM",
        "",
        None,
        3,
        ["os.system"],
        {"a": 1},
    ],
)
def test_refuses_every_other_name(name):
    with pytest.raises(UserError, match=r"^training\.loss: _target_ .* is not allowed"):
        build({"_target_": name, "x": 1}, path="training.loss")


@pytest.fixture
def friend(tmp_path, monkeypatch):
    """Create a user's package whose module `side` writes a file when it is imported."""
    (tmp_path / "friend").mkdir()
    (tmp_path / "friend" / "__init__.py").write_text(
        "from subprocess import Popen\nfrom moss_train.model import MossAudioTokenizerModel\nfrom . import parts\n"
        "from .parts import Loss\ndef function(): raise AssertionError\n"
    )
    (tmp_path / "friend" / "parts.py").write_text(
        "class Loss:\n    def __init__(self, width, inner=None): self.width, self.inner = width, inner\n"
        "    @classmethod\n    def make(cls): raise AssertionError\nready = Loss(1)\n"
    )
    (tmp_path / "friend" / "side.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Loss:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(build_module, "_allowed_packages", set())
    yield tmp_path
    assert not (tmp_path / "canary").exists()
    for name in [name for name in sys.modules if name.partition(".")[0] == "friend"]:
        del sys.modules[name]


def test_a_package_is_closed_until_the_user_opens_it(friend):
    node = {"_target_": "friend.Loss", "width": 3, "inner": [{"_target_": "friend.parts.Loss", "width": 4}]}
    with pytest.raises(UserError, match="not allowed"):
        build(node)
    assert "friend" not in sys.modules
    allow_package("friend")
    assert build_module._allowed_packages == {"friend"}
    loss = build(node)
    assert (type(loss).__module__, loss.width, loss.inner[0].width) == ("friend.parts", 3, 4)


@pytest.mark.parametrize(
    "name",
    [
        "friend.function",
        "friend.Popen",
        "friend.MossAudioTokenizerModel",
        "friend.parts",
        "friend.parts.ready",
        "friend.Loss.make",
        "friend.parts.Loss.make",
        "friend.side.Loss",
        "friend.nothing.Loss",
        "friend2.Loss",
        "friend.",
        "friend",
    ],
)
def test_of_an_open_package_only_its_own_classes_are_built_and_nothing_is_imported(friend, name):
    allow_package("friend")
    with pytest.raises(UserError, match="_target_"):
        build({"_target_": name})


@pytest.mark.parametrize("name", ["no_such_package_here", "", "a b", "../friend", "friend.nothing"])
def test_what_cannot_be_imported_is_not_opened(friend, name):
    with pytest.raises(UserError):
        allow_package(name)
    assert build_module._allowed_packages == set()


@pytest.mark.parametrize("wrap", [lambda node: node, lambda node: [node], lambda node: {"deep": [1, {"er": node}]}])
def test_refuses_names_at_any_depth_before_anything_is_built(wrap, tmp_path):
    witness = tmp_path / "witness"
    evil = {"_target_": "pathlib.Path.touch", "self": str(witness)}
    with pytest.raises(UserError, match="not allowed"):
        build({"_target_": MEL, "sampling_rate": wrap(evil)}, path="loss")
    assert not witness.exists()


def test_error_names_the_path_of_the_inner_node():
    with pytest.raises(UserError, match=r"^loss\.window_lengths\.1: _target_ 'os\.getcwd' is not allowed"):
        build({"_target_": MEL, "sampling_rate": 1, "window_lengths": [3, {"_target_": "os.getcwd"}]}, path="loss")


def test_unknown_argument_names_the_nearest():
    with pytest.raises(
        UserError, match=r"^loss: .*MultiScaleMelLoss has no argument 'samplingrate': did you mean samp"
    ):
        build({"_target_": MEL, "samplingrate": 16000}, path="loss")


def test_missing_argument_is_named():
    with pytest.raises(UserError, match=r"^loss: .* needs sampling_rate$"):
        build({"_target_": MEL}, path="loss")


def test_refused_value_becomes_a_user_error():
    with pytest.raises(
        UserError, match=r"^optimizer: torch\.optim\.AdamW refused its arguments: Invalid learning rate"
    ):
        build(
            {"_target_": "torch.optim.AdamW", "lr": -1.0}, path="optimizer", params=[torch.nn.Parameter(torch.ones(1))]
        )


def test_refused_value_of_an_inner_node_says_where():
    inner = {"_target_": "torch.nn.LayerNorm", "normalized_shape": "wide"}
    with pytest.raises(UserError, match=r"^loss\.sampling_rate: "):
        build({"_target_": MEL, "sampling_rate": inner}, path="loss")


@pytest.mark.parametrize("key", ["_args_", "_recursive_", "_convert_x_", "__class__"])
def test_refuses_other_special_keys(key):
    with pytest.raises(UserError, match="not supported"):
        build({"_target_": "torch.nn.SiLU", key: [1]})


def test_refuses_interpolations_so_that_stored_data_cannot_read_the_environment():
    with pytest.raises(UserError, match=r"interpolation"):
        build({"_target_": "torch.nn.LeakyReLU", "negative_slope": "${oc.env:HOME}"})


def test_node_without_target():
    with pytest.raises(UserError, match="model has no _target_"):
        build({"width": 3}, path="model")


@pytest.mark.parametrize("node", [None, 3, "moss_train.semantic.ByteText", ["_target_"]])
def test_what_is_no_node_is_refused(node):
    with pytest.raises(UserError, match="semantic has no _target_"):
        build(node, path="semantic")


def test_containers_without_end_are_refused_before_anything_recurses():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UserError, match=f"semantic: more than {MAX_DEPTH} containers"):
        build({"_target_": "moss_train.semantic.ByteText", "x": deep}, path="semantic")
    laughs = ["x"]
    for _ in range(40):
        laughs = [laughs, laughs]
    wide = [[0] * 10_000] * 10_000
    tracemalloc.start()
    for many in (laughs, wide):
        with pytest.raises(UserError, match="values in one node"):
            build({"_target_": "moss_train.semantic.ByteText", "x": many}, path="semantic")
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()
    assert isinstance(build({"_target_": "moss_train.semantic.ByteText"}), ByteText)


def test_name_that_does_not_exist():
    with pytest.raises(UserError, match=r"^loss: _target_ 'moss_train\.losses\.Nothing' is not allowed"):
        resolve_target("moss_train.losses.Nothing", "loss")


def test_iterate_values_lists_parents_first():
    node = {"a": {"_target_": "x", "b": [{"_target_": "y"}]}, "c": 1}
    assert [path for path, value in iterate_values(node) if isinstance(value, dict)] == ["", "a", "a.b.0"]


@pytest.mark.parametrize("name", ["subprocess", "os.path", "moss_train", "moss_train.training"])
def test_packages_of_python_and_of_ours_stay_closed(friend, name):
    with pytest.raises(UserError, match="no package of your own"):
        allow_package(name)
    with pytest.raises(UserError) as caught:
        resolve_target("subprocess.Popen", "loss")
    assert "plugins=" not in str(caught.value)
    assert build_module._allowed_packages == set()
