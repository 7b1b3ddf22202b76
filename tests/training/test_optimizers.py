import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moss_train.config.recipe_schema import GeneratorOptimizerConfig
from moss_train.model.transformer import TransformerLayer
from moss_train.training.step.optimizers import (
    build_adamw,
    group_options,
    parameter_groups,
    restore_options,
    set_learning_rate,
    squared_norm,
    step_clipped,
)
from moss_train.utils.errors import ConfigError

from ..faults.harness import assert_equal


def test_only_matrices_decay():
    layer = TransformerLayer(8, 2, 16, window=4, layer_scale=0.01)
    modules = [layer, nn.Embedding(3, 4), nn.Conv1d(2, 3, 1)]
    decayed, exempt = parameter_groups(modules, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert exempt["weight_decay"] == 0.0
    names = {id(p): name for module in modules for name, p in module.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "self_attn.in_projs.0.weight",
        "self_attn.out_projs.0.weight",
        "linear1.weight",
        "linear2.weight",
        "weight",  # of the convolution
    }
    assert len(decayed["params"]) + len(exempt["params"]) == sum(1 for m in modules for _ in m.parameters())


def test_of_the_whole_recipe_norms_biases_gains_codebooks_and_embeddings_do_not_decay(module):
    names = {id(p): name for name, p in module.named_parameters()}
    decayed, exempt = set(), set()
    for optimizer in module.configure_optimizers():
        for number, group in enumerate(optimizer.param_groups):
            (exempt if number % 2 else decayed).update(names[id(p)] for p in group["params"])
    assert decayed | exempt == set(names.values())
    words = ("norm", "bias", "layer_scale", "codebook", "embed_tokens", "task_tags", "original0", "weight_g")
    assert {name for name in names.values() if any(word in name for word in words)} == exempt
    kinds = ("norm1.weight", "layer_scale_1.scale", "codebook.weight", "embed_tokens.weight", "layers.0.bias")
    for kind in kinds:
        assert any(name.endswith(kind) for name in exempt), kind


def test_a_shared_parameter_is_optimised_once():
    head, tied, embedding = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Embedding(4, 4)
    tied.weight = head.weight
    optimizer = build_adamw({"semantic": nn.ModuleList([head, tied])}, GeneratorOptimizerConfig(betas=[0.8, 0.9]))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
    tied.weight = embedding.weight
    groups = parameter_groups([tied, embedding], 0.1)
    assert [len(group["params"]) for group in groups] == [0, 1]
    assert optimizer.defaults["betas"] == (0.8, 0.9)


def trained(steps, fused, state=None, options=None):
    """Return a network after some AdamW steps with scaled gradients, continued from a state if one is given."""
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    optimizer = build_adamw({"encoder": part}, GeneratorOptimizerConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        group["fused"] = fused
    wrapper = SimpleNamespace(optimizer=optimizer, step=optimizer.step)
    if state is not None:
        part.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        restore_options(optimizer, [{"fused": fused}] * 2)
    for step in steps:
        part(torch.full((2, 7), 0.1 * step)).square().sum().backward()
        factor = 1 / (1 + step)
        if fused:
            step_clipped(wrapper, 1e-2, torch.tensor(factor, dtype=torch.float64), torch.tensor(True))
        else:
            for parameter in part.parameters():
                parameter.grad *= factor
            set_learning_rate(optimizer, 1e-2)
            optimizer.step()
        optimizer.zero_grad()
    return copy.deepcopy((part.state_dict(), optimizer.state_dict()))


def weights_and_moments(state):
    return {
        **state[0],
        **{f"{key}.{name}": v for key, values in state[1]["state"].items() for name, v in values.items()},
    }


def test_a_fused_step_is_that_of_the_formulas():
    fused, plain = (weights_and_moments(trained(range(5), fused)) for fused in (True, False))
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert fused["0.step"].item() == 5.0


def test_a_fused_run_goes_on_to_the_last_bit_also_from_one_that_was_not():
    for fused in (True, False):
        begun, whole = trained(range(3), fused), trained(range(5), True)
        went_on = trained(range(3, 5), True, begun)
        for name, value in weights_and_moments(whole).items():
            found = weights_and_moments(went_on)[name]
            tolerance = {"rtol": 0, "atol": 0} if fused else {"rtol": 1e-5, "atol": 1e-7}
            torch.testing.assert_close(found, value, **tolerance, msg=name)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_every_bit(bad):
    part = nn.Linear(3, 2)
    optimizer = build_adamw({"encoder": part}, GeneratorOptimizerConfig())
    wrapper = SimpleNamespace(optimizer=optimizer, step=optimizer.step)
    kept = []
    for gradient in (1.0, bad):
        for parameter in part.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        step_clipped(wrapper, 1e-2, torch.tensor(0.5), torch.tensor(gradient == 1.0))
        kept.append(copy.deepcopy((part.state_dict(), optimizer.state_dict()["state"])))
    assert_equal(*kept)
    assert optimizer.grad_scale is None
    assert optimizer.found_inf is None


def test_a_step_on_a_gpu_does_not_wait_for_it():
    """The host cannot read values of tensors without data: factor and check stay on the device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        part = nn.Module()
        part.weight = nn.Parameter(torch.empty(3, 3, device="cuda"))
        optimizer = build_adamw({"encoder": part}, GeneratorOptimizerConfig())
        wrapper = SimpleNamespace(optimizer=optimizer, step=optimizer.step)
        for _ in range(2):
            part.weight.grad = torch.empty(3, 3, device="cuda")
            factor = (1.0 / squared_norm([part.weight]).sqrt()).clamp(max=1.0)
            step_clipped(wrapper, 1e-2, factor, factor.isfinite())
        assert optimizer.state[part.weight]["step"].device.type == "cuda"


def test_the_norm_is_that_of_all_gradients():
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert squared_norm(parameters).item() == 25.0
    assert squared_norm(parameters[2:]).item() == 0.0


def test_parts_learn_at_their_own_rates():
    parts = {"encoder": nn.Linear(2, 2), "quantizer": nn.Linear(2, 2)}
    optimizer = build_adamw(parts, GeneratorOptimizerConfig.parse({"learning_rate_scale": {"quantizer": 2.0}}))
    set_learning_rate(optimizer, 1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 2e-3, 2e-3]


def test_parts_decay_by_their_own_factors():
    parts = {"encoder": nn.Linear(2, 2), "semantic": nn.Linear(2, 2)}
    settings = {"weight_decay": 0.01, "weight_decay_scale": {"semantic": 50.0}}
    optimizer = build_adamw(parts, GeneratorOptimizerConfig.parse(settings))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0, 0.5, 0.0]


@pytest.mark.parametrize("moved", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_a_run_goes_on_where_it_did_not_begin(moved):
    """AdamW needs its step counts on the device of the weights, but a checkpoint restores them on the host."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizers = []
        for device in moved:
            part = nn.Module()
            part.weight = nn.Parameter(torch.empty(3, 3, device=device))
            optimizers.append(build_adamw({"encoder": part}, GeneratorOptimizerConfig(weight_decay=0.25)))
        old, new = optimizers
        for group in old.param_groups:
            for parameter in group["params"]:
                zeros = torch.zeros_like(parameter)
                step = torch.tensor(7.0, device=parameter.device)
                old.state[parameter] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros}
        saved = old.state_dict()
        saved["state"] = {
            key: {name: value.to("cpu") for name, value in state.items()} for key, state in saved["state"].items()
        }
        options = group_options(new)
        new.load_state_dict(saved)
        restore_options(new, options)
        assert [group["fused"] for group in new.param_groups] == [True, True]
        (state,) = new.state.values()
        assert {name: value.device.type for name, value in state.items()} == dict.fromkeys(state, moved[1])
        assert state["step"].dtype == torch.float32


@pytest.mark.parametrize(
    ("key", "factor", "kind"),
    [
        ("learning_rate_scale.codebook", 2.0, "unknown_key"),
        ("learning_rate_scale.encoder", 0, "value"),
        ("weight_decay_scale.lm", 2.0, "unknown_key"),
        ("weight_decay_scale.encoder", -1.0, "value"),
    ],
)
def test_factors_are_of_parts_and_possible(key, factor, kind):
    section, part = key.split(".")
    with pytest.raises(ConfigError) as caught:
        GeneratorOptimizerConfig.parse({section: {part: factor}})
    assert (caught.value.kind, caught.value.path, caught.value.value) == (kind, key, factor)
