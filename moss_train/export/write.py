"""Write a Hugging Face model folder that loads where `moss_train` is not installed."""

import copy
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from moss_train.audio.io import read_audio
from moss_train.export.card import CardInfo, model_card, training_facts
from moss_train.export.load import load_tokenizer, open_source
from moss_train.export.training_state import STATE_FOLDER, Network, write_training_state
from moss_train.export.vectors import count_changed_codes, write_test_vectors
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.model.feature_extraction_moss_audio_tokenizer import MossAudioTokenizerFeatureExtractor
from moss_train.utils.errors import UserError

PIPELINE = "pipeline_moss_audio_tokenizer"


def export(
    source: str | Path,
    out: str | Path,
    dtype: str = "float32",
    *,
    with_training_state: bool = False,
    ema: bool = False,
    part: str | None = None,
    info: CardInfo | None = None,
    heldout: str | Path | None = None,
) -> Path:
    """Write the tokenizer of a run, checkpoint or folder as configuration, weights, model code and model card.

    Args:
        out: a folder that does not exist yet.
        dtype: of the stored weights: float32, bfloat16 or float16; the quantizer stays float32.
        with_training_state: also write text LM and discriminators, so that `fit init=<out>` goes on with them.
        ema: write the moving average of the tokenizer's weights instead.
        part: "encoder" or "decoder" writes only that half and the quantizer.
        info: what the card says besides what the model itself tells.
        heldout: audio on which the codes of 16-bit weights are compared with those of float32.

    Raises:
        UserError: `out` exists, there is no model at `source`, or it has no training state to write.
    """
    target = check_target(out)
    info = info or CardInfo()
    dtypes = ("float32", "bfloat16", "float16")
    if dtype not in dtypes:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(dtypes)}")
    if part not in (None, "encoder", "decoder"):
        raise UserError(f"part={part!r} is not encoder or decoder")
    networks = training_networks(source) if with_training_state else {}
    complete = load_tokenizer(source, ema=ema)
    if complete.part not in (None, part):
        raise UserError(f"{source} holds a {complete.part} only: write part={complete.part}")
    clips = read_clips(heldout, complete.config) if heldout is not None and dtype != "float32" else []
    model = take_part(complete, part)
    torch.nn.Module.to(model, dtype=getattr(torch, dtype))
    if info.level_db is not None:
        model.config.training_level_db = info.level_db
    info = replace(info, training=training_facts(source))
    if clips and part != "decoder":
        fraction = count_changed_codes(complete, model, clips)
        seconds = sum(clip.shape[1] for clip in clips) / complete.config.sampling_rate
        precision = f"{dtype}; {fraction:.2%} of the codes of {seconds:.0f} s of held-out audio differ from float32"
        info = replace(info, precision=precision)
    elif dtype != "float32":
        info = replace(info, precision=f"{dtype}; the codes were not compared with float32")
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_folder(model, partial, target.name, info)
        write_test_vectors(model, complete, partial)
        if networks:
            write_training_state(partial / STATE_FOLDER, networks)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def take_part(model: MossAudioTokenizerModel, part: str | None) -> MossAudioTokenizerModel:
    """Return a copy of the model, or of its "encoder" or "decoder" with the quantizer."""
    config = copy.deepcopy(model.config)
    if part is not None:
        config.part = part
    taken = MossAudioTokenizerModel(config)
    taken.load_state_dict({name: value for name, value in model.state_dict().items() if name in taken.state_dict()})
    return taken.eval()


def read_clips(heldout: str | Path, config: MossAudioTokenizerConfig, limit: int = 32) -> list[torch.Tensor]:
    """Read up to `limit` audio files [C, T] of a folder, or one file, at the model's rate and channels.

    Raises:
        UserError: there is no audio at `heldout`.
    """
    path = Path(heldout)
    suffixes = {".wav", ".flac", ".mp3", ".ogg", ".opus"}
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)[:limit]
    if not files:
        raise UserError(f"heldout={heldout} has no audio files")
    rate, channels = config.sampling_rate, config.number_channels
    return [read_audio(file, sampling_rate=rate, num_channels=channels)[0] for file in files]


def check_target(out: str | Path) -> Path:
    """Return where to export to. Raises UserError when something is there already."""
    if Path(out).exists():
        raise UserError(f"out={out} exists already: give another folder, or remove it first")
    return Path(out)


def training_networks(source: str | Path) -> dict[str, Network]:
    """Return text LM and discriminators of a run, checkpoint or export; UserError when it has neither."""
    found = open_source(source)
    if not found.nodes:
        raise UserError(f"{source} has no text LM and no discriminators: leave out with_training_state")
    weights = found.load()
    return {name: Network(node, weights[name]) for name, node in found.nodes.items()}


def write_folder(model: MossAudioTokenizerModel, folder: Path, name: str, info: CardInfo) -> None:
    """Save weights, configuration, feature extractor, the flat copy of `moss_train.model` and the card."""
    config = model.config
    MossAudioTokenizerConfig.register_for_auto_class("AutoConfig")
    MossAudioTokenizerModel.register_for_auto_class("AutoModel")
    MossAudioTokenizerFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how it wraps a full disk
        raise UserError(f"{folder}: the weights could not be written: {error}") from error
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)  # safetensors makes files that other users cannot read
    MossAudioTokenizerFeatureExtractor(config.number_channels, config.sampling_rate).save_pretrained(folder)
    shutil.copyfile(Path(inspect.getfile(MossAudioTokenizerModel)).parent / f"{PIPELINE}.py", folder / f"{PIPELINE}.py")
    change_json(folder / "config.json", add_classes)
    change_json(folder / "preprocessor_config.json", add_processor)
    (folder / "README.md").write_text(model_card(name, model, info), "utf-8")


def add_classes(config: dict[str, Any]) -> None:
    """Name the further classes that transformers finds in the folder: one class cannot register for two."""
    config["auto_map"]["AutoModelForAudioTokenization"] = config["auto_map"]["AutoModel"]
    pipeline = {"impl": f"{PIPELINE}.MossAudioTokenizerPipeline", "pt": ["AutoModel"]}
    config["custom_pipelines"] = {"feature-extraction": pipeline}


def add_processor(config: dict[str, Any]) -> None:
    """Let `AutoProcessor` give the feature extractor: there is nothing else to process."""
    config["auto_map"]["AutoProcessor"] = config["auto_map"]["AutoFeatureExtractor"]


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply `change` to the content of a JSON file."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
