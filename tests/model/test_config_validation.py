"""Any change to a configuration is either refused with a reason or results in a working model."""

import copy
import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel

from .small_models import small_config

TOP = (
    "sampling_rate",
    "downsample_rate",
    "causal_transformer_context_duration",
    "number_channels",
    "encoder_kwargs",
    "decoder_kwargs",
    "quantizer_kwargs",
    "enable_channel_interleave",
    "attention_implementation",
    "compute_dtype",
)
ENTRY = (
    "module_type",
    "patch_size",
    "input_dimension",
    "output_dimension",
    "d_model",
    "num_heads",
    "num_layers",
    "dim_feedforward",
    "causal",
    "norm",
    "positional_embedding",
    "max_period",
    "gating",
    "layer_scale",
    "conv_layout",
    "context_duration",
    "surprise",
)
QUANTIZER = (
    "input_dim",
    "rvq_dim",
    "output_dim",
    "num_quantizers",
    "codebook_size",
    "codebook_dim",
    "quantizer_type",
    "surprise",
)
REMOVED = object()
VALUES = (REMOVED, 0, -1, 1, 2, 3, 7, 16, 1.5, -0.5, 1e-9, math.nan, math.inf, None, True, False, "x", "rope", [], {})

places = st.one_of(
    st.tuples(st.sampled_from(TOP)),
    st.tuples(st.sampled_from(("encoder_kwargs", "decoder_kwargs")), st.integers(0, 5), st.sampled_from(ENTRY)),
    st.tuples(st.just("quantizer_kwargs"), st.sampled_from(QUANTIZER)),
)


def changed(place: tuple, value: object) -> dict:
    """The small configuration as plain data with one value changed, added or removed."""
    data = copy.deepcopy({key: value for key, value in small_config().to_dict().items() if key in TOP})
    *path, key = place
    node = data
    for step in path:
        node = node[step]
    if value is REMOVED:
        node.pop(key, None)
    else:
        node[key] = copy.deepcopy(value)
    return data


def outcome(data: dict) -> str:
    """Return the reason of a refusal, or an empty string if the model encodes and decodes."""
    try:
        config = MossAudioTokenizerConfig(**data)
        model = MossAudioTokenizerModel(config).eval()
    except ValueError as error:
        return str(error)
    audio = torch.randn(1, config.number_channels, 3 * config.downsample_rate)
    encoded = model.encode(audio)
    assert encoded.audio_codes.shape == (config.num_quantizers, 1, 3)
    assert model.decode(encoded.audio_codes).audio.shape == audio.shape
    streamed = model.encode(audio, chunk_duration=1 / config.frame_rate).audio_codes
    assert streamed.shape == encoded.audio_codes.shape
    return ""


@settings(max_examples=400, deadline=None, derandomize=True)
@given(place=places, value=st.sampled_from(VALUES))
@example(place=("encoder_kwargs",), value=[])
@example(place=("encoder_kwargs", 1, "context_duration"), value=0)
@example(place=("encoder_kwargs", 1, "max_period"), value=-1)
@example(place=("encoder_kwargs", 1, "layer_scale"), value="x")
def test_a_change_is_refused_with_the_reason_or_works(place, value):
    reason = outcome(changed(place, value))
    if reason:
        assert any(word in reason for word in (*TOP, *ENTRY, *QUANTIZER, "window", "channels", "patch sizes")), reason
        assert len(reason.splitlines()) == 1
