import shutil
from collections.abc import Callable

import pytest
import torch

from moss_train.cli.main import main
from moss_train.model.attention import rotation
from moss_train.training import CatModule
from moss_train.training.run.optimizations import checkpoint_activations, compiled_parts
from moss_train.training.run.warm_start import plan_initialization
from moss_train.training.step.optimizers import EMA
from moss_train.utils.errors import UserError

from ..faults.harness import assert_same_run, state, values
from .compiled_calls import CompiledCalls
from .gradients import accumulate, network_errors

ALL_OPTIONS = [
    "ema={decay: 0.9}",
    "trainer.activation_checkpointing=[100, 50]",
    "optimizers.generator.learning_rate_scale={quantizer: 2.0}",
    "+stages.0.schedule=wsd",
    "+stages.1.discriminator_every=2",
    "+stages.1.adversarial_ramp_updates=3",
]


def test_the_average_is_that_of_hand_and_can_be_swapped_in():
    layer = torch.nn.Linear(1, 1, bias=False)
    average = EMA(0.5)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        average.start(layer)
        layer.weight.fill_(2.0)
        average.add(0)  # decay 1 / 10
        assert average.state_dict()["weights"]["weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 2)
        layer.weight.fill_(3.0)
        average.add(100)  # decay 0.5
    expected = 0.5 * 1.9 + 0.5 * 3
    with average.swapped_in():
        assert layer.weight.item() == pytest.approx(expected)
        assert average.state_dict()["weights"]["weight"].item() == 3.0
    assert layer.weight.item() == 3.0
    again = EMA(0.5)
    again.load_state_dict(average.state_dict())
    again.start(layer)
    assert again.state_dict()["weights"]["weight"].item() == pytest.approx(expected)


def test_a_run_with_every_option_resumes_to_the_last_bit(small_overrides, tmp_path):
    """Averages are included; without `ema` there are none, and `averaged_weights` are the trained weights."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["fit", *small_overrides, *ALL_OPTIONS, f"run_dir={whole}"]) == 0
    for stop in (3, 6, 8):
        assert main(["fit", *small_overrides, *ALL_OPTIONS, f"run_dir={parts}", f"max_updates={stop}"]) == 0
    assert_same_run(parts, whole)
    assert [row["loss/discriminators"] != "" for row in values(whole)[4:]] == [True, False, True, False]
    averages, weights = state(whole)["ema"]["weights"], state(whole)["state_dict"]
    assert {f"tokenizer.{name}" for name in averages} == {name for name in weights if name.startswith("tokenizer.")}
    distances = [float((averages[name] - weights[f"tokenizer.{name}"]).norm()) for name in averages]
    assert min(distances) < 1e-3 < sum(distances)


def test_a_changed_setting_holds_after_a_resume(small_overrides, tmp_path):
    run = tmp_path / "run"
    assert main(["fit", *small_overrides, f"run_dir={run}", "max_updates=1"]) == 0
    changed = ["optimizers.generator.weight_decay=0.5", "optimizers.generator.learning_rate_scale={decoder: 3.0}"]
    options = ["max_updates=2", "allow_config_changes=true"]
    assert main(["fit", *small_overrides, *changed, f"run_dir={run}", *options]) == 0
    groups = state(run)["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert [round(group["lr"] / 1e-4) for group in groups] == [1, 1, 1, 1, 3, 3, 1, 1]


def test_recomputed_activations_give_the_same_gradients_and_are_not_kept(module, update):
    batches = update.micro_batches[:1]
    saved: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    def gradients() -> tuple[dict, int]:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return accumulate(module, batches, 0), sum(saved)

    kept, num_kept = gradients()
    checkpoint_activations(module.tokenizer, [100, 50])
    recomputed, _ = gradients()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        saved.clear()
        module.tokenizer.encode_latent(batches[0].audio)
        assert sum(saved) < num_kept
    with pytest.raises(UserError, match=r"no stage runs at \[99\] Hz, there are \[12\.5, 25"):
        checkpoint_activations(module.tokenizer, [99])


@pytest.mark.nightly  # ordinary runs compile one block and trace all parts in test_compile_graphs
def test_compiled_parts_give_the_same_gradients_under_the_same_names(module, update):
    """All parts are traced and differentiated by the compiler; the next test compiles one block completely."""
    batches = update.micro_batches[:1]
    eager, names = accumulate(module, batches, 6), list(module.state_dict())
    checkpoint_activations(module.tokenizer, [100])
    parts = CompiledCalls(module, "aot_eager")
    compiled = accumulate(module, batches, 6)
    assert parts.calls >= len(compiled_parts(module))
    assert parts.eager_calls == 0
    assert list(module.state_dict()) == names
    errors = network_errors(compiled, eager)
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the CPU compiler of torch.compile needs gcc")
def test_a_compiled_block_is_the_block(module):
    block = module.tokenizer.encoder[1].transformer.layers[0]
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    rotations = rotation(torch.arange(40)[None], 16, 10000)
    eager = block(x, rotations)
    block.compile()
    compiled = block(x, rotations)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(eager.square().sum(), block.linear1.weight)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.square().sum(), block.linear1.weight), expected, rtol=1e-3, atol=1e-4
    )


def test_in_bfloat16_the_quantizer_and_all_spectra_stay_float32(module, update):
    """Gradients under autocast have nearly the direction of those in float32, and weights and gradients are float32."""
    kinds: dict[str, set[torch.dtype]] = {}

    def note(name: str) -> Callable:
        def hook(part: torch.nn.Module, inputs: tuple, output: object) -> None:
            tensor = getattr(output, "quantized", output)
            tensor = tensor[0] if isinstance(tensor, list | tuple) else tensor
            kinds.setdefault(name, set()).add(tensor.dtype)

        return hook

    module.tokenizer.quantizer.register_forward_hook(note("quantizer"))
    module.tokenizer.encoder[1].transformer.layers[0].linear1.register_forward_hook(note("block"))
    module.discriminators.discriminators[0].layers[1].register_forward_hook(note("period"))
    spectral = module.discriminators.discriminators[-1]
    spectral.bands[0].register_forward_pre_hook(
        lambda part, inputs: kinds.setdefault("planes", set()).add(inputs[0].dtype)
    )
    batches = update.micro_batches[:1]
    exact = accumulate(module, batches, 6)
    kinds.clear()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = accumulate(module, batches, 6)
    assert kinds == {
        "quantizer": {torch.float32},
        "planes": {torch.float32},
        "block": {torch.bfloat16},
        "period": {torch.bfloat16},
    }
    assert {gradient.dtype for gradient in mixed.values()} == {torch.float32}
    for part in ("tokenizer.decoder", "semantic", "discriminators"):
        one, other = (torch.cat([g[n].flatten() for n in exact if n.startswith(part)]) for g in (exact, mixed))
        assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.9, part


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.activation_checkpointing=[99]", "no stage runs at [99] Hz"),
    ],
)
def test_impossible_options_are_one_line_and_leave_nothing(small_overrides, tmp_path, error_line, override, message):
    run = tmp_path / "run"
    assert message in error_line(["fit", *small_overrides, f"run_dir={run}", override])
    assert not run.exists()


def test_averages_stand_in_for_the_weights_in_validation(small_config):
    module = CatModule(**plan_initialization(small_config()).arguments)
    weight = module.tokenizer.decoder[0].input_proj.weight
    before = weight.detach().clone()
    with module.averaged_weights():  # without `ema`
        assert torch.equal(weight, before)
    module.average = EMA(0.0)
    module.average.start(module.tokenizer)
    with torch.no_grad():
        weight.add_(1.0)
    with module.averaged_weights():
        assert torch.equal(weight, before)
    assert torch.equal(weight, before + 1.0)
