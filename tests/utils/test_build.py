import functools

import pytest
import torch

from moss_train.config.build import build, iterate_targets, resolve_target
from moss_train.losses.mel import MultiScaleMelLoss
from moss_train.model import MossAudioTokenizerConfig
from moss_train.utils.errors import UserError

MEL = "moss_train.losses.mel.MultiScaleMelLoss"
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


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "moss_train_evil.Thing",
        "moss_train.config.build.hydra.utils.instantiate",
        "moss_train.audio.io.soundfile.write",
        "moss_train.audio.io.write_audio",
        "moss_train.cli.main.main",
        "moss_train.config.build.build",
        "moss_train.audio.io.torch.load",
        None,
        3,
    ],
)
def test_refuses_every_other_name(name):
    with pytest.raises(UserError, match=r"^training\.loss: _target_ .* (is not allowed|is not a class)"):
        build({"_target_": name, "x": 1}, path="training.loss")


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


@pytest.mark.parametrize("key", ["_args_", "_convert_x_", "__class__"])
def test_refuses_other_special_keys(key):
    with pytest.raises(UserError, match="not supported"):
        build({"_target_": "torch.nn.SiLU", key: [1]})


def test_refuses_interpolations_so_that_stored_data_cannot_read_the_environment():
    with pytest.raises(UserError, match=r"interpolation"):
        build({"_target_": "torch.nn.LeakyReLU", "negative_slope": "${oc.env:HOME}"})


def test_node_without_target():
    with pytest.raises(UserError, match="model has no _target_"):
        build({"width": 3}, path="model")


def test_name_that_does_not_exist():
    with pytest.raises(UserError, match=r"^loss: _target_ 'moss_train\.losses\.mel\.Nothing' cannot be found"):
        resolve_target("moss_train.losses.mel.Nothing", "loss")


def test_iterate_targets_lists_parents_first():
    node = {"a": {"_target_": "x", "b": [{"_target_": "y"}]}, "c": 1}
    assert [path for path, _ in iterate_targets(node)] == ["a", "a.b.0"]
