"""Write a Hugging Face model folder that loads where `moss_train` is not installed."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from moss_train.export.load import load_tokenizer, open_source
from moss_train.export.training_state import STATE_FOLDER, Network, write_training_state
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.utils.errors import UserError
from moss_train.utils.files import counted

MODEL_CARD = """---
library_name: transformers
tags: [audio, audio-tokenizer, neural-codec]
---

# {name}

A Cat audio tokenizer (causal audio tokenizer with transformer, arXiv 2602.10934) trained with moss_train.

| | |
|---|---|
| sampling rate | {sampling_rate} Hz, {channels} |
| frame rate | {frame_rate:g} frames per second |
| levels | {levels} x {codebook_size} codes |
| bitrate | {bitrate:g} bit/s per level, {total:g} bit/s in all |
| parameters | {parameters:,} |

```python
import soundfile
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
samples, rate = soundfile.read("speech.wav", dtype="float32", always_2d=True)  # at {sampling_rate} Hz
audio = torch.from_numpy(samples.T.copy())[None]  # [batch, channels, samples]
codes = model.encode(audio).audio_codes  # [levels, batch, frames]
restored = model.decode(codes).audio  # any prefix codes[:n] decodes too
streamed = model.encode(audio, chunk_duration={chunk:g}).audio_codes  # the same codes, chunk by chunk
```
"""


def export(
    source: str | Path, out: str | Path, dtype: str = "float32", *, with_training_state: bool = False, ema: bool = False
) -> Path:
    """Write the tokenizer of a run, checkpoint or folder as configuration, weights, model code and model card.

    Args:
        out: a folder that does not exist yet.
        dtype: of the stored weights: float32, bfloat16 or float16; the quantizer stays float32.
        with_training_state: also write text LM and discriminators, so that `fit init=<out>` goes on with them.
        ema: write the moving average of the tokenizer's weights instead.

    Raises:
        UserError: `out` exists, there is no model at `source`, or it has no training state to write.
    """
    target = check_target(out)
    dtypes = ("float32", "bfloat16", "float16")
    if dtype not in dtypes:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(dtypes)}")
    networks = training_networks(source) if with_training_state else {}
    model = load_tokenizer(source, ema=ema)
    torch.nn.Module.to(model, dtype=getattr(torch, dtype))
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_folder(model, partial, target.name)
        if networks:
            write_training_state(partial / STATE_FOLDER, networks)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def check_target(out: str | Path) -> Path:
    """Where to export to. Raises UserError when something is there already."""
    if Path(out).exists():
        raise UserError(f"out={out} exists already: give another folder, or remove it first")
    return Path(out)


def training_networks(source: str | Path) -> dict[str, Network]:
    """Text LM and discriminators of a run, checkpoint or export; UserError when it has neither."""
    found = open_source(source)
    if not found.nodes:
        raise UserError(f"{source} has no text LM and no discriminators: leave out with_training_state")
    weights = found.load()
    return {name: Network(node, weights[name]) for name, node in found.nodes.items()}


def write_folder(model: MossAudioTokenizerModel, folder: Path, name: str) -> None:
    """Save weights, configuration, the flat copy of `moss_train.model` and the card."""
    MossAudioTokenizerConfig.register_for_auto_class("AutoConfig")
    MossAudioTokenizerModel.register_for_auto_class("AutoModel")
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how it wraps a full disk
        raise UserError(f"{folder}: the weights could not be written: {error}") from error
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)  # safetensors makes files that other users cannot read
    config = model.config
    size = config.quantizer_kwargs["codebook_size"]
    bitrate = config.frame_rate * (size - 1).bit_length()
    card = MODEL_CARD.format(
        name=name,
        sampling_rate=config.sampling_rate,
        channels=counted(config.number_channels, "channel"),
        frame_rate=config.frame_rate,
        levels=config.num_quantizers,
        codebook_size=size,
        bitrate=bitrate,
        total=bitrate * config.num_quantizers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        chunk=1 / config.frame_rate,
    )
    (folder / "README.md").write_text(card)
