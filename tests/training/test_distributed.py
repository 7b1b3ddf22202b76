import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from moss_train import load_config
from moss_train.batch import Batch, UpdateBatch
from moss_train.data.stream.loader import make_loader
from moss_train.export.load import tokenizer_config
from moss_train.training import CatModule
from moss_train.training.distributed.collectives import fingerprint, make_buckets, read_by_name, sum_by_name
from moss_train.training.run.fit import open_stream
from moss_train.training.run.warm_start import plan_initialization

from ..faults.harness import Launcher, assert_equal
from . import ranks
from .gradients import accumulate, network_errors, pick, without_text
from .runs import wait_for_end


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread like the ranks: a second thread sums in another order, which changes gradients in bfloat16."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_buckets_hold_every_parameter_once_and_one_dtype():
    sizes = [3, 5, 100, 2, 2]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    parameters[4] = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    found = [[p.numel() for p in bucket] for bucket in make_buckets(parameters, 40)]
    assert found == [[3, 5], [100], [2], [2]]


def test_numbers_of_one_process_come_back_by_name():
    values = {
        "host": {"a": 2, "b": True},
        "device": {"a": torch.tensor(1.5), "c": torch.tensor(float("nan"))},
        "none": {},
        "more": {"d": 7.0},
    }
    numbers = read_by_name(sum_by_name(values, torch.device("cpu")), values)
    assert (numbers["host"], numbers["none"], numbers["more"]) == ({"a": 2.0, "b": 1.0}, {}, {"d": 7.0})
    assert numbers["device"]["a"] == 1.5
    assert math.isnan(numbers["device"]["c"])


def test_a_fingerprint_sees_one_bit():
    layer = nn.Linear(30, 20)
    before = fingerprint(layer)
    assert fingerprint(layer) == before
    with torch.no_grad():
        layer.weight[3, 7] = torch.nextafter(layer.weight[3, 7], torch.tensor(9.0))
    assert fingerprint(layer) != before


def split(batch: UpdateBatch, on_first: list[bool]) -> tuple[UpdateBatch, UpdateBatch]:
    """Distribute the clips in order to two ranks, each micro-batch separately."""
    wanted, parts = iter(on_first), ([], [])
    for micro in batch.micro_batches:
        first = [next(wanted) for _ in range(micro.num_clips)]
        for rank, part in enumerate(parts):
            if chosen := [i for i, is_first in enumerate(first) if is_first == (rank == 0)]:
                part.append(pick(micro, chosen))
    return replace(batch, micro_batches=tuple(parts[0])), replace(batch, micro_batches=tuple(parts[1]))


@pytest.fixture(scope="module")
def update(small_overrides) -> tuple[dict, UpdateBatch]:
    """Return module arguments of the small recipe and a real update of several micro-batches, some clips with text.

    Update 0 belongs to a stage without quantizer.
    """
    config = load_config("fit", [*small_overrides, "run_dir=unused"])
    reconstruction, adversarial = config.stages
    continuous = reconstruction.replace(name="continuous", updates=1, quantize=False)
    config = config.replace(stages=[continuous, reconstruction.replace(semantic_warmup_updates=1), adversarial])
    arguments = plan_initialization(config).arguments
    stream = open_stream(config, tokenizer_config(config.tokenizer.to_plain()))
    text_encoder = CatModule(**arguments).semantic.text
    loader = make_loader(stream, text_encoder=text_encoder, position=0, updates=[(0, 12.0)], micro_batch_seconds=8.0)
    return arguments, next(iter(loader))


@pytest.fixture(scope="module")
def cases(update) -> list[tuple[UpdateBatch, list[bool], int]]:
    """Return cases: whole update, clips of the first of two ranks, update number. Ranks are unequal.

    In update 1 the text LM does not train the tokenizer yet.
    """
    _, batch = update
    has_text = [bool(length) for micro in batch.micro_batches for length in micro.text_lengths.tolist()]
    alternate = [i % 3 == 0 for i in range(len(has_text))]
    assert 0 < sum(has_text) < len(has_text)
    silent = without_text(batch)
    return [
        (batch, [not text for text in has_text], 1),
        (batch, alternate, 4),
        (batch, alternate, 7),
        (batch, [not text for text in has_text], 7),  # a rank without text
        (batch, [True] * len(has_text), 7),  # a rank without clips
        (silent, alternate, 6),
        (batch, alternate, 0),
        (batch, [True] * len(has_text), 0),
    ]


@pytest.fixture(scope="module")
def half_cases(update) -> list[tuple[tuple[UpdateBatch, UpdateBatch], int]]:
    """Return for each case the micro-batches (of one clip) of each of two ranks, and the number of the update.

    One and two micro-batches with text on one rank, and finally three on one rank and one on the other.
    """
    _, batch = update
    clips = [pick(micro, [i]) for micro in batch.micro_batches for i in range(micro.num_clips)]
    spoken = sorted((clip for clip in clips if clip.text_lengths[0]), key=lambda clip: clip.audio.shape[-1])[:2]
    silent = sorted((clip for clip in clips if not clip.text_lengths[0]), key=lambda clip: clip.audio.shape[-1])[:2]
    assert len(spoken) == len(silent) == 2

    def some(clips: list[Batch], count: int) -> UpdateBatch:
        return replace(batch, micro_batches=tuple(clips[i % 2] for i in range(count)))

    return [((some(spoken, first), some(silent, second)), 6) for first, second in ((1, 1), (2, 2), (3, 1))]


@pytest.fixture(scope="module")
def folder(launcher: Launcher, update, cases, half_cases, tmp_path_factory) -> Path:
    """Store the results of two processes, both with full copies and with sharding."""
    folder = tmp_path_factory.mktemp("ranks")
    work = {
        "arguments": update[0],
        "cases": [(split(whole, first), number) for whole, first, number in cases],
        "half_cases": half_cases,
    }
    torch.save(work, folder / "work.pt")
    wait_for_end([launcher.start_script(ranks.__file__, str(folder), str(rank), "2") for rank in range(2)])
    return folder


def test_gradients_are_summed_beside_the_last_pass(folder):
    for rank in range(2):
        for named, result in zip((True, False), torch.load(folder / f"sums{rank}.pt"), strict=True):
            assert result["sent"] == ((6, 6) if named else (0, 6)), rank  # the text network is first in order
            assert result["missing"] == [False] * 4 + [rank == 1] * 2
            assert_equal(result["found"], result["expected"])


@pytest.fixture(scope="module")
def alone(update, cases) -> list[tuple[dict, dict[str, float]]]:
    """Return the results of a single process for every case."""
    return [ranks.gradients(update[0], whole, number) for whole, _, number in cases]


@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
def test_two_processes_give_the_gradients_of_one(cases, alone, folder, strategy):
    results = [torch.load(folder / f"{strategy}{rank}.pt") for rank in range(2)]
    for (whole, _, _), (expected, numbers), *both in zip(cases, alone, *results, strict=True):
        for found, found_numbers in both:
            assert found.keys() == expected.keys()
            errors = network_errors(found, expected)
            assert max(errors.values()) < 1e-5, errors
            assert found_numbers.keys() == numbers.keys()
            assert found_numbers["loss/generator"] == pytest.approx(numbers["loss/generator"], rel=1e-6)
            for name in ("gradient_norm/encoder", "output/reconstruction"):
                assert found_numbers[name] == pytest.approx(numbers[name], rel=1e-4), name
            assert found_numbers["clips"] == sum(micro.num_clips for micro in whole.micro_batches)
    assert not any(name.startswith("semantic.") for name in results[0][5][0])


@pytest.mark.parametrize(("strategy", "keeps_casts"), [("replicated", True), ("sharded", False), ("sharded", True)])
def test_two_processes_give_the_gradients_of_one_in_bfloat16(update, half_cases, folder, strategy, keeps_casts):
    """The single process casts at each use. The tolerance covers float32 sums in another order.

    If autocast caches cast weights, plain FSDP2 adds the last micro-batch's gradients one update late: the difference
    was 77 % of the norm.
    """
    results = [torch.load(folder / f"{strategy}_half_{keeps_casts}{rank}.pt") for rank in range(2)]
    for (parts, number), *both in zip(half_cases, *results, strict=True):
        module = CatModule(**update[0])
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            expected = accumulate(module, (*parts[0].micro_batches, *parts[1].micro_batches), number)
        for found, numbers in both:
            assert found.keys() == expected.keys()
            errors = network_errors(found, expected)
            assert max(errors.values()) < 1e-4, errors
            assert numbers == both[0][1]
