"""Count floating-point operations and memory: of operations as they run, and per second of audio on fake tensors.

Log, estimate and benchmarks share one convention. An addition and a multiplication are two operations. Attention counts
only the pairs of query and key that it needs: half of the square if it is causal, and only those within its attention
window if it has one. What a fused backward pass recomputes is not counted, as is usual for model FLOPs utilisation
(arXiv 2204.02311).

For the cost per second of audio, every kind of layer runs once, forward and backward, on fake tensors, which have no
data; the cost of a stage is the sum over its layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from moss_train.audio.stft import normalized_hann_window
from moss_train.config.build import build
from moss_train.config.fit_schema import FitConfig
from moss_train.discriminators import DiscriminatorSet
from moss_train.losses import AudioLoss
from moss_train.model import MossAudioTokenizerConfig
from moss_train.model.attention import rotation
from moss_train.model.modeling_moss_audio_tokenizer import MossAudioTokenizerModel
from moss_train.model.transformer import ProjectedTransformer
from moss_train.training.cost.hardware import is_half
from moss_train.training.step.objective import Objective
from moss_train.training.step.schedule import Schedule, ScheduleState, Stage


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of one part.

    Attributes:
        forward: operations of the forward pass.
        backward: operations of the backward pass, for those gradients that the training needs.
        activation_bytes: bytes that autograd keeps between forward and backward, without the weights.
        checkpointed_bytes: the same with activation checkpointing in all layers: the layers' inputs, plus the
            activations of one layer per stage (slightly too much, because these do not exist at the same time).
        checkpointing_savings: by how much `activation_bytes` is smaller due to `trainer.activation_checkpointing`.
        recomputed: operations of the forward pass that activation checkpointing does a second time.
    """

    forward: float = 0.0
    backward: float = 0.0
    activation_bytes: float = 0.0
    checkpointed_bytes: float = 0.0
    checkpointing_savings: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __mul__(self, factor: float) -> "Cost":
        return Cost(*(getattr(self, f.name) * factor for f in fields(Cost)))

    @property
    def total(self) -> float:
        """Operations of forward and backward pass, each counted once."""
        return self.forward + self.backward


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Create tensors with shapes but without values inside the `with` block; none of them stays in a cache."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        normalized_hann_window.cache_clear()


def count(module: nn.Module, run: Callable[[], Any], half: bool) -> Cost:
    """Return the cost of `run`, a pass through `module` that returns a tensor, or several to be differentiated
    together.

    Args:
        half: whether products are in bfloat16, as on a GPU with bf16-mixed.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in module.parameters()}
    shapes = {tuple(tensor.shape) for tensor in module.parameters() if tensor.ndim > 1}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_cast_weight = tuple(tensor.shape) in shapes or tuple(tensor.shape[::-1]) in shapes
        if storage._cdata not in weights and not is_cast_weight:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    precision = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    watch = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounter() as forward, precision, watch:
        result = run()
    outputs = [result] if isinstance(result, Tensor) else list(result)
    differentiable = [output.float().sum() for output in outputs if output.requires_grad]
    with FlopCounter() as backward:
        if differentiable:
            torch.stack(differentiable).sum().backward()
    num_bytes = sum(kept.values())
    return Cost(forward.total, backward.total, num_bytes, num_bytes)


def stage_cost(
    stage: ProjectedTransformer, frames: int, half: bool, learns: bool, passes: bool, recomputes: bool = False
) -> Cost:
    """Return the cost of a stage for one clip of `frames` frames, from its projections and one of its layers.

    Args:
        learns: whether its weights get gradients.
        passes: whether earlier parts need the gradient of its input.
        recomputes: whether its layers recompute their activations in the backward pass.
    """
    layers = stage.transformer.layers
    layer: Any = layers[0]
    stage.requires_grad_(learns)
    width = stage.d_model
    rotations = rotation(torch.arange(frames)[None], width // stage.transformer.num_heads, stage.transformer.max_period)
    x = torch.zeros(1, frames, width, requires_grad=learns or passes)
    one = count(layer, lambda: layer(x, rotations), half)
    total = layers_cost(one, len(layers), x.nbytes, recomputes)
    for projection, needs_input in ((stage.input_proj, passes), (stage.output_proj, learns or passes)):
        if isinstance(projection, nn.Linear):
            given = torch.zeros(1, frames, projection.in_features, requires_grad=needs_input)
            total += count(projection, lambda p=projection, g=given: p(g), half)  # type: ignore[misc]
    return total


def layers_cost(one: Cost, number: int, input_bytes: int, recomputes: bool) -> Cost:
    """Return the cost of equal layers from that of one. If no activations are kept, none are recomputed."""
    kept = one.activation_bytes * number
    least = min(kept, input_bytes * number + one.activation_bytes) if kept else 0.0
    recomputes = recomputes and kept > 0
    return Cost(
        one.forward * number,
        one.backward * number,
        activation_bytes=least if recomputes else kept,
        checkpointed_bytes=least,
        checkpointing_savings=kept - least if recomputes else 0.0,
        recomputed=one.forward * number if recomputes else 0.0,
    )


def tokenizer_costs(
    config: MossAudioTokenizerConfig,
    seconds: float,
    half: bool,
    learning: Sequence[str],
    checkpointed: Sequence[float] = (),
) -> dict[str, Cost]:
    """Return the cost per audio-second of encoder, quantizer and decoder, for clips of `seconds` seconds.

    Args:
        learning: which of the three are trained.
        checkpointed: frame rates in Hz of the stages with activation checkpointing.
    """
    code_frames = max(1, round(seconds * config.frame_rate))
    values = config.to_dict()
    for name in ("encoder_kwargs", "decoder_kwargs"):  # a single layer in every stage: enough to count, quick to build
        values[name] = [{**e, "num_layers": 1} if "num_layers" in e else e for e in values[name]]
    costs = {"encoder": Cost(), "quantizer": Cost(), "decoder": Cost()}
    # Gradients pass through a part if one before it is trained; the audio itself needs none.
    passing = {"encoder": False, "decoder": bool({"encoder", "quantizer"} & set(learning))}
    with fake_tensors():
        model = MossAudioTokenizerModel(MossAudioTokenizerConfig(**values))
        for name in ("encoder", "decoder"):
            frames = config.frames_per_code_frame(f"{name}_kwargs")
            passes = passing[name]
            for number, per_code_frame in frames.items():
                stage: Any = getattr(model, name)[number]
                stage.transformer.layers = nn.ModuleList(
                    [stage.transformer.layers[0]] * getattr(config, f"{name}_kwargs")[number]["num_layers"]
                )
                learns, recomputes = name in learning, config.frame_rate * per_code_frame in checkpointed
                costs[name] += stage_cost(stage, per_code_frame * code_frames, half, learns, passes, recomputes)
                passes = passes or learns
        quantizer = model.quantizer.requires_grad_("quantizer" in learning)
        width = config.quantizer_kwargs["input_dim"]
        latent = torch.zeros(1, code_frames, width, requires_grad="encoder" in learning)
        outputs = attrgetter("quantized", "latents", "codewords")
        costs["quantizer"] = count(quantizer, lambda: outputs(quantizer(latent)), half=False)
    return {name: cost * (config.frame_rate / code_frames) for name, cost in costs.items()}


def discriminators_cost(nodes: Sequence[Mapping[str, Any]], num_channels: int, length: int, half: bool) -> Cost:
    """Return operations and activation bytes of one forward pass of all discriminators over a crop of `length` samples,
    without a backward pass.
    """
    precision = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    with fake_tensors(), precision:
        discriminators = DiscriminatorSet([build(node, path="discriminators") for node in nodes])
        waveform = torch.zeros(1, num_channels, length)
        with FlopCounter() as counter:
            outputs = discriminators(waveform)
    kept = [feature.nbytes for output in outputs for feature in (*output.features, output.logits)]
    # A convolution keeps its input, the activated output of the layer before; the activation function keeps its own.
    bytes_kept = 2 * sum(kept)
    return Cost(forward=counter.total, activation_bytes=bytes_kept, checkpointed_bytes=bytes_kept)


def losses_cost(objective: Objective, weights: Mapping[str, float], config: MossAudioTokenizerConfig) -> Cost:
    """Return the cost per audio-second, in float32, of the losses at the decoder's output that have a weight.

    Their Fourier transforms are not counted as operations. One second of audio is actually computed, not on fake
    tensors, because the losses build filters that depend on values.
    """
    total = Cost()
    lengths = torch.tensor([config.output_sampling_rate])
    audio = torch.zeros(1, config.number_channels, config.output_sampling_rate)
    for name, loss in objective.losses.items():
        if isinstance(loss, AudioLoss) and weights.get(name):
            output = torch.zeros_like(audio, requires_grad=True)
            total += count(loss, lambda loss=loss, output=output: loss(audio, output, lengths), half=False)  # type: ignore[misc]
    return total


def semantic_cost(
    node: Mapping[str, Any], latent_dim: int, frames: int, tokens: int, half: bool, learns: bool = True
) -> Cost:
    """Return the cost of the text LM for a clip of `frames` frames and `tokens` text tokens, forward and backward.

    Copies with one and two layers give the cost of a layer and that of the rest. A text LM that is not trained still
    passes gradients back to its input.
    """
    costs = []
    depth = node["config"]["num_hidden_layers"]
    for layers in (1, 2):
        shallow = {**node, "config": {**node["config"], "num_hidden_layers": layers}}
        with fake_tensors():
            model = build(shallow, path="semantic", latent_dim=latent_dim).requires_grad_(learns)
            states = torch.zeros(1, frames, latent_dim, requires_grad=True)
            lengths = (torch.tensor([frames]), torch.zeros(1, tokens, dtype=torch.long), torch.tensor([tokens]))
            costs.append(count(model, lambda m=model, s=states, n=lengths: m(s, *n, torch.tensor([0])).loss_sum, half))  # type: ignore[misc]
    one, two = costs
    return one + (two + one * -1.0) * (depth - 1)


@dataclass(frozen=True)
class StageCosts:
    """Costs of a stage of the training.

    Attributes:
        codec: cost per audio-second of encoder, quantizer, decoder and the losses at the decoder's output.
        discriminators: cost of one forward pass of all discriminators over the crop of a clip.
        generator_passes: number of backward passes through the discriminators for the generator's terms.
        text: operations of the text LM, forward and backward, per unit of what they grow with: `clips_with_text`,
            `text_frames`, `text_tokens`, and, because of attention, `text_squares` (see `count_clips`); empty if they
            were not counted.
    """

    stage: Stage
    codec: dict[str, Cost]
    discriminators: Cost
    generator_passes: int = 1
    text: Mapping[str, float] = field(default_factory=dict)

    @property
    def codec_cost(self) -> Cost:
        """Cost per audio-second of all parts of the codec."""
        return sum(self.codec.values(), Cost())

    def operations(self, content: Mapping[str, float], schedule_state: ScheduleState) -> float:
        """Return the operations of an update, each counted once; see `forward_backward` for the discriminators' passes.

        Args:
            content: `audio_seconds` and the counts of `count_clips`, over all ranks.
        """
        passes = (
            self.generator_passes * schedule_state.adversarial_loss_active + 4 * schedule_state.discriminators_learn
        )
        passes += 2 if passes else 0
        return (
            self.codec_cost.total * content["audio_seconds"]
            + passes * self.discriminators.forward * content["clips"]
            + sum(operations * content[name] for name, operations in self.text.items())
        )


def stage_costs(
    config: FitConfig,
    tokenizer: MossAudioTokenizerConfig,
    discriminators: Sequence[Mapping[str, Any]],
    objective: Objective,
    schedule: Schedule,
) -> list[StageCosts]:
    """Count every stage, on clips of `data.crop_seconds`."""
    half, seconds, again = is_half(config.trainer), config.data.crop_seconds, config.trainer.activation_checkpointing
    codec = cache(lambda learning: tokenizer_costs(tokenizer, seconds, half, learning, again))
    crop = Cost()
    if schedule.adversarial:
        crop = discriminators_cost(discriminators, tokenizer.number_channels, objective.crop_length, half)
    return [
        StageCosts(
            stage,
            codec(stage.parts) | {"losses": losses_cost(objective, objective.stage_weights(stage), tokenizer)},
            crop,
            objective.generator_passes(stage),
        )
        for stage in schedule.stages
    ]


with suppress(ImportError):
    import torch.nn.attention.varlen  # defines its operators

_KERNELS = [f"_scaled_dot_product_{kernel}_attention" for kernel in ("flash", "efficient", "cudnn")]
_KERNELS.append("_scaled_dot_product_flash_attention_for_cpu")
ATTENTION = {
    getattr(operators, f"{name}{suffix}"): factor
    for operators, names in ((torch.ops.aten, _KERNELS), (torch.ops.torch_attn, ["_varlen_attn"]))
    for name in names
    for suffix, factor in (("", 1), ("_backward", 2))
    if hasattr(operators, f"{name}{suffix}")
}
"""Operators of fused attention in this version of torch, each with its cost in units of the forward pass."""


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of every matrix product, convolution and attention inside a `with` block.

    Products and convolutions are counted with torch's formulas. `FlopCounterMode` uses the same, but its attribution to
    modules fails with `autograd.grad`, which training needs, and it supports neither causal nor windowed attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator in ATTENTION:
            names = (argument.name for argument in func._schema.arguments)
            self.total += ATTENTION[operator] * attention(dict(zip(names, args, strict=False)) | (kwargs or {}))
        elif operator in flop_registry:
            self.total += flop_registry[operator](*args, **(kwargs or {}), out_val=result)
        return result


def attention(given: Mapping[str, Any]) -> int:
    """Return the FLOPs of the two products of attention, from the arguments of its kernel by name.

    Query, key and value are [B, H, T, D], [B, G, S, D] and [B, G, S, E], where H / G heads share keys; or packed clips,
    [B * T, H, D], which are assumed to have one length. A square mask is assumed to be causal: for tensors without
    values, transformers passes causality as such a mask.
    """
    query, key, value = (given[name] for name in ("query", "key", "value"))
    is_causal, window = given.get("is_causal", False), None
    if "cu_seq_q" in given:
        queries, keys = given["max_q"], given["max_k"]
        num_heads = query.shape[0] * query.shape[1] // queries  # heads of all clips together
        left, right = given.get("window_size") or (-1, -1)
        is_causal, window = is_causal or right == 0, left + 1 if left >= 0 else None
    else:
        queries, keys = query.shape[2], key.shape[2]
        num_heads = query.shape[0] * query.shape[1]
        mask = given.get("attn_mask") if given.get("attn_mask") is not None else given.get("attn_bias")
        is_causal = is_causal or (mask is not None and queries == keys)
    # Number of (query, key) pairs of a clip; each query attends to at most `window` keys.
    seen = keys if window is None else min(window, keys)
    pairs = seen * (seen + 1) // 2 + (queries - seen) * seen if is_causal and queries == keys else queries * seen
    return 2 * num_heads * pairs * (query.shape[-1] + value.shape[-1])
