from dataclasses import replace

import pytest
import torch

from moss_train.batch import Batch, UpdateBatch
from moss_train.training import CatModule
from moss_train.training.run.warm_start import plan_initialization
from moss_train.training.step.schedule import Schedule
from moss_train.utils.errors import UserError

from .gradients import accumulate, network_errors, pick

FIRST_LAYER = "encoder.1.transformer.layers.0.self_attn.in_projs.0.weight"


def with_text(batch: UpdateBatch) -> Batch:
    """Return a batch with a single clip that has text."""
    micro = next(micro for micro in batch.micro_batches if (micro.text_lengths > 0).any())
    return pick(micro, [int((micro.text_lengths > 0).nonzero()[0])])


def test_the_language_model_teaches_the_first_encoder_layer(module, update):
    batch = with_text(update)
    module.objective.weights = dict.fromkeys(module.objective.weights, 0.0) | {"semantic": 20.0}
    gradients = accumulate(module, (batch,), 0)
    assert gradients[f"tokenizer.{FIRST_LAYER}"].abs().max() > 1e-6
    assert gradients["semantic.task_tags.weight"].abs().max() > 1e-6
    gradients = accumulate(module, (replace(batch, text_lengths=torch.zeros_like(batch.text_lengths)),), 0)
    assert gradients[f"tokenizer.{FIRST_LAYER}"].abs().max() == 0
    assert not any(name.startswith("semantic.") for name in gradients)


def test_every_part_learns_from_a_batch_with_text(module, update):
    gradients = accumulate(module, update.micro_batches, 6)
    silent = [name for name, p in module.named_parameters() if name not in gradients or not gradients[name].any()]
    # Unused codebook rows and the unused task tag have no gradient, but every tensor as a whole has one.
    assert silent == []


def test_micro_batches_add_up_to_one_batch(module, update):
    """Gradients of the update and of the same clips one by one agree to 1e-5 of their norm, for both networks."""
    singles = tuple(pick(batch, [i]) for batch in update.micro_batches for i in range(batch.num_clips))
    together, apart = accumulate(module, update.micro_batches, 6), accumulate(module, singles, 6)
    assert together.keys() == apart.keys()
    errors = network_errors(apart, together)
    assert errors.keys() == {"tokenizer", "semantic", "discriminators"}
    assert max(errors.values()) < 1e-5, errors


def test_discriminators_that_do_not_learn_judge_all_the_same(module, update):
    """The generator's gradient equals that of an update in which they are trained; they get none."""
    batch = update.micro_batches[:1]
    both = accumulate(module, batch, 6)
    stage = replace(module.schedule.stages[1], discriminator_every=2)
    module.schedule = Schedule((module.schedule.stages[0], stage))
    assert not module.schedule.at(7).discriminators_learn
    adversarial_only = accumulate(module, batch, 7)
    assert not any(name.startswith("discriminators") for name in adversarial_only)
    torch.testing.assert_close(adversarial_only, {name: both[name] for name in adversarial_only})


def test_adversarial_terms_grow_along_the_ramp(module, update):
    """Half-way up the ramp, the adversarial part of the generator's gradient is half of its final value."""
    batch = update.micro_batches[:1]
    without, full = accumulate(module, batch, 4), accumulate(module, batch, 6)
    stage = replace(module.schedule.stages[1], adversarial_ramp_updates=4)
    module.schedule = Schedule((module.schedule.stages[0], stage))
    assert [module.schedule.at(4 + i).adversarial_ramp for i in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    half = accumulate(module, batch, 6)
    name = next(name for name in full if name.startswith("tokenizer.decoder.") and name.endswith("linear2.weight"))
    torch.testing.assert_close(2 * (half[name] - without[name]), full[name] - without[name], rtol=1e-3, atol=1e-4)


def test_neither_side_leaks_into_the_other(module, update):
    """The discriminators' gradient comes from their own loss only; the generator's has no part of it."""
    batch = update.micro_batches[0]
    joint = accumulate(module, (batch,), 6)
    module.objective.weights = module.objective.weights | {"adversarial": 0.0, "feature": 0.0}
    alone = accumulate(module, (batch,), 6)
    before = accumulate(module, (batch,), 4)  # the discriminators' warm-up
    names = [name for name in joint if name.startswith("discriminators")]
    assert all(torch.equal(joint[name], alone[name]) for name in names)
    generator = [name for name in alone if name.startswith("tokenizer")]
    torch.testing.assert_close([alone[name] for name in generator], [before[name] for name in generator])
    assert not torch.equal(joint[f"tokenizer.{FIRST_LAYER}"], alone[f"tokenizer.{FIRST_LAYER}"])


def test_stages_choose_what_learns(small_config, update):
    config = small_config("trainable=[decoder]")
    module = CatModule(**plan_initialization(config).arguments)
    module._choose_parts(module.schedule.at(0))
    gradients = accumulate(module, update.micro_batches, 0)
    assert gradients
    assert all(name.startswith("tokenizer.decoder.") for name in gradients)


def test_quantizer_dropout_reaches_every_level_count(module, update, monkeypatch):
    units = torch.linspace(0, 0.9999, 400)
    batch = replace(update.micro_batches[0], quantizer_uniform=units)

    def count() -> list[int]:
        return module.objective.num_quantizers(batch, 4).bincount().tolist()

    assert count() == [0, 100, 100, 100, 100]
    monkeypatch.setattr(module.objective, "quantizer_dropout", 0.5)
    assert count() == [0, 50, 50, 50, 250]
    monkeypatch.setattr(module.objective, "quantizer_dropout", 0.0)
    assert count() == [0, 0, 0, 0, 400]


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone(small_config):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = CatModule(**plan_initialization(small_config()).arguments)
    assert torch.equal(torch.rand(1), expected)
    two, other = (CatModule(**plan_initialization(small_config(f"seed={seed}")).arguments) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.tokenizer.get_parameter(FIRST_LAYER), other.tokenizer.get_parameter(FIRST_LAYER))


def test_an_adversarial_stage_needs_discriminators(small_config):
    with pytest.raises(ValueError, match="no discriminators"):
        CatModule(**plan_initialization(small_config()).arguments | {"discriminators": []})


def test_an_adversarial_stage_needs_a_loss_that_trains_them(small_config):
    config = small_config("objective.losses.adversarial=null")
    with pytest.raises(ValueError, match=r"objective\.losses has none that trains the discriminators"):
        CatModule(**plan_initialization(config).arguments)


def test_unknown_arguments_name_their_place(small_config):
    with pytest.raises(UserError, match=r"discriminators\[0\].*num_periods"):
        CatModule(**plan_initialization(small_config("+discriminators.0.num_periods=3")).arguments)


def test_a_full_device_is_one_line_that_says_what_to_do(module, update):
    def allocate(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    module.tokenizer.decoder[0].register_forward_pre_hook(allocate)
    module.optimizer_groups = lambda schedule_state: []  # outside a Trainer
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    largest = max((batch.audio for batch in update.micro_batches), key=torch.Tensor.numel)
    size = rf"{largest.shape[0]} clips of {largest.shape[2] / 24000:.1f} s"
    with pytest.raises(
        UserError, match=rf"out of memory on cpu in update 0, .* {size}: use trainer.precision"
    ) as caught:
        module.training_step(update, 0)
    assert "\n" not in str(caught.value)
    assert module.update == 0
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
