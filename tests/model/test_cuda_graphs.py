"""Requirements for capturing a streaming step in a CUDA graph, checked without a GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moss_train.model.accelerated_step import GraphedStep

from .small_models import HOP, small_model

# A step cannot be captured if the host reads a device value or if a shape depends on values.
FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "is_pinned")


class RefuseHostReads(TorchDispatchMode):
    """Raises for every operation that makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name.startswith(refused) for refused in FORBIDDEN), f"{name} makes the host wait"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def stream():
    return small_model(12).stream(2)


def inputs(frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, frames * HOP, generator=generator), torch.tensor([frames, frames // 2])


@pytest.mark.parametrize("frames", [1, 4, 9])
def test_a_step_never_reads_from_the_device(stream, frames):
    audio, num_frames = inputs(frames)
    with torch.no_grad(), RefuseHostReads():
        codes = stream.groups[0].encode_step(audio, num_frames)
        stream.groups[0].decode_step(codes, num_frames)
    with pytest.raises(AssertionError, match="makes the host wait"), RefuseHostReads():
        num_frames.sum().item()


def test_warming_up_leaves_the_state_as_it_is(stream):
    """Steps without valid frames, as run during capture, change no later result."""
    undisturbed = stream.model.stream(2)
    with torch.no_grad():
        for seed in range(20):
            audio, num_frames = inputs(1 + seed % 4, seed)
            stream.groups[0].encode_step(torch.randn(2, 1, 7 * HOP), torch.zeros_like(num_frames))
            stream.groups[0].decode_step(torch.ones(4, 2, 5, dtype=torch.int64), torch.zeros_like(num_frames))
            codes = stream.groups[0].encode_step(audio, num_frames)
            assert torch.equal(codes, undisturbed.groups[0].encode_step(audio, num_frames))
            decoded = [s.groups[0].decode_step(codes, num_frames)[0] for s in (stream, undisturbed)]
            torch.testing.assert_close(*decoded, rtol=1e-5, atol=1e-5)  # a CPU reads only slots that may be filled


def test_steps_without_a_graph_are_counted():
    runner = GraphedStep(lambda value, num_frames: value + num_frames, enabled=True)
    assert runner(torch.ones(1), torch.ones(1)).item() == 2
    assert (runner.num_eager, runner.num_replays) == (1, 0)


class Gpus:
    """Stands in for the parts of `torch.cuda` that know which of two GPUs is current, without a driver."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.captured: list[int] = []
        for name in ("device", "stream", "current_stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.current_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))

    @contextmanager
    def device(self, device):
        before, self.current = self.current, torch.device(device).index
        yield
        self.current = before

    def stream(self, stream):
        return self.device(stream.device)

    def current_stream(self, device=None):
        index = self.current if device is None else torch.device(device).index
        return SimpleNamespace(device=torch.device("cuda", index), wait_stream=lambda other: None)

    @contextmanager
    def graph(self, graph, stream=None, capture_error_mode="global"):
        # torch's default stream is that of the first capture of the process: here one on GPU 0
        with self.stream(stream or self.current_stream("cuda:0")):
            self.captured.append(self.current)
            yield


def test_a_step_is_captured_on_the_gpu_of_its_model(monkeypatch):
    """Else the graph is empty, and a replay returns the output of the capture again."""
    gpus, seen = Gpus(monkeypatch), []
    runner = GraphedStep(lambda value, num_frames: seen.append(gpus.current) or value, enabled=True)
    with FakeTensorMode():
        value = torch.zeros(2, 3, device="cuda:1")
        runner(value, torch.zeros(2, dtype=torch.int64, device="cuda:1"))
    assert (gpus.captured, seen, gpus.current) == ([1], [1, 1, 1], 0)
    assert runner.num_replays == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_graphs_of_a_model_on_the_second_gpu_equal_eager_steps():
    model = small_model(12).to("cuda:1")
    graphed, eager = model.stream(2), model.stream(2, cuda_graphs=False)
    for seed in range(10):
        audio = inputs(2, seed)[0].to("cuda:1")
        assert torch.equal(graphed.encode(audio)[0], eager.encode(audio)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_replayed_graphs_equal_eager_steps():
    model = small_model(12).cuda()
    graphed, eager = model.stream(2), model.stream(2, cuda_graphs=False)
    for seed in range(60):
        audio = inputs(1 + seed % 3, seed)[0].cuda()
        codes = [stream.encode(audio)[0] for stream in (graphed, eager)]
        assert torch.equal(*codes)
        torch.testing.assert_close(*(stream.decode(codes[0])[0] for stream in (graphed, eager)))
    assert graphed.groups[0].encode_step.num_eager == 0
    assert graphed.groups[0].encode_step.num_replays == 60
