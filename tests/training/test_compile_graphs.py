"""The graphs that torch.compile makes of four unlike stages, many clip lengths, an LM and all discriminators."""

import sysconfig
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from moss_train.batch import Batch
from moss_train.training import CatModule
from moss_train.training.run.optimizations import RECOMPILE_LIMIT, choose_compile, compile_blocks

from .compiled_calls import CompiledCalls
from .gradients import accumulate, network_errors

RATE, HOP = 24000, 1920
MOST_GRAPHS = 70  # four stages, clips within and beyond the window, a batch of one, LM, eight discriminators
FIRST_OF_ADVERSARIAL = 10
LENGTHS = ([48000] * 3, [72000, 60000], [36000] * 4, [19000] * 5, [96000])  # samples; the last is a batch of one


def stage(patch: int, width: int, d_model: int, heads: int, layers: int) -> dict:
    names = ("patch_size", "output_dimension", "d_model", "num_heads", "num_layers")
    return dict(zip(names, (patch, width, d_model, heads, layers), strict=True))


@pytest.fixture
def unlike() -> Iterator[CatModule]:
    """The structure of `cat_1b6`: windows of 100, 50, 25 and 12 frames, the last stage wider than the others."""
    torch._dynamo.reset()
    stages = [stage(240, 16, 32, 2, 1), stage(2, 16, 32, 2, 1), stage(2, 32, 32, 2, 1), stage(2, 32, 64, 4, 2)]
    quantizer = {"rvq_dim": 24, "num_quantizers": 4, "codebook_size": 32, "codebook_dim": 8}
    language_model = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    periods = {"periods": [2, 3, 5, 7, 11], "channels": [4, 8]}
    yield CatModule(
        {"sampling_rate": RATE, "context_seconds": 1.0, "stages": stages, "quantizer": quantizer},
        [
            {"name": "first", "updates": FIRST_OF_ADVERSARIAL, "batch_seconds": 10.0},
            {"name": "second", "updates": 10, "batch_seconds": 10.0, "adversarial": True},
        ],
        semantic={
            "_target_": "moss_train.semantic.TextLM",
            "text": {"_target_": "moss_train.semantic.ByteText"},
            "config": language_model,
        },
        discriminators=[
            {"_target_": "moss_train.discriminators.MultiPeriodDiscriminator", **periods},
            {"_target_": "moss_train.discriminators.MultiResolutionSTFTDiscriminator", "channels": 2},
        ],
        objective={"discriminator_crop_seconds": 0.25},
    ).train()
    torch._dynamo.reset()


def clips(lengths: list[int], seed: int) -> Batch:
    random = torch.Generator().manual_seed(seed)
    count, frames, tokens = len(lengths), -(-max(lengths) // HOP), 7 + seed
    return Batch(
        audio=0.1 * torch.randn(count, 1, frames * HOP, generator=random),
        audio_lengths=torch.tensor(lengths),
        text_tokens=torch.randint(0, 200, (count, tokens), generator=random),
        text_lengths=torch.full((count,), tokens),
        task_ids=torch.zeros(count, dtype=torch.int64),
        quantizer_uniform=torch.rand(count, generator=random),
        crop_uniform=torch.rand(count, generator=random),
        sample_ids=tuple(map(str, range(count))),
        domains=("speech",) * count,
    )


def gradients(module: CatModule, lengths: list[int], update: int) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return accumulate(module, (clips(lengths, len(lengths)),), update)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("update", [0, pytest.param(FIRST_OF_ADVERSARIAL, marks=pytest.mark.nightly)])
def test_every_part_runs_a_graph_and_few_graphs_serve_all_lengths(unlike, update):
    parts = CompiledCalls(unlike, "eager")
    graphs = []
    for lengths in (*LENGTHS, [80000, 77000], [30000] * 6):
        gradients(unlike, lengths, update)
        graphs.append(parts.graphs)
    assert torch._dynamo.config.fail_on_recompile_limit_hit  # until a limit is hit
    assert parts.eager_calls == 0
    assert parts.calls == 7 * (10 + 1 + (16 if update else 0))
    assert graphs[-1] == graphs[len(LENGTHS) - 1] <= (MOST_GRAPHS if update else MOST_GRAPHS // 2)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_compiled_gradients_are_those_of_an_eager_pass_for_every_length(unlike):
    eager = [gradients(unlike, lengths, FIRST_OF_ADVERSARIAL) for lengths in LENGTHS]
    compile_blocks(unlike, "aot_eager")
    for lengths, expected in zip(LENGTHS, eager, strict=True):
        errors = network_errors(gradients(unlike, lengths, FIRST_OF_ADVERSARIAL), expected)
        assert max(errors.values()) < 2e-2, (lengths, errors)  # matrix products in bfloat16


def test_a_limit_that_is_hit_is_said_aloud_once_and_the_run_goes_on(unlike, capsys):
    expected = gradients(unlike, LENGTHS[2], 0)
    parts = CompiledCalls(unlike, "eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for lengths in LENGTHS[:2]:
            gradients(unlike, lengths, 0)
        graphs = parts.graphs
        found = gradients(unlike, LENGTHS[2], 0)
        assert parts.graphs == graphs
    assert not torch._dynamo.config.fail_on_recompile_limit_hit
    assert capsys.readouterr().err.count("trainer.compile: ") == 1
    errors = network_errors(found, expected)
    assert max(errors.values()) < 2e-2, errors


def in_a_thread(function: Callable[[], None]) -> None:
    """Call a function in a new thread, where autograd runs a backward pass on a GPU, and raise its error here."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_both_backward_passes_of_discriminators_run_in_a_thread_of_autograd(unlike):
    """The assignment of an option of torch holds for its own thread only."""
    compile_blocks(unlike, "aot_eager")
    discriminator, audio = unlike.discriminators.discriminators[0], torch.randn(2, 1, 600, requires_grad=True)
    score = discriminator(audio).logits.square().mean()
    in_a_thread(lambda: score.backward(inputs=list(discriminator.parameters()), retain_graph=True))
    in_a_thread(lambda: score.backward(inputs=[audio]))
    assert audio.grad.norm() > 0
    seen = []
    in_a_thread(lambda: seen.append(torch._dynamo.config.recompile_limit))
    assert seen[0] >= RECOMPILE_LIMIT


def test_passes_without_gradients_make_no_graphs(unlike):
    parts = CompiledCalls(unlike, "eager")
    with torch.no_grad():
        unlike.tokenizer.encode(torch.zeros(1, 1, 8 * HOP))
    assert parts.calls == parts.eager_calls > 0
    assert parts.graphs == 0


@pytest.mark.parametrize(
    ("wanted", "accelerator", "backend"),
    [("auto", "cpu", None), (False, "cuda", None), (True, "cpu", "inductor"), ("aot_eager", "cuda", "aot_eager")],
)
def test_the_backend_that_a_setting_means(wanted, accelerator, backend):
    assert choose_compile(wanted, accelerator) == backend


def test_auto_goes_without_where_kernels_cannot_be_built(monkeypatch, capsys, tmp_path):
    """Triton compiles against Python.h, which Debian has in a package of its own, with the compiler in CC if set."""
    compiler = tmp_path / "gcc"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"include": str(tmp_path)})
    assert choose_compile("auto", "cuda") is None
    assert "python3-dev" in capsys.readouterr().err
    (tmp_path / "Python.h").write_text("")
    assert choose_compile("auto", "cuda") == "inductor"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert choose_compile("auto", "cuda") is None
    assert "C compiler" in capsys.readouterr().err
