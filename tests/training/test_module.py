from dataclasses import replace

import pytest
import torch

from moss_train.data.loader import make_loader
from moss_train.export.loading import tokenizer_config
from moss_train.training import CatModule, micro_batches
from moss_train.training.initialization import module_arguments
from moss_train.training.run import open_stream
from moss_train.types import Batch, UpdateBatch
from moss_train.utils.errors import UserError

FIRST_LAYER = "encoder.1.transformer.layers.0.self_attn.in_projs.0.weight"


@pytest.fixture
def module(small_config) -> CatModule:
    return CatModule(**module_arguments(small_config()))


@pytest.fixture
def update(small_config, module) -> UpdateBatch:
    """A real update with more than one micro-batch, with and without text."""
    config = small_config()
    stream = open_stream(config, tokenizer_config(config["tokenizer"]))
    loader = make_loader(
        stream, text_encoder=module.semantic.text, position=0, updates=[(0, 16.0)], micro_batch_seconds=8.0
    )
    batch = next(iter(loader))
    assert len(batch.micro_batches) > 1
    return batch


def accumulate(module: CatModule, batches: tuple[Batch, ...], number: int) -> dict[str, torch.Tensor]:
    """Gradients of update `number` over the given micro-batches, by parameter name."""
    module.manual_backward = lambda loss, **options: loss.backward(**options)  # outside a Trainer
    module.zero_grad()
    counts = module.objective.count(batches)
    for batch in batches:
        micro_batches.accumulate(module, batch, counts, module.schedule.at(number))
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def with_text(batch: UpdateBatch) -> Batch:
    """One clip that has text, alone."""
    micro = next(micro for micro in batch.micro_batches if (micro.text_lengths > 0).any())
    return pick(micro, int((micro.text_lengths > 0).nonzero()[0]))


def pick(batch: Batch, index: int) -> Batch:
    tensors = {name: value[index : index + 1] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **tensors, sample_ids=batch.sample_ids[index : index + 1], domains=batch.domains[:1])


def without_text(batch: Batch) -> Batch:
    return replace(batch, text_lengths=torch.zeros_like(batch.text_lengths))


def test_the_language_model_teaches_the_first_encoder_layer(module, update):
    batch = with_text(update)
    module.objective.weights = dict.fromkeys(module.objective.weights, 0.0) | {"semantic": 20.0}
    gradients = accumulate(module, (batch,), 0)
    assert gradients[f"tokenizer.{FIRST_LAYER}"].abs().max() > 1e-6
    assert gradients["semantic.task_tags.weight"].abs().max() > 1e-6
    gradients = accumulate(module, (without_text(batch),), 0)
    assert gradients[f"tokenizer.{FIRST_LAYER}"].abs().max() == 0
    assert not any(name.startswith("semantic.") for name in gradients)


def test_every_part_learns_from_a_batch_with_text(module, update):
    gradients = accumulate(module, update.micro_batches, 6)
    silent = [name for name, p in module.named_parameters() if name not in gradients or not gradients[name].any()]
    # Codebook rows that nothing chose stay, whole tensors do not; the one unused task tag is a row as well.
    assert silent == []


def test_micro_batches_add_up_to_one_batch(module, update):
    """Gradients of the update and of the same clips one by one agree to 1e-5 of their norm, on both sides."""
    singles = tuple(pick(batch, i) for batch in update.micro_batches for i in range(batch.num_clips))
    together, apart = accumulate(module, update.micro_batches, 6), accumulate(module, singles, 6)
    assert together.keys() == apart.keys()
    for part in ("tokenizer", "semantic", "discriminators"):
        names = [name for name in together if name.startswith(part)]
        norm = torch.stack([together[name].norm() for name in names]).norm()
        error = torch.stack([(together[name] - apart[name]).norm() for name in names]).norm()
        assert norm > 0, part
        assert error / norm < 1e-5, part


def test_neither_side_leaks_into_the_other(module, update):
    """The discriminators' gradient is that of their own loss; the generator's has no share of it."""
    batch = update.micro_batches[0]
    joint = accumulate(module, (batch,), 6)
    module.objective.weights = module.objective.weights | {"adversarial": 0.0, "feature": 0.0}
    alone = accumulate(module, (batch,), 6)
    before = accumulate(module, (batch,), 4)  # the discriminators' head start
    names = [name for name in joint if name.startswith("discriminators")]
    assert all(torch.equal(joint[name], alone[name]) for name in names)
    generator = [name for name in alone if name.startswith("tokenizer")]
    torch.testing.assert_close([alone[name] for name in generator], [before[name] for name in generator])
    assert not torch.equal(joint[f"tokenizer.{FIRST_LAYER}"], alone[f"tokenizer.{FIRST_LAYER}"])


def test_stages_choose_what_learns(small_config, update):
    config = small_config("train=[decoder]")
    module = CatModule(**module_arguments(config))
    module._choose_parts(module.schedule.at(0))
    gradients = accumulate(module, update.micro_batches, 0)
    assert gradients
    assert all(name.startswith("tokenizer.decoder.") for name in gradients)


def test_quantizer_dropout_reaches_every_level_count(module, update, monkeypatch):
    units = torch.linspace(0, 0.9999, 400)
    batch = replace(update.micro_batches[0], quantizer_units=units)
    assert module.num_quantizers(batch).bincount().tolist() == [0, 100, 100, 100, 100]
    monkeypatch.setattr(module.objective, "quantizer_dropout", 0.5)
    assert module.num_quantizers(batch).bincount().tolist() == [0, 50, 50, 50, 250]
    monkeypatch.setattr(module.objective, "quantizer_dropout", 0.0)
    assert module.num_quantizers(batch).unique().tolist() == [4]


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone(small_config):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = CatModule(**module_arguments(small_config()))
    assert torch.equal(torch.rand(1), expected)
    two, other = (CatModule(**module_arguments(small_config(f"seed={seed}"))) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.tokenizer.get_parameter(FIRST_LAYER), other.tokenizer.get_parameter(FIRST_LAYER))


def test_an_adversarial_stage_needs_discriminators(small_config):
    with pytest.raises(ValueError, match="no discriminators"):
        CatModule(**module_arguments(small_config("discriminators=[]")))


def test_unknown_arguments_name_their_place(small_config):
    with pytest.raises(UserError, match=r"discriminators\[0\].*num_periods"):
        CatModule(**module_arguments(small_config("+discriminators.0.num_periods=3")))
