"""Other codecs through their transformers classes or their own packages, so that all are measured alike.

Weights are read from a path or from what the hub has already stored on this machine; nothing is downloaded. The systems
whose code is not on the package index are listed with what has to be done to measure them.
"""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.evaluation.codecs import Codec, weights_fingerprint
from moss_train.evaluation.metrics import missing_package
from moss_train.utils.errors import UserError


class WrappedCodec:
    """What the adapters share: the facts of a codec, its model and its device. Subclasses turn batches around."""

    def __init__(self, model: Any, name: str, sampling_rate: int, frame_rate: float, codebook_sizes: list[int]) -> None:
        self.name = name
        self.sampling_rate = sampling_rate
        self.num_channels = 1
        self.frame_rate = frame_rate
        self.codebook_sizes = tuple(codebook_sizes)
        self.fingerprint = weights_fingerprint(model)
        self.model = model.eval()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def encode(self, audio: Tensor) -> Tensor:
        """See `Codec`."""
        return self._encode(audio[None].to(self.device)).cpu().long()

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """See `Codec`."""
        return self._decode(codes.to(self.device)).float().cpu()

    def _encode(self, audio: Tensor) -> Tensor:
        """[1, 1, T] -> [N, frames]."""
        return self.model.encode(audio).audio_codes[0]

    def _decode(self, codes: Tensor) -> Tensor:
        """[n, frames] -> [1, T]."""
        return self.model.decode(audio_codes=codes[None]).audio_values.reshape(1, -1)


class EncodecCodec(WrappedCodec):
    """EnCodec (arXiv 2210.13438), the causal 24 kHz model."""

    def __init__(self, model: Any) -> None:
        config = model.config
        if config.chunk_length_s is not None or config.audio_channels != 1:
            raise UserError("codec=encodec measures the 24 kHz mono model, which encodes a clip in one piece")
        sizes = [config.codebook_size] * config.num_quantizers
        super().__init__(model, "EnCodec", config.sampling_rate, config.frame_rate, sizes)

    def _encode(self, audio: Tensor) -> Tensor:
        bandwidth = self.model.config.target_bandwidths[-1]
        return self.model.encode(audio, bandwidth=bandwidth).audio_codes[0, 0]

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[None, None], [None]).audio_values[0]


class DacCodec(WrappedCodec):
    """Descript audio codec (arXiv 2306.06546)."""

    def __init__(self, model: Any) -> None:
        config = model.config
        sizes = [config.codebook_size] * config.n_codebooks
        super().__init__(model, "DAC", config.sampling_rate, config.sampling_rate / config.hop_length, sizes)

    def _encode(self, audio: Tensor) -> Tensor:
        return self.model.encode(F.pad(audio, (0, -audio.shape[-1] % self.model.config.hop_length))).audio_codes[0]


class MimiCodec(WrappedCodec):
    """Mimi, the codec of Moshi (arXiv 2410.00037)."""

    def __init__(self, model: Any) -> None:
        config = model.config
        sizes = [config.codebook_size] * config.num_quantizers
        super().__init__(model, "Mimi", config.sampling_rate, config.frame_rate, sizes)


class HiggsCodec(WrappedCodec):
    """Higgs Audio v2 tokenizer."""

    def __init__(self, model: Any) -> None:
        config = model.config
        sizes = [config.codebook_size] * config.num_quantizers
        super().__init__(model, "Higgs Audio Tokenizer", config.sample_rate, config.frame_rate, sizes)

    def _encode(self, audio: Tensor) -> Tensor:
        return self.model.encode(F.pad(audio, (0, -audio.shape[-1] % self.model.config.hop_length))).audio_codes[0]


class Xcodec2Codec(WrappedCodec):
    """X-Codec 2 (arXiv 2502.04128): one codebook, and a semantic encoder that needs mel features."""

    def __init__(self, model: Any, feature_extractor: Any) -> None:
        config = model.config
        rate = config.sampling_rate
        super().__init__(model, "XCodec2.0", rate, rate / config.hop_length, [math.prod(config.quantization_levels)])
        self._features = feature_extractor

    def _encode(self, audio: Tensor) -> Tensor:
        inputs = self._features(audio[0, 0].cpu().numpy(), sampling_rate=self.sampling_rate, return_tensors="pt")
        return self.model.encode(**{key: value.to(self.device) for key, value in inputs.items()}).audio_codes[0]


class SpeechTokenizerCodec(WrappedCodec):
    """SpeechTokenizer (arXiv 2308.16692) through its package."""

    def __init__(self, model: Any) -> None:
        sizes = [model.quantizer.bins] * model.quantizer.n_q
        super().__init__(model, "SpeechTokenizer", model.sample_rate, model.sample_rate / model.downsample_rate, sizes)

    def _encode(self, audio: Tensor) -> Tensor:
        return self.model.encode(audio)[:, 0]

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[:, None])[0]


_CLASSES: dict[str, tuple[str, Callable[[Any], Codec]]] = {
    "encodec": ("EncodecModel", EncodecCodec),
    "dac": ("DacModel", DacCodec),
    "mimi": ("MimiModel", MimiCodec),
    "higgs": ("HiggsAudioV2TokenizerModel", HiggsCodec),
}

_ELSEWHERE = {
    "bigcodec": "its code is a repository without a package",
    "qwen3_tts": "its package qwen-tts requires an older transformers, so it runs in an environment of its own",
    "mimo": "its code is a repository without a package",
    "xy_tokenizer": "its code is a repository without a package",
}

CODECS = (*_CLASSES, "xcodec2", "speechtokenizer", *_ELSEWHERE)
"""Names that `load_codec` knows; all systems of the published table."""


def load_codec(name: str, weights: str | None, device: torch.device) -> Codec:
    """Build a codec by name. Raises UserError for unknown names and missing weights or packages, with what to do."""
    if name not in CODECS:
        raise UserError(f"codec={name} has to be one of {', '.join(CODECS)}")
    if name in _ELSEWHERE:
        raise UserError(
            f"codec={name} cannot run here: {_ELSEWHERE[name]}; write its output as WAV into reference/ and "
            "reconstruction/ folders there and score them with pairs=<folder>"
        )
    if weights is None:
        raise UserError(
            f"codec={name} needs weights=<folder>, or the name of a repository that is stored on this machine"
        )
    if name == "speechtokenizer":
        return _load_speechtokenizer(weights, device)
    if name == "xcodec2":
        model = _from_pretrained("Xcodec2Model", weights).to(device)
        return Xcodec2Codec(model, _from_pretrained("AutoFeatureExtractor", weights))
    class_name, adapter = _CLASSES[name]
    return adapter(_from_pretrained(class_name, weights).to(device))


def _from_pretrained(class_name: str, weights: str) -> Any:
    transformers = importlib.import_module("transformers")
    if not hasattr(transformers, class_name):
        raise UserError(f"transformers {transformers.__version__} has no {class_name}: install a newer one")
    try:
        return getattr(transformers, class_name).from_pretrained(weights, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"weights={weights}: {str(error).splitlines()[0]}") from error


def _load_speechtokenizer(weights: str, device: torch.device) -> Codec:
    if reason := missing_package("speechtokenizer"):
        raise UserError(f"codec=speechtokenizer: {reason}")
    folder = Path(weights)
    files = (folder / "config.json", folder / "SpeechTokenizer.pt")
    if missing := next((path for path in files if not path.is_file()), None):
        raise UserError(f"weights={weights}: there is no {missing.name}")
    package = importlib.import_module("speechtokenizer")
    return SpeechTokenizerCodec(package.SpeechTokenizer.load_from_checkpoint(*map(str, files)).to(device))
