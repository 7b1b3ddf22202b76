"""Speaker similarity as in the paper's table: WavLM features with an ECAPA-TDNN head, fine-tuned for verification.

The weights (`wavlm_large_finetune.pth`, WavLM large with its features fixed, VoxCeleb) are not shipped, because they
are not ours; give their path. WavLM is transformers' class, so the names of its weights are translated; the head is
ECAPA-TDNN (arXiv 2005.07143) with 512 channels, on a sum of all hidden states with learned weights.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moss_train.evaluation.metrics.base import Column, Metric, MetricError, Pair
from moss_train.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import WavLMConfig

SAMPLING_RATE = 16_000

# Names of WavLM's weights: (pattern in the released file, replacement here); the first match is used.
_NAMES = (
    (r"mask_emb", "masked_spec_embed"),
    (r"post_extract_proj\.", "feature_projection.projection."),
    (r"layer_norm\.", "feature_projection.layer_norm."),
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?", r"feature_extractor.conv_layers.\1.layer_norm."),
    (r"encoder\.pos_conv\.0\.weight_g", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"encoder\.pos_conv\.0\.weight_v", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"(encoder\.layers\.\d+)\.self_attn\.relative_attention_bias\.", r"\1.attention.rel_attn_embed."),
    (r"(encoder\.layers\.\d+)\.self_attn\.grep_linear\.", r"\1.attention.gru_rel_pos_linear."),
    (r"(encoder\.layers\.\d+)\.self_attn\.grep_a", r"\1.attention.gru_rel_pos_const"),
    (r"(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.layer_norm."),
    (r"(encoder\.layers\.\d+)\.fc1\.", r"\1.feed_forward.intermediate_dense."),
    (r"(encoder\.layers\.\d+)\.fc2\.", r"\1.feed_forward.output_dense."),
)


@dataclass(frozen=True)
class WavLMSimilarity(Metric):
    """Cosine of WavLM speaker embeddings of reference and reconstruction, at 16 kHz: the published SIM."""

    weights: str | None = None  # path of wavlm_large_finetune.pth
    columns = (Column("sim_wavlm", "SIM-WavLM", True, is_speech_only=True, decimals=3),)

    @property
    def description(self) -> str:
        return f"WavLM + ECAPA-TDNN, {Path(self.weights or '').name}"

    def missing(self) -> str | None:
        if self.weights is None:
            return "no weights: give speaker_model=<path of wavlm_large_finetune.pth>"
        return None if Path(self.weights).is_file() else f"there is no {self.weights}"

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for less than a quarter of a second and for silence."""
        assert self.weights is not None
        model = load_wavlm(self.weights)
        wanted, got = pair.at(SAMPLING_RATE)
        if len(wanted) < 0.25 * SAMPLING_RATE:
            raise MetricError("less than 0.25 seconds")
        if not wanted.any() or not got.any():
            raise MetricError("reference or reconstruction is silent")
        with torch.inference_mode():
            first, second = (model(audio[None])[0] for audio in (wanted, got))
        return {"sim_wavlm": F.cosine_similarity(first, second, dim=0).item()}


class SpeakerVerifier(nn.Module):
    """WavLM and its head: audio [B, T] at 16 kHz -> embeddings [B, 256]."""

    def __init__(self, config: "WavLMConfig", channels: int = 512, width: int = 256) -> None:
        super().__init__()
        from transformers import WavLMModel

        self.wavlm = WavLMModel(config)
        self.feature_weight = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.instance_norm = nn.InstanceNorm1d(config.hidden_size)
        self.layer1 = ConvReluNorm(config.hidden_size, channels, 5, padding=2)
        self.layer2 = SqueezeExcitationBlock(channels, dilation=2)
        self.layer3 = SqueezeExcitationBlock(channels, dilation=3)
        self.layer4 = SqueezeExcitationBlock(channels, dilation=4)
        self.conv = nn.Conv1d(3 * channels, 3 * channels, 1)
        self.pooling = AttentivePooling(3 * channels)
        self.bn = nn.BatchNorm1d(6 * channels)
        self.linear = nn.Linear(6 * channels, width)

    def forward(self, audio: Tensor) -> Tensor:
        states = self.wavlm(F.layer_norm(audio, audio.shape[-1:]), output_hidden_states=True).hidden_states
        weights = self.feature_weight.softmax(0)
        features = sum(weight * state for weight, state in zip(weights, states, strict=True))
        x = self.layer1(self.instance_norm(features.transpose(1, 2) + 1e-6))
        outputs = [x]
        for layer in (self.layer2, self.layer3, self.layer4):
            outputs.append(layer(outputs[-1]))
        return self.linear(self.bn(self.pooling(self.conv(torch.cat(outputs[1:], dim=1)).relu())))


class ConvReluNorm(nn.Module):
    """Convolution, ReLU, batch normalisation, in this order: [B, C, T] -> [B, D, T]."""

    def __init__(self, num_inputs: int, num_outputs: int, kernel_size: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv1d(num_inputs, num_outputs, kernel_size, padding=padding)
        self.bn = nn.BatchNorm1d(num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).relu())


class MultiScaleConv(nn.Module):
    """The Res2Net convolution of [B, C, T], in 8 groups of channels.

    The output of each group is added to the input of the next one; the last group is passed on unchanged.
    """

    def __init__(self, channels: int, dilation: int, scale: int = 8) -> None:
        super().__init__()
        width = channels // scale
        convolutions = (nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for _ in range(scale - 1))
        self.convs = nn.ModuleList(convolutions)
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        *groups, last = x.chunk(len(self.convs) + 1, dim=1)
        outputs: list[Tensor] = []
        for group, conv, norm in zip(groups, self.convs, self.bns, strict=True):
            outputs.append(norm(conv(group + outputs[-1] if outputs else group).relu()))
        return torch.cat([*outputs, last], dim=1)


class ChannelGate(nn.Module):
    """Squeeze and excitation on [B, C, T]: every channel is scaled by a function of the means of all."""

    def __init__(self, channels: int, bottleneck: int = 128) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, bottleneck)
        self.linear2 = nn.Linear(bottleneck, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.linear2(self.linear1(x.mean(2)).relu()).sigmoid()[:, :, None]


class SqueezeExcitationBlock(nn.Module):
    """The block of ECAPA-TDNN on [B, C, T], with a residual connection; its parts are named as in the weights."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.Conv1dReluBn1 = ConvReluNorm(channels, channels)
        self.Res2Conv1dReluBn = MultiScaleConv(channels, dilation)
        self.Conv1dReluBn2 = ConvReluNorm(channels, channels)
        self.SE_Connect = ChannelGate(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.SE_Connect(self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(x))))


class AttentivePooling(nn.Module):
    """Mean and standard deviation over time, weighted by attention per channel: [B, C, T] -> [B, 2 C]."""

    def __init__(self, channels: int, bottleneck: int = 128) -> None:
        super().__init__()
        self.linear1 = nn.Conv1d(channels, bottleneck, 1)
        self.linear2 = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.linear2(self.linear1(x).tanh()).softmax(2)
        mean = (weights * x).sum(2)
        variance = (weights * x.square()).sum(2) - mean.square()
        return torch.cat([mean, variance.clamp(min=1e-9).sqrt()], dim=1)


def map_weight_name(name: str) -> str:
    """Return the name of a weight in `SpeakerVerifier` from its name in the released file."""
    inner = name.removeprefix("feature_extract.model.")
    if inner == name:
        return name
    for pattern, replacement in _NAMES:
        renamed, count = re.subn(f"^{pattern}", replacement, inner)
        if count:
            return f"wavlm.{renamed}"
    return f"wavlm.{inner}"


def load_weights(model: SpeakerVerifier, weights: Mapping[str, Tensor]) -> None:
    """Load weights given by their released names. Raises UserError if one is missing; further ones are ignored."""
    found = {map_weight_name(name): tensor for name, tensor in weights.items()}
    missing = [name for name in model.state_dict() if name not in found and name != "wavlm.masked_spec_embed"]
    if missing:
        raise UserError(
            f"speaker_model lacks {len(missing)} weights, such as {missing[0]}: is it wavlm_large_finetune.pth?"
        )
    model.load_state_dict({name: found[name] for name in model.state_dict() if name in found}, strict=False)


@lru_cache(maxsize=1)
def load_wavlm(path: str) -> SpeakerVerifier:
    """Load the verifier, WavLM large and its head, with the weights of the released file."""
    from transformers import WavLMConfig

    large = WavLMConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=False,
    )
    model = SpeakerVerifier(large)
    load_weights(model, torch.load(path, map_location="cpu", weights_only=True)["model"])
    return model.eval()
