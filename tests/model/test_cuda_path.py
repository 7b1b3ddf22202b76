"""CUDA-only code, run on tensors that have shapes, types and a device but no data, so that no GPU is needed.

The host cannot read a value of such a tensor, so a step that passes never waits for the device.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moss_train.model import MossAudioTokenizerModel
from moss_train.model.attention import HAS_WINDOW_KERNEL, flash_attention, has_window_kernel
from moss_train.model.kv_cache import StreamChunk
from moss_train.model.quantizer import ResidualLFQ

from .small_models import HOP, small_config, small_model


@pytest.fixture
def fake():
    with FakeTensorMode():
        yield


def model_on_cuda(dtype: torch.dtype) -> MossAudioTokenizerModel:
    """Create a model whose heads of 8 are the narrowest that the kernel supports; fake tensors cannot be moved."""
    config = small_config()
    with torch.device("cuda"):
        torch.set_default_dtype(dtype)
        try:
            model = MossAudioTokenizerModel(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        model.quantizer = ResidualLFQ(**config.quantizer_kwargs)
    return model


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", dtype=dtype)


def test_fake_tensors_refuse_to_be_read(fake):
    with pytest.raises(DataDependentOutputException):
        empty(1).item()


@pytest.mark.skipif(not HAS_WINDOW_KERNEL, reason="this torch has no windowed kernel")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "expected"),
    [
        (torch.bfloat16, 64, True),
        (torch.float16, 64, True),
        (torch.float32, 64, False),
        (torch.bfloat16, 12, False),
        (torch.bfloat16, 264, False),
    ],
)
def test_the_windowed_kernel_is_taken_where_it_exists(fake, dtype, head_dim, expected):
    assert has_window_kernel(empty(1, 50, 4, head_dim, dtype=dtype)) == expected
    assert not has_window_kernel(torch.empty(1, 50, 4, head_dim, dtype=dtype))


@pytest.mark.skipif(not HAS_WINDOW_KERNEL, reason="this torch has no windowed kernel")
@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_before_ampere_go_without_the_windowed_kernel(fake, monkeypatch, capability, expected):
    """There FlashAttention raises an error."""
    major, minor = capability
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major, minor=minor))
    assert has_window_kernel(empty(1, 50, 4, 64, dtype=torch.float16)) == expected


@pytest.mark.skipif(not HAS_WINDOW_KERNEL, reason="this torch has no windowed kernel")
def test_the_windowed_kernel_is_called_as_it_wants(fake):
    query, key, value = (empty(2, 50, 4, 64).requires_grad_() for _ in range(3))
    attended = flash_attention(query, key, value, window=8)
    assert (attended.shape, attended.dtype, attended.device.type) == (query.shape, query.dtype, "cuda")
    assert attended.grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frames", [5, 100])
def test_a_batch_passes(fake, dtype, frames):
    output = model_on_cuda(dtype)(empty(2, 1, frames * HOP, dtype=torch.float32))
    assert (output.audio.shape, output.audio.dtype) == ((2, 1, frames * HOP), dtype)
    assert output.audio.grad_fn is not None
    assert output.audio_codes.shape == (4, 2, frames)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frames", [1, 4, 9])
def test_a_streaming_step_never_waits_for_the_device(fake, dtype, frames):
    group = model_on_cuda(dtype).stream(2).groups[0]
    num_frames = empty(2, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(3):
            codes = group._encode_step(empty(2, 1, frames * HOP, dtype=torch.float32), num_frames)
            audio = group._decode_step(codes, num_frames)
    assert (codes.shape, codes.dtype) == ((4, 2, frames), torch.int64)
    assert (audio.shape, audio.dtype) == ((2, 1, frames * HOP), dtype)


WITHIN_A_STAGE = {
    **dict.fromkeys(("encoder", "quantizer", "decoder.0.input_proj", "decoder.0.transformer.layers.0"), "cuda:0"),
    **dict.fromkeys(("decoder.0.transformer.layers.1", "decoder.0.output_proj", "decoder.2", "decoder.4"), "cuda:1"),
}


@pytest.mark.parametrize(
    "device_map", [{"encoder": "cuda:0", "quantizer": "cuda:1", "decoder": "cuda:1"}, WITHIN_A_STAGE]
)
def test_a_model_may_be_split_over_two_gpus(monkeypatch, device_map):
    """As `device_map="auto"` does where there are several."""
    hooks = pytest.importorskip("accelerate.hooks")
    monkeypatch.setattr(hooks, "set_module_tensor_to_device", lambda *args, **kwargs: None)  # they are there already
    with FakeTensorMode(), torch.no_grad():
        model = small_model(3)
        for place, device in device_map.items():
            for module in model.get_submodule(place).modules():
                for name, weight in module._parameters.items():
                    module._parameters[name] = None if weight is None else nn.Parameter(weight.to(device))
        devices = {"": "cuda:0", **device_map}
        hooks.attach_align_device_hook_on_blocks(model, devices, offload=dict.fromkeys(device_map, False))
        audio, codes = empty(1, 1, 6 * HOP, dtype=torch.float32), empty(4, 1, 6, dtype=torch.int64)
        assert model.encode(audio).audio_codes.shape == codes.shape
        assert model.decode(codes).audio.shape == audio.shape
        assert model(audio).audio.shape == audio.shape
        stream = model.stream()
        assert not stream.groups[0].encode_step.enabled  # a graph records the work of one GPU
        assert stream.encode(audio)[0].shape == codes.shape
        assert stream.decode(codes)[0].shape == audio.shape


def test_shapes_of_a_step_do_not_depend_on_what_the_host_counted(fake):
    """A graph that was captured in the first step is replayed in all later ones."""
    states = model_on_cuda(torch.bfloat16).stream(2).groups[0].states("encoder")
    for state in states:
        assert not getattr(state.linears, "weights", {})
        num_frames = empty(2, dtype=torch.int64)
        masks = []
        for _ in range(3):
            chunk = StreamChunk(state, 3, num_frames)
            masks.append(chunk.steps[0].mask.shape)
            chunk.advance()
        assert masks == [(2, 1, 3, state.capacity)] * 3
