"""Build the ONNX graphs of a tokenizer: one streaming step of the encoder, and one of the decoder.

A step takes up to `chunk_frames` code frames of a batch of streams, their positions, and for each layer one ring buffer
of keys and one of values; it returns its result and the updated positions and rings. Only operations of opset 17 are
used, so that old runtimes and those of browsers and phones support them. Weights are folded where that is exact: gains
of residual branches and the scale of attention into the products before them, rotary pairs reordered into two halves,
weight norms and the residual search as in `FoldedQuantizer`.
"""

import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from moss_train.model import MossAudioTokenizerModel
from moss_train.model.quantizer import FoldedProjection, FoldedQuantizer
from moss_train.model.transformer import PatchedPretransform, ProjectedTransformer, TransformerLayer

OPSET, IR_VERSION = 17, 8


class GraphBuilder:
    """Collects the nodes and constants of a graph; values are referred to by name.

    Args:
        int8: store the weights of `linear` in 8 bits and quantize its input at run time.
        weights: file beside the graph to which large constants are written at once, so that only one of them is in
            memory at a time; None keeps all in the graph, which cannot exceed 2 GiB.
    """

    def __init__(self, int8: bool, weights: BinaryIO | None = None) -> None:
        self.int8 = int8
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def __call__(self, operation: str, *inputs: Any, **attributes: Any) -> str:
        """Append a node and return its output; inputs that are not names become constants."""
        return self.several(1, operation, *inputs, **attributes)[0]

    def several(self, count: int, operation: str, *inputs: Any, **attributes: Any) -> list[str]:
        """Append a node and return its `count` outputs."""
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        outputs = [f"{operation}_{len(self.nodes)}_{number}" for number in range(count)]
        self.nodes.append(
            helper.make_node(operation, names, outputs, name=f"{operation}_{len(self.nodes)}", **attributes)
        )
        return outputs

    def constant(self, value: Any) -> str:
        """Store an array or tensor in its own dtype, or Python numbers: whole ones as int64, others as float32."""
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        array = np.asarray(value)
        if not isinstance(value, np.ndarray | np.generic):
            array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        name = f"constant_{len(self.constants)}"
        array = np.ascontiguousarray(array).reshape(array.shape)
        if self.weights is None or array.nbytes < 4096:
            self.constants.append(numpy_helper.from_array(array, name))
            return name
        self.weights.write(bytes(-self.weights.tell() % 4096))  # page-aligned, so that runtimes can map it
        place = {"location": Path(self.weights.name).name, "offset": self.weights.tell(), "length": array.nbytes}
        self.weights.write(array.data)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        constant = onnx.TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, text in place.items():
            constant.external_data.add(key=key, value=str(text))
        self.constants.append(constant)
        return name

    def input(self, name: str, kind: int, shape: list[int | str]) -> str:
        """Declare an input of the graph."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, value: str, kind: int, shape: list[int | str]) -> None:
        """Declare an output of the graph under a name of its own."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def linear(self, x: str, weight: Tensor, bias: Tensor | None = None, precise: bool = False) -> str:
        """Multiply [..., C] by a weight [D, C] and add a bias [D]; if `precise`, the weight is never 8-bit."""
        if self.int8 and not precise:
            # Unsigned, because products of unsigned and signed bytes saturate on x86 without VNNI.
            scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
            rounded = ((weight / scale[:, None]).round() + 128).to(torch.uint8)
            quantized, x_scale, x_zero = self.several(3, "DynamicQuantizeLinear", x)
            whole = self("MatMulInteger", quantized, rounded.T, x_zero, np.uint8(128))
            product = self("Mul", self("Cast", whole, to=TensorProto.FLOAT), self("Mul", x_scale, scale))
        else:
            product = self("MatMul", x, weight.T)
        return product if bias is None else self("Add", product, bias)

    def model(self, name: str, metadata: dict[str, str]) -> onnx.ModelProto:
        """Return the finished model."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="moss_train"
        )
        helper.set_model_props(model, metadata)
        return model


@torch.no_grad()
def step_graph(
    model: MossAudioTokenizerModel,
    part: str,
    chunk_frames: int,
    int8: bool,
    metadata: dict[str, str],
    weights: BinaryIO | None = None,
) -> onnx.ModelProto:
    """Return the graph of one step of the encoder or decoder, for F <= `chunk_frames` frames.

    "encoder" maps audio [B, C, F * hop] to codes [N, B, F], "decoder" maps codes, of which -1 stands for a level that
    is not given, to audio. `weights` as in `GraphBuilder`.
    """
    build, config, quantizer = GraphBuilder(int8, weights), model.config, FoldedQuantizer(model.quantizer)
    codes_shape: list[int | str] = [config.num_quantizers, "batch", "frames"]
    audio_shape: list[int | str] = ["batch", config.number_channels, "samples"]
    if part == "encoder":
        x, width = build.input("audio", TensorProto.FLOAT, audio_shape), 1
        position = build.input("position", TensorProto.INT64, ["batch"])
        # Channels are interleaved in time: L0 R0 L1 R1 ...
        x = build("Reshape", build("Transpose", x, perm=[0, 2, 1]), [0, -1, 1])
    else:
        codes, width = build.input("codes", TensorProto.INT64, codes_shape), config.quantizer_kwargs["output_dim"]
        position = build.input("position", TensorProto.INT64, ["batch"])
        x = add_lookup(build, quantizer, codes)
    module: Any
    for number, module in enumerate(getattr(model, part)):
        if isinstance(module, PatchedPretransform):  # joins or splits frames
            size = module.patch_size
            if module.is_downsample:
                pieces, width = [size, width], width * size
            else:
                pieces, width = [width // size, size], width // size
            x = build("Transpose", build("Reshape", x, [0, -1, *pieces]), perm=[0, 1, 3, 2])
            x = build("Reshape", x, [0, -1, width])
        else:
            x = add_stage(build, module, x, position, chunk_frames * module.frames_per_code_frame, f"{number}")
            projection = module.output_proj
            width = projection.out_features if isinstance(projection, nn.Linear) else module.d_model
    if part == "encoder":
        codes = add_search(build, quantizer, x)
        build.output("codes", codes, TensorProto.INT64, codes_shape)
    else:
        audio = build("Transpose", build("Reshape", x, [0, -1, config.number_channels]), perm=[0, 2, 1])
        build.output("audio", audio, TensorProto.FLOAT, audio_shape)
    frames = build("Gather", build("Shape", codes), [2])
    build.output("next_position", build("Add", position, frames), TensorProto.INT64, ["batch"])
    return build.model(part, metadata)


def add_stage(
    build: GraphBuilder, stage: ProjectedTransformer, x: str, position: str, longest_step: int, name: str
) -> str:
    """Append a stage with input [B, T, input_dimension], whose ring buffers hold `window - 1 + longest_step` frames.

    Frame p is in slot p % capacity of a ring.
    """
    heads = stage.transformer.num_heads
    head_dim = stage.d_model // heads
    capacity = stage.window - 1 + longest_step
    frames = build("Gather", build("Shape", x), 1)
    offsets = build("Range", 0, frames, 1)
    start = build("Unsqueeze", build("Mul", position, stage.frames_per_code_frame), [1])
    positions = build("Add", start, offsets)  # [B, T]
    # Cosines and signed sines [B, 1, T, head_dim] of the rotary embedding, formed in float64 as in torch.
    frequencies = float(stage.transformer.max_period) ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    exact = build("Unsqueeze", build("Cast", positions, to=TensorProto.DOUBLE), [1, 3])
    angles = build("Mul", exact, np.concatenate((frequencies, frequencies)))
    cosine = build("Cast", build("Cos", angles), to=TensorProto.FLOAT)
    sine = build("Cast", build("Sin", angles), to=TensorProto.FLOAT)
    signed_sine = build("Mul", sine, np.repeat(np.array([-1, 1], dtype=np.float32), head_dim // 2))
    # The mask [B, 1, T, capacity], zero for the slots that a query attends to.
    newest = build("ReduceMax", positions, axes=[1])  # [B, 1]
    age = build("Mod", build("Sub", newest, np.arange(capacity)), capacity)  # [B, capacity] frames before the newest
    never = build("Greater", age, newest)
    age = build("Where", never, np.int64(2 * capacity), age)
    lag = build("Unsqueeze", build("Sub", newest, positions), [2])  # [B, T, 1]
    distance = build("Sub", build("Unsqueeze", age, [1]), lag)
    future = build("Less", distance, np.int64(0))
    past = build("GreaterOrEqual", distance, np.int64(stage.window))
    mask = build("Unsqueeze", build("Where", build("Or", future, past), np.float32(-1e30), np.float32(0)), [1])
    slots = build("Unsqueeze", build("Mod", positions, capacity), [1, 3])  # [B, 1, T, 1]
    if isinstance(stage.input_proj, nn.Linear):
        x = build.linear(x, stage.input_proj.weight, precise=stage.takes_audio)
    for number, layer in enumerate(stage.transformer.layers):
        assert isinstance(layer, TransformerLayer)
        rings = []
        for kind in ("keys", "values"):
            shape: list[int | str] = ["batch", heads, capacity, head_dim]
            rings.append(build.input(f"{kind}_{name}_{number}", TensorProto.FLOAT, shape))
        x = add_layer(build, layer, x, rings, (cosine, signed_sine), mask, slots)
    if isinstance(stage.output_proj, nn.Linear):
        x = build.linear(x, stage.output_proj.weight, precise=stage.makes_audio)
    return x


def add_layer(
    build: GraphBuilder,
    layer: TransformerLayer,
    x: str,
    rings: list[str],
    rotation: tuple[str, str],
    mask: str,
    slots: str,
) -> str:
    """Append a layer with input [B, T, D]; its rings, with these frames written to them, are the outputs `next_...`."""
    attention: Any = layer.self_attn
    scale: Any = layer.layer_scale_1.scale
    heads, width = attention.num_heads, layer.norm1.weight.shape[0]
    head_dim = width // heads
    normed = build("LayerNormalization", x, layer.norm1.weight, layer.norm1.bias, epsilon=layer.norm1.eps)
    qkv = build.linear(normed, halved_pairs(attention.in_projs[0].weight, heads))
    qkv = build("Transpose", build("Reshape", qkv, [0, 0, 3 * heads, head_dim]), perm=[0, 2, 1, 3])
    rotated, value = build.several(2, "Split", qkv, [2 * heads, heads], axis=1)
    first, second = build.several(2, "Split", rotated, [head_dim // 2, head_dim // 2], axis=3)
    swapped = build("Concat", second, first, axis=3)
    rotated = build("Add", build("Mul", rotated, rotation[0]), build("Mul", swapped, rotation[1]))
    query, key = build.several(2, "Split", rotated, [heads, heads], axis=1)
    index = build("Expand", slots, build("Shape", key))
    written = []
    for ring, new in zip(rings, (key, value), strict=True):
        written.append(build("ScatterElements", ring, index, new, axis=2))
        build.output(f"next_{ring}", written[-1], TensorProto.FLOAT, ["batch", heads, "slots", head_dim])
    scores = build("Add", build("MatMul", query, build("Transpose", written[0], perm=[0, 1, 3, 2])), mask)
    attended = build("MatMul", build("Softmax", scores, axis=-1), written[1])
    attended = build("Reshape", build("Transpose", attended, perm=[0, 2, 1, 3]), [0, 0, width])
    x = build("Add", x, build.linear(attended, attention.out_projs[0].weight * scale[:, None]))
    normed = build("LayerNormalization", x, layer.norm2.weight, layer.norm2.bias, epsilon=layer.norm2.eps)
    wide = build.linear(normed, layer.linear1.weight)
    # The exact GELU in basic operations, which runtimes fuse again.
    bell = build("Add", build("Erf", build("Div", wide, np.float32(math.sqrt(2)))), np.float32(1))
    activated = build("Mul", build("Mul", wide, bell), np.float32(0.5))
    return build("Add", x, build.linear(activated, layer.linear2.weight * layer.layer_scale_2.scale[:, None]))


def halved_pairs(weight: Tensor, heads: int) -> Tensor:
    """Return a fused qkv weight [3 * D, D] with scaled queries and the two channels of a rotary pair half a head apart.

    To permute the channels of queries and keys alike does not change the scores.
    """
    query, key, value = weight.unflatten(0, (3, heads, -1)).unbind()  # [H, head_dim, D] each
    query, key = (torch.cat((part[:, 0::2], part[:, 1::2]), dim=1) for part in (query, key))
    return torch.stack((query / math.sqrt(query.shape[1]), key, value)).flatten(0, 2)


def add_search(build: GraphBuilder, quantizer: FoldedQuantizer, latent: str) -> str:
    """Return the codes [N, B, F] of a latent [B, F, D] as `FoldedQuantizer.encode`, in float32."""
    weights = quantizer.weights
    count, _, dim = weights.rows.shape
    residual = add_projection(build, quantizer.project_in, latent)
    remaining = build.linear(residual, weights.in_weight, weights.in_bias, precise=True)
    codes = []
    for level in range(count):
        rest = (count - level - 1) * dim
        searched = remaining
        if rest:
            searched, remaining = build.several(2, "Split", remaining, [dim, rest], axis=2)
        scores = build("MatMul", searched, quantizer.directions[level])
        codes.append(build("ArgMax", scores, axis=2, keepdims=0))
        if rest:
            row = build("Gather", weights.rows[level], codes[-1], axis=0)
            change = build("MatMul", row, weights.coupling[level * dim : (level + 1) * dim, -rest:])
            remaining = build("Sub", remaining, change)
    return build("Concat", *(build("Unsqueeze", level, [0]) for level in codes), axis=0)


def add_lookup(build: GraphBuilder, quantizer: FoldedQuantizer, codes: str) -> str:
    """Return the latent [B, F, D] of codes [N, B, F], float32; a code of -1 adds nothing.

    A one is appended to every codebook row, to be multiplied with the bias of its level; -1 reads a row of zeros.
    """
    weights = quantizer.weights
    count, size, dim = weights.rows.shape
    rows = torch.cat((weights.rows, torch.ones(count, size, 1)), dim=2).flatten(0, 1)
    rows = torch.cat((rows, torch.zeros(1, dim + 1)))
    out_weight = weights.out_weight.unflatten(0, (count, dim))
    out_weight = torch.cat((out_weight, weights.out_bias[:, None]), dim=1).flatten(0, 1)
    offsets = np.arange(count, dtype=np.int64)[:, None, None] * size
    index = build("Where", build("Less", codes, np.int64(0)), np.int64(count * size), build("Add", codes, offsets))
    found = build("Gather", rows, build("Transpose", index, perm=[1, 2, 0]), axis=0)  # [B, F, N, dim + 1]
    total = build("MatMul", build("Reshape", found, [0, 0, count * (dim + 1)]), out_weight)
    return add_projection(build, quantizer.project_out, total)


def add_projection(build: GraphBuilder, projection: FoldedProjection, x: str) -> str:
    """Apply a projection of the quantizer in float32; without a weight it is the identity."""
    return x if projection.weight is None else build.linear(x, projection.weight, projection.bias, precise=True)
