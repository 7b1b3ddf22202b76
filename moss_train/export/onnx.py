"""Write a folder of ONNX graphs that encodes and decodes with numpy and onnxruntime alone."""

import json
import shutil
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moss_train.export.card import (
    CardInfo,
    evaluation_rows,
    evaluation_section,
    fact_table,
    level_fact,
    metadata,
    model_facts,
)
from moss_train.export.load import load_tokenizer
from moss_train.export.onnx_runtime import SETTINGS_FILE, VECTORS_FILE, Tokenizer
from moss_train.export.write import audio_beyond_window, check_target, codes_of, compare_codes, new_folder, read_clips
from moss_train.model import MossAudioTokenizerModel
from moss_train.utils.errors import UserError

CARD = """
# {name}

A Cat audio tokenizer (causal audio tokenizer with transformer, arXiv 2602.10934) as ONNX graphs, trained with
moss_train.
`runtime.py` needs numpy and onnxruntime, nothing else; `python runtime.py` checks this folder on your machine.

{facts}

```python
import sys

import soundfile

sys.path.insert(0, "{name}")  # this folder
from runtime import Tokenizer

tokenizer = Tokenizer("{name}")
samples, rate = soundfile.read("speech.wav", dtype="float32", always_2d=True)  # at {sampling_rate} Hz
{usage}
```

## Graphs

{half}One call of `encoder.onnx` takes audio [batch, {channels}, frames * {hop}] of 1 to {chunk_frames} whole frames to
`codes` [{levels}, batch, frames]; `decoder.onnx` takes codes to `audio`, and -1 stands for a level that is not given.
Further inputs are the `position` of every stream in frames and, for every layer, rings of keys and values, all zero at
the start; the output `next_x` is the input `x` of the next call. A position of zero starts a stream anew, whatever its
rings hold.
{int8}{evaluation}"""

INT8 = """
The scale of the 8-bit products is that of all samples of a call. So codes and audio depend on how a clip is cut into
chunks and on the other clips of its batch: for the same codes each time, encode whole clips one by one.
"""


def export_onnx(
    source: str | Path,
    out: str | Path,
    *,
    weights: str = "float32",
    chunk_frames: int = 8,
    ema: bool | None = None,
    part: str | None = None,
    info: CardInfo | None = None,
    heldout: str | Path | None = None,
) -> Path:
    """Write the tokenizer of a run, checkpoint or folder as ONNX graphs, a runtime, test vectors and a model card.

    Args:
        out: a folder that does not exist yet.
        weights: "float32", or "int8" for products in 8 bits; quantizer and waveform projections stay float32.
        chunk_frames: the most code frames of one call; a larger number is faster offline and needs larger KV caches.
        ema, part, info: as in `export`.
        heldout: audio on which the codes are compared with those of torch, for the card.

    Raises:
        UserError: the package onnx or onnxruntime is missing, `out` exists, or there is no such model at `source`.
    """
    target = check_target(out)
    if weights not in ("float32", "int8"):
        raise UserError(f"weights={weights!r} is not float32 or int8")
    if chunk_frames < 1:
        raise UserError(f"chunk_frames={chunk_frames} has to be 1 or more")
    for package in ("onnx", "onnxruntime"):
        try:
            __import__(package)
        except ImportError:
            raise UserError(f"format=onnx needs the package {package}: pip install 'moss_train[onnx]'") from None
    model = load_tokenizer(source, ema=ema, part=part)
    if model.part not in (None, part):
        raise UserError(f"{source} holds a {model.part} only: write part={model.part}")
    clips = read_clips(heldout, model.config) if heldout is not None and part != "decoder" else []
    with new_folder(target) as folder:
        write_graphs(model, folder, part, chunk_frames, weights)
        shutil.copyfile(Path(__file__).with_name("onnx_runtime.py"), folder / "runtime.py")
        equal = write_vectors(model, folder, part)
        described = weights
        if clips:
            graphs = Tokenizer(folder)
            differ = compare_codes(model, lambda audio: torch.from_numpy(graphs.encode(audio.numpy())), clips)
            described += f"; {differ} from torch"
        elif equal is not None:
            described += f"; {1 - equal:.2%} of the codes of known audio differ from torch"
        card = onnx_card(target.name, model, info or CardInfo(), described, chunk_frames, part)
        (folder / "README.md").write_text(card, "utf-8")
    return target


def write_graphs(
    model: MossAudioTokenizerModel,
    folder: Path,
    part: str | None = None,
    chunk_frames: int = 8,
    weights: str = "float32",
    largest_file: int = 2**30,
) -> None:
    """Write `encoder.onnx`, `decoder.onnx` (or the one that `part` names) and `codec.json`.

    If a graph has more than `largest_file` bytes of weights, they are written beside it, to `encoder.weights` or
    `decoder.weights`: a protobuf file cannot exceed 2 GiB.
    """
    from moss_train.export.onnx_graph import step_graph

    config = model.config
    settings: dict[str, Any] = {
        "sampling_rate": config.sampling_rate,
        "number_channels": config.number_channels,
        "downsample_rate": config.downsample_rate,
        "num_quantizers": config.num_quantizers,
        "codebook_size": config.quantizer_kwargs["codebook_size"],
        "chunk_frames": chunk_frames,
        "weights": weights,
    }
    if config.output_ratio > 1:
        settings["output_sampling_rate"] = config.output_sampling_rate
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    metadata = {key: str(value) for key, value in settings.items()}
    for name in ("encoder", "decoder") if part is None else (part,):
        parameters = chain(getattr(model, name).parameters(), model.quantizer.parameters())
        size = sum(parameter.numel() for parameter in parameters) * (1 if weights == "int8" else 4)
        beside = (folder / f"{name}.weights").open("wb") if size > largest_file else nullcontext()
        with beside as file:
            graph = step_graph(model, name, chunk_frames, weights == "int8", metadata, file)
        (folder / f"{name}.onnx").write_bytes(graph.SerializeToString())


@torch.no_grad()
def write_vectors(model: MossAudioTokenizerModel, folder: Path, part: str | None) -> float | None:
    """Write torch's codes and audio for a known input, and how close the graphs have to come on other machines.

    Returns:
        The fraction of codes that the graphs reproduce on this machine, None for a decoder alone.
    """
    config, audio = model.config, audio_beyond_window(model.config)
    if model.part == "decoder":
        shape = (config.num_quantizers, 2, model.num_frames(audio.shape[2]))
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, config.quantizer_kwargs["codebook_size"], shape, generator=generator)
    else:
        codes = codes_of(model, audio)
    stored: dict[str, Any] = {"audio": (audio * 32768).numpy().astype(np.int16)}
    stored["codes"] = codes.numpy().astype(np.int32)
    equal = None
    if part != "decoder":
        equal = float((Tokenizer(folder).encode(audio.numpy()) == codes.numpy()).mean())
        stored["least_equal"] = np.float64(equal - max(0.01, 0.1 * (1 - equal)))
    if part != "encoder":
        output: Any = model.decode(codes[:, :1])
        decoded = output.audio[:, :1].numpy()
        restored = Tokenizer(folder).decode(codes[:, :1].numpy())[:, :1]  # a new one: the encoder's graph is large
        error = np.abs(restored - decoded).max() / np.abs(decoded).max()
        stored |= {"decoded": decoded, "greatest_error": np.float64(max(1e-4, 1.5 * error))}
    with (folder / VECTORS_FILE).open("wb") as file:
        np.savez(file, **stored)
    return equal


def onnx_card(
    name: str, model: MossAudioTokenizerModel, info: CardInfo, weights: str, chunk_frames: int, part: str | None
) -> str:
    """Return the README of a folder of graphs."""
    config, is_int8 = model.config, weights.startswith("int8")
    measured = [] if info.evaluation is None else evaluation_rows(info.evaluation)
    usage = []
    if part != "decoder":
        usage.append("codes = tokenizer.encode(samples.T[None])  # [levels, batch, frames]; a started frame counts")
    if part != "encoder":
        shape = f"[batch, channels, frames * {config.upsample_rate}]"
        usage.append(f"restored = tokenizer.decode(codes[:8])  # {shape}; any prefix of the levels")
    usage.append("stream = tokenizer.stream()")
    if part != "decoder":
        usage.append(
            "codes = stream.encode(samples[:1000].T[None])  # any number of samples; stream.flush() ends a clip"
        )
    if part != "encoder":
        likeness = "close" if is_int8 else "equal"
        usage.append(f"heard = stream.decode(codes)  # {likeness} to decoding the whole")
    body = CARD.format(
        name=name,
        facts=fact_table(
            model_facts(config, info, {"weights": weights, "level of the training data": level_fact(info)})
        ),
        usage="\n".join(usage),
        half="" if part is None else f"This folder holds the {part} only. ",
        int8=INT8 if is_int8 else "",
        evaluation=evaluation_section(measured),
        sampling_rate=config.sampling_rate,
        hop=config.downsample_rate,
        channels=config.number_channels,
        chunk_frames=chunk_frames,
        levels=config.num_quantizers,
    )
    front = metadata(name, info, measured).replace('"transformers"', '"onnx"', 1)
    return f"---\n{front}---\n{body}"
