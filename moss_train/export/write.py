"""Write a Hugging Face model folder that loads where `moss_train` is not installed."""

import copy
import hashlib
import inspect
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from moss_train.audio.io import read_audio
from moss_train.export.card import CardInfo, model_card, training_facts
from moss_train.export.load import STATE_FOLDER, load_tokenizer, open_source, write_training_state
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.model.feature_extraction_moss_audio_tokenizer import MossAudioTokenizerFeatureExtractor
from moss_train.utils.errors import UserError, first_line

CONNECTION_ERRORS: tuple[Any, ...] = HfHubHTTPError.__bases__
"""Errors of failed connections: that of the hub's HTTP client, which depends on the hub's version, and OSError."""
PIPELINE = "pipeline_moss_audio_tokenizer"


def export(
    source: str | Path,
    out: str | Path,
    dtype: str = "float32",
    *,
    with_training_state: bool = False,
    ema: bool | None = None,
    part: str | None = None,
    info: CardInfo | None = None,
    heldout: str | Path | None = None,
) -> Path:
    """Write the tokenizer of a run, checkpoint or folder as configuration, weights, model code and model card.

    Args:
        out: a folder that does not exist yet.
        dtype: of the stored weights: float32, bfloat16 or float16; the quantizer stays float32.
        with_training_state: also write text LM and discriminators, so that `fit init=<out>` continues with them.
        ema: whether to write the moving average of the weights, as in `load_tokenizer`.
        part: "encoder" or "decoder" writes only that half and the quantizer.
        info: facts for the card that the model itself does not contain.
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
    training = open_source(source) if with_training_state else None
    if training is not None and not training.nodes:
        raise UserError(f"{source} has no text LM and no discriminators: leave out with_training_state")
    complete = load_tokenizer(source, ema=ema)
    if complete.part not in (None, part):
        raise UserError(f"{source} holds a {complete.part} only: write part={complete.part}")
    clips = read_clips(heldout, complete.config) if heldout is not None and dtype != "float32" else []
    config = copy.deepcopy(complete.config)
    if part is not None:
        config.part = part
    model = MossAudioTokenizerModel(config).eval()
    model.load_state_dict({name: value for name, value in complete.state_dict().items() if name in model.state_dict()})
    torch.nn.Module.to(model, dtype=getattr(torch, dtype))
    if info.level_db is not None:
        model.config.training_level_db = info.level_db
    info = replace(info, training=training_facts(source))
    if clips and part != "decoder":
        differ = compare_codes(complete, partial(codes_of, model), clips)
        info = replace(info, precision=f"{dtype}; {differ} from float32")
    elif dtype != "float32":
        info = replace(info, precision=f"{dtype}; the codes were not compared with float32")
    with new_folder(target) as folder:
        write_folder(model, folder, info.repository or target.name, info)
        write_test_vectors(model, complete, folder)
        if training is not None:
            write_training_state(folder / STATE_FOLDER, training.nodes, training.load())
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` to write to, which becomes `target` when the block ends without error."""
    folder = target.with_name(f".partial-{target.name}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def codes_of(model: MossAudioTokenizerModel, audio: Tensor) -> Tensor:
    """Return the codes [N, B, frames] of audio [B, C, T]."""
    output: Any = model.encode(audio)
    return output.audio_codes


def compare_codes(model: MossAudioTokenizerModel, encode: Callable[[Tensor], Tensor], clips: Sequence[Tensor]) -> str:
    """Return in words the fraction of codes of clips [C, T] that differ between a model and an encoder of [1, C, T]."""
    differs = torch.cat([(codes_of(model, clip[None]) != encode(clip[None])).flatten() for clip in clips])
    seconds = sum(clip.shape[1] for clip in clips) / model.config.sampling_rate
    return f"{differs.double().mean():.2%} of the codes of {seconds:.0f} s of held-out audio differ"


def read_clips(heldout: str | Path, config: MossAudioTokenizerConfig, limit: int = 32) -> list[torch.Tensor]:
    """Read up to `limit` audio files [C, T] of a folder, or one file, at the model's rate and channels.

    Raises:
        UserError: there is no audio at `heldout`, or a file has no samples.
    """
    path = Path(heldout)
    suffixes = {".wav", ".flac", ".mp3", ".ogg", ".opus"}
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)[:limit]
    if not files:
        raise UserError(f"heldout={heldout} has no audio files")
    rate, channels = config.sampling_rate, config.number_channels
    clips = [read_audio(file, sampling_rate=rate, num_channels=channels)[0] for file in files]
    for file, clip in zip(files, clips, strict=True):
        if not clip.shape[1]:
            raise UserError(f"heldout={heldout}: {file} has no samples")
    return clips


def check_target(out: str | Path) -> Path:
    """Return the folder to export to. Raises UserError if it exists already."""
    if Path(out).exists():
        raise UserError(f"out={out} exists already: give another folder, or remove it first")
    return Path(out)


def write_folder(model: MossAudioTokenizerModel, folder: Path, name: str, info: CardInfo) -> None:
    """Save weights, configuration, feature extractor, the flat copy of `moss_train.model` and the card."""
    config = model.config
    MossAudioTokenizerConfig.register_for_auto_class("AutoConfig")
    MossAudioTokenizerModel.register_for_auto_class("AutoModel")
    MossAudioTokenizerFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # its error for a full disk
        raise UserError(f"{folder}: the weights could not be written: {error}") from error
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)  # safetensors makes files that other users cannot read
    MossAudioTokenizerFeatureExtractor(config.number_channels, config.sampling_rate).save_pretrained(folder)
    shutil.copyfile(Path(inspect.getfile(MossAudioTokenizerModel)).parent / f"{PIPELINE}.py", folder / f"{PIPELINE}.py")
    # A class can register for one auto class only. AutoProcessor also gets the feature extractor: there is no text.
    pipeline = {"impl": f"{PIPELINE}.MossAudioTokenizerPipeline", "pt": ["AutoModel"]}
    for file, further, known, more in (
        ("config.json", "AutoModelForAudioTokenization", "AutoModel", {"feature-extraction": pipeline}),
        ("preprocessor_config.json", "AutoProcessor", "AutoFeatureExtractor", None),
    ):
        content = json.loads((folder / file).read_text("utf-8"))
        content["auto_map"][further] = content["auto_map"][known]
        if more is not None:
            content["custom_pipelines"] = more
        (folder / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    (folder / "README.md").write_text(model_card(name, model, info), "utf-8")


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Print the files, create the repository if it is missing, and upload all files in one commit.

    The token is the one that `hf auth login` or HF_TOKEN gave; it is never shown.

    Returns:
        The address of the commit.

    Raises:
        UserError: no token, no network, no permission, or a name that is no repository.
    """
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    print(f"to {repository}: {len(sizes)} files, {sum(sizes.values()):,} bytes", file=sys.stderr)
    for path, size in sizes.items():
        print(f"  {size:>13,}  {path.relative_to(folder)}", file=sys.stderr)
    api = HfApi()
    try:
        if get_token() is None:
            raise LocalTokenNotFoundError
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by moss_train")
        return commit.commit_url
    except HFValidationError as error:
        reason = f" is not the name of a repository, owner/name: {first_line(error)}"
    except LocalTokenNotFoundError:
        reason = " needs a token of the Hugging Face Hub: run `hf auth login` or set HF_TOKEN"
    except HfHubHTTPError as error:
        status: Any = getattr(error.response, "status_code", "no")
        known = {401: "the token is not valid", 403: "the token may not write there", 404: "no such owner"}
        reason = f": {known.get(status, first_line(error))} (status {status}); {folder} is complete"
    except CONNECTION_ERRORS as error:
        reason = f": the Hub cannot be reached ({type(error).__name__}); {folder} is complete"
    raise UserError(f"push={repository}{reason}")


def known_audio(sampling_rate: int, num_channels: int, seconds: float) -> Tensor:
    """Return two clips [2, C, T], the same on every machine: gliding harmonics in syllables, and bursts of noise."""
    time = torch.arange(round(seconds * sampling_rate), dtype=torch.float64) / sampling_rate
    pitch = 120 * torch.exp2(0.4 * torch.sin(2 * math.pi * 0.31 * time))
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / sampling_rate
    voice = sum(torch.sin(k * phase) / k for k in range(1, 12))
    voice = voice * (0.5 + 0.5 * torch.sin(2 * math.pi * 3.1 * time)).square()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(time), generator=generator, dtype=torch.float64)
    noise = noise * (0.5 + 0.5 * torch.sin(2 * math.pi * 1.7 * time)) ** 4
    mono = torch.stack((0.1 * voice, 0.05 * noise))
    scales = torch.tensor([1.0, 0.7, 0.5, 0.3])[:num_channels, None]
    # Rounded to 16 bits, so that the stored samples are those that were encoded.
    return (mono[:, None] * scales * 32768).round().clamp(-32768, 32767) / 32768


def audio_beyond_window(config: MossAudioTokenizerConfig) -> Tensor:
    """Return `known_audio` at a model's rate and channels, two seconds longer than its attention window."""
    seconds = config.causal_transformer_context_duration + 2.0
    return known_audio(config.sampling_rate, config.number_channels, seconds).float()


@torch.no_grad()
def write_test_vectors(model: MossAudioTokenizerModel, complete: MossAudioTokenizerModel, folder: Path) -> None:
    """Write `test_vectors/` and `verify.py` into an exported folder.

    Args:
        model: the model as exported, perhaps with 16-bit weights or only half of it.
        complete: the whole model in float32, whose codes are the reference.
    """
    audio = audio_beyond_window(model.config)
    codes = codes_of(complete if model.part == "decoder" else model, audio)
    tensors = {"audio": (audio * 32768).to(torch.int16), "codes": codes.to(torch.int32)}
    if model.part != "encoder":
        decoded: Any = model.decode(codes)
        tensors["decoded"] = decoded.audio.float()[:1, :1].contiguous()
    target = folder / "test_vectors"
    target.mkdir()
    (target / "vectors.safetensors").write_bytes(save(tensors))
    files = sorted(folder.glob("*.safetensors"))
    record = {
        # For another installation: least fraction of equal codes, largest error of the audio relative to its peak.
        "tolerances": {"codes": 0.99, "audio": 2e-3},
        "codes_sha256": hashlib.sha256(tensors["codes"].numpy().tobytes()).hexdigest(),
        "weights_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    (target / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.copyfile(Path(__file__).with_name("verify.py"), folder / "verify.py")
