"""Load other codecs by name: through transformers, their own packages, or the code of their repositories.

Weights are read from a path or from what the hub has already stored on this machine; nothing is downloaded.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from moss_train.evaluation.codecs.base import (
    BigCodec,
    Codec,
    DacCodec,
    EncodecCodec,
    HiggsCodec,
    MimiCodec,
    MimoCodec,
    Qwen3TtsCodec,
    SpeechTokenizerCodec,
    WrappedCodec,
    Xcodec2Codec,
    XYTokenizerCodec,
)
from moss_train.evaluation.metrics.base import missing_package
from moss_train.utils.errors import UserError, first_line
from moss_train.utils.files import package_version, read_json

OWN_ENVIRONMENT = "an environment of its own, with this package installed into it by pip install --no-deps"
_WAY_OUT = "or score its output, written as WAV into reference/ and reconstruction/ folders, with pairs=<folder>"


def load_codec(name: str, weights: str | None, device: torch.device, code: str | None = None) -> Codec:
    """Build a codec by name. Raises UserError for unknown names and missing weights, packages or code, with what to do.

    code: for the two codecs whose code comes in no package: the folder of the repository (mimo), or that of the weights
        once more (xy_tokenizer, whose code lies beside them). The code of either runs only if it is named here.
    """
    if name not in CODECS:
        raise UserError(f"codec={name} has to be one of {', '.join(CODECS)}")
    if code is not None and name not in _CODE:
        raise UserError(f"code_dir={code} has no effect with codec={name}")
    if weights is None:
        raise UserError(
            f"codec={name} needs weights=<folder>, or the name of a repository that is stored on this machine"
        )
    if code is None and name in _CODE:
        raise UserError(f"codec={name} runs code that comes in no package: {_CODE[name]}")
    try:
        return _LOADERS[name](weights, code).to(device)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"weights={weights}: {first_line(error)}") from error
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"codec={name}: its code does not run beside transformers {package_version('transformers')} "
            f"({first_line(error)}): give it {OWN_ENVIRONMENT}; {_WAY_OUT}"
        ) from error


def _from_transformers(class_name: str, weights: str, **options: Any) -> Any:
    transformers = importlib.import_module("transformers")
    if not hasattr(transformers, class_name):
        raise UserError(f"transformers {transformers.__version__} has no {class_name}: install a newer one")
    return getattr(transformers, class_name).from_pretrained(weights, local_files_only=True, **options)


def _of_transformers(adapter: Callable[..., WrappedCodec], *class_names: str) -> Callable[..., WrappedCodec]:
    return lambda weights, code: adapter(*(_from_transformers(name, weights) for name in class_names))


def _package(name: str, hint: str = "") -> Any:
    if reason := missing_package(name, hint):
        raise UserError(f"codec needs the package {name.replace('_', '-')}: {reason}; {_WAY_OUT}")
    return importlib.import_module(name)


def _speechtokenizer(weights: str, code: None) -> WrappedCodec:
    package = _package("speechtokenizer")
    paths = [Path(weights) / name for name in ("config.json", "SpeechTokenizer.pt")]
    if missing := next((path for path in paths if not path.is_file()), None):
        raise UserError(f"weights={weights}: there is no {missing.name}")
    return SpeechTokenizerCodec(package.SpeechTokenizer.load_from_checkpoint(*map(str, paths)))


def _bigcodec(weights: str, code: None) -> WrappedCodec:
    return BigCodec(_package("bigcodec").BigCodec.from_pretrained(weights, local_files_only=True))


def _qwen3_tts(weights: str, code: None) -> WrappedCodec:
    _package("qwen_tts", f"it pins an older transformers: give it {OWN_ENVIRONMENT}")
    core = importlib.import_module("qwen_tts.core")
    return Qwen3TtsCodec(core.Qwen3TTSTokenizerV2Model.from_pretrained(weights, local_files_only=True))


def _mimo(weights: str, code: str) -> WrappedCodec:
    folders = (Path(code), Path(code) / "src")
    parent = next((folder for folder in folders if (folder / "mimo_audio_tokenizer").is_dir()), None)
    if parent is None:
        raise UserError(f"code_dir={code}: there is no mimo_audio_tokenizer or src/mimo_audio_tokenizer")
    if "mimo_audio_tokenizer" not in sys.modules:
        # Only this package can be imported from the folder: nothing else in it can replace another package.
        module = ModuleType("mimo_audio_tokenizer")
        module.__path__ = [str((parent / "mimo_audio_tokenizer").resolve())]
        sys.modules[module.__name__] = module
    package = importlib.import_module("mimo_audio_tokenizer.modeling_audio_tokenizer")
    return MimoCodec(package.MiMoAudioTokenizer.from_pretrained(weights, local_files_only=True))


def _xy_tokenizer(weights: str, code: str) -> WrappedCodec:
    if Path(code).expanduser().resolve() != Path(weights).expanduser().resolve():
        raise UserError(
            f"code_dir={code}: codec=xy_tokenizer runs the code beside its weights: give code_dir={weights}"
        )
    for file in ("config.json", "preprocessor_config.json"):
        path = Path(weights).expanduser() / file
        content = read_json(path) if path.is_file() else None
        named = content.get("auto_map") if isinstance(content, dict) else None
        values = named.values() if isinstance(named, dict) else ()
        for name in (name for value in values for name in (value if isinstance(value, list) else [value])):
            if "--" in str(name):
                raise UserError(f"{path} names the code of another repository ({name}), which is not run")
    names = ("AutoModel", "AutoFeatureExtractor")
    return XYTokenizerCodec(*(_from_transformers(name, weights, trust_remote_code=True) for name in names))


_CODE = {
    "mimo": "give code_dir=<folder of its repository>, in which src/mimo_audio_tokenizer lies",
    "xy_tokenizer": "it lies beside the weights; read it, then give their folder as code_dir= too",
}
"""Codecs whose code is not installed but given as code_dir=, and how to give it."""

_LOADERS: dict[str, Callable[..., WrappedCodec]] = {
    "encodec": _of_transformers(EncodecCodec, "EncodecModel"),
    "dac": _of_transformers(DacCodec, "DacModel"),
    "mimi": _of_transformers(MimiCodec, "MimiModel"),
    "higgs": _of_transformers(HiggsCodec, "HiggsAudioV2TokenizerModel"),
    "xcodec2": _of_transformers(Xcodec2Codec, "Xcodec2Model", "AutoFeatureExtractor"),
    "speechtokenizer": _speechtokenizer,
    "bigcodec": _bigcodec,
    "qwen3_tts": _qwen3_tts,
    "mimo": _mimo,
    "xy_tokenizer": _xy_tokenizer,
}

CODECS = tuple(_LOADERS)
"""Names that `load_codec` accepts: all systems of the paper's table."""
