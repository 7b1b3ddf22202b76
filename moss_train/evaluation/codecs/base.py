"""Codecs for the evaluation: the protocol, our model, and adapters for codecs of other projects."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from moss_train.audio.io import resample
from moss_train.model import MossAudioTokenizerModel
from moss_train.utils.errors import UserError


class Codec(Protocol):
    """An audio codec with quantizer levels, any prefix of which can be decoded."""

    name: str
    sampling_rate: int  # Hz, of its input
    output_sampling_rate: int  # Hz, of its output
    num_channels: int
    frame_rate: float  # Hz
    codebook_sizes: tuple[int, ...]  # one per level
    fingerprint: str  # codecs with equal fingerprints produce equal audio

    def encode(self, audio: Tensor) -> Tensor:
        """Return the codes [N, frames] int64 of a clip [C, T], both on the CPU."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return the audio [C, T'] of the first n levels [n, frames], both on the CPU."""


def bitrate(codec: Codec, num_quantizers: int) -> float:
    """Return the bits per second of the first `num_quantizers` levels: log2 of the codebook's size for every code."""
    return codec.frame_rate * sum(math.log2(size) for size in codec.codebook_sizes[:num_quantizers])


def check_levels(codec: Codec, num_quantizers: list[int] | None) -> tuple[int, ...]:
    """Return the numbers of levels to decode, ascending; powers of two and all levels by default. Raises UserError."""
    available = len(codec.codebook_sizes)
    if num_quantizers is None:
        return tuple(sorted({2**power for power in range(available.bit_length())} | {available}))
    for wanted in num_quantizers:
        if not 1 <= wanted <= available:
            raise UserError(f"num_quantizers={num_quantizers}: {codec.name} has levels 1 to {available}, got {wanted}")
    if not num_quantizers:
        raise UserError("num_quantizers=[] asks for nothing; give numbers of levels, as in num_quantizers=[1,8]")
    return tuple(sorted(set(num_quantizers)))


def weights_fingerprint(model: nn.Module) -> str:
    """Return the short hash of the names, shapes and first values of all weights, which any training changes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        first = tensor.flatten()[:64].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + first.tobytes())
    return digest.hexdigest()[:16]


class CatCodec:
    """A tokenizer of this package as a codec."""

    def __init__(self, model: MossAudioTokenizerModel, name: str) -> None:
        config = model.config
        self.name = name
        self.sampling_rate: int = config.sampling_rate
        self.output_sampling_rate: int = config.output_sampling_rate
        self.num_channels: int = config.number_channels
        self.frame_rate: float = config.frame_rate
        self.codebook_sizes = (config.quantizer_kwargs["codebook_size"],) * config.num_quantizers
        precision = getattr(config, "compute_dtype", None) or "fp32"
        self.fingerprint = weights_fingerprint(model) + ("" if precision == "fp32" else f"-{precision}")
        self._model = model.eval()

    def encode(self, audio: Tensor) -> Tensor:
        codes = self._model.encode(audio[None], return_dict=True).audio_codes
        return codes[:, 0].cpu()

    def decode(self, codes: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._model.decode(codes[:, None], return_dict=True).audio[0].float().cpu()


class OnnxCodec:
    """The graphs of an export with format=onnx as a codec, run by onnxruntime on the CPU.

    Args:
        tokenizer: a `Tokenizer` of the runtime that ships with the graphs.

    Raises:
        UserError: a graph is missing or damaged, or onnxruntime is not installed.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.name = name
        self.sampling_rate: int = tokenizer.sampling_rate
        self.output_sampling_rate: int = tokenizer.output_sampling_rate
        self.num_channels: int = tokenizer.num_channels
        self.frame_rate: float = tokenizer.sampling_rate / tokenizer.hop
        self.codebook_sizes = (tokenizer.codebook_size,) * tokenizer.num_levels
        try:
            for part in ("encoder", "decoder"):
                tokenizer.session(part)
        except (ValueError, ImportError) as error:
            raise UserError(f"{error}") from None
        digest = hashlib.sha256()
        for pattern in ("*.onnx", "*.weights"):
            for path in sorted(Path(tokenizer.folder).glob(pattern)):
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        self.fingerprint = digest.hexdigest()[:16]
        self._tokenizer = tokenizer

    def encode(self, audio: Tensor) -> Tensor:
        return torch.from_numpy(self._tokenizer.encode(audio[None].numpy())[:, 0])

    def decode(self, codes: Tensor) -> Tensor:
        return torch.from_numpy(self._tokenizer.decode(codes[:, None].numpy())[0])


class WrappedCodec:
    """Base class of the adapters: a codec's properties, model and device. Subclasses rearrange its tensors."""

    hop_length = 1  # audio is padded to a multiple of it, for models that need that

    def __init__(self, model: Any, name: str, sampling_rate: int, frame_rate: float, codebook_sizes: list[int]) -> None:
        self.name = name
        self.sampling_rate = self.output_sampling_rate = sampling_rate
        self.num_channels = 1
        self.frame_rate = frame_rate
        self.codebook_sizes = tuple(codebook_sizes)
        self.fingerprint = weights_fingerprint(model)
        self.model = model.eval()

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device) -> "WrappedCodec":
        """Move the model."""
        self.model.to(device)
        return self

    @torch.inference_mode()
    def encode(self, audio: Tensor) -> Tensor:
        padded = F.pad(audio[None], (0, -audio.shape[-1] % self.hop_length))
        return self._encode(padded.to(self.device)).cpu().long()

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
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
        self.hop_length = config.hop_length


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
        self.hop_length = config.hop_length


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
        rate = model.sample_rate
        super().__init__(model, "SpeechTokenizer", rate, float(rate / model.downsample_rate), sizes)

    def _encode(self, audio: Tensor) -> Tensor:
        return self.model.encode(audio)[:, 0]

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[:, None])[0]


class BigCodec(WrappedCodec):
    """BigCodec (arXiv 2409.05377) through the package of its name: one codebook, 16 kHz."""

    def __init__(self, model: Any) -> None:
        self.hop_length = int(model.decoder.hop_length)
        sizes = [layer._codebook.num_embeddings for layer in model.decoder.quantizer.layers]
        super().__init__(model, "BigCodec", 16_000, 16_000 / self.hop_length, sizes)

    def _encode(self, audio: Tensor) -> Tensor:
        return self.model.encode(audio)[:, 0]

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[:, None])[0]


class Qwen3TtsCodec(WrappedCodec):
    """Qwen3 TTS tokenizer with 12.5 frames per second (the one with 25 also needs a speaker embedding to decode)."""

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "encoder_valid_num_quantizers"):
            raise UserError("codec=qwen3_tts measures the tokenizer of 12.5 Hz")
        config = model.config
        sizes = [config.decoder_config.codebook_size] * model.encoder_valid_num_quantizers
        rate = config.output_sample_rate
        super().__init__(model, "Qwen3 TTS Tokenizer", rate, rate / config.decode_upsample_rate, sizes)

    def _encode(self, audio: Tensor) -> Tensor:
        return self.model.encode(audio[:, 0], torch.ones_like(audio[:, 0]).long()).audio_codes[0].T

    def _decode(self, codes: Tensor) -> Tensor:
        with _set_to(self.model.decoder.config, "num_quantizers", len(codes)):
            return self.model.decode(codes.T[None]).audio_values[0][None]


class MimoCodec(WrappedCodec):
    """MiMo audio tokenizer: it takes log mel spectrograms, with other codebook sizes on deeper levels."""

    def __init__(self, model: Any) -> None:
        config = model.config
        sizes = list(config.codebook_size)
        sizes += sizes[-1:] * (config.num_quantizers - len(sizes))
        rate = config.sampling_rate
        frame_rate = rate / model.downsample_rate
        super().__init__(model, "MiMo Audio Tokenizer", rate, frame_rate, sizes[: config.num_quantizers])
        frames = (config.nfft, config.window_size, config.hop_length)
        self._mel = MelSpectrogram(rate, *frames, config.fmin, config.fmax, n_mels=config.n_mels, power=1.0)

    def to(self, device: torch.device) -> "MimoCodec":
        """Move the model; on a GPU to bfloat16, because its attention there is FlashAttention, which needs 16 bits."""
        if device.type != "cpu":
            self.model.bfloat16()
        self._mel.to(device)
        super().to(device)
        return self

    def _encode(self, audio: Tensor) -> Tensor:
        mels = self._mel(audio[0]).clamp(min=1e-7).log()[0].T
        lengths = torch.tensor([len(mels)], device=mels.device)
        return self.model.encoder.encode(mels, lengths, return_codes_only=True)[0]

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).reshape(1, -1)


class XYTokenizerCodec(WrappedCodec):
    """XY-Tokenizer (arXiv 2506.23325): takes 16 kHz and gives 24 kHz, at which it is measured."""

    def __init__(self, model: Any, feature_extractor: Any) -> None:
        config = model.config
        quantizer = config.params["quantizer_kwargs"]
        sizes = [quantizer["codebook_size"]] * quantizer["num_quantizers"]
        self._input_rate: int = feature_extractor.sampling_rate
        frame_rate = self._input_rate / config.encoder_downsample_rate
        super().__init__(model, "XY-Tokenizer", round(frame_rate * config.decoder_upsample_rate), frame_rate, sizes)
        self._features = feature_extractor

    def _encode(self, audio: Tensor) -> Tensor:
        waveform = resample(audio[0].cpu(), self.sampling_rate, self._input_rate)
        options = {"return_attention_mask": True, "return_tensors": "pt"}
        return self.model.encode(self._features(waveform, sampling_rate=self._input_rate, **options)).audio_codes[:, 0]

    def _decode(self, codes: Tensor) -> Tensor:
        # With `nq` left at the number of all levels, the model would use a single level's codes for all of them.
        with _set_to(self.model, "nq", len(codes)):
            return self.model.decode(codes[:, None]).audio_values[0]


@contextmanager
def _set_to(holder: Any, name: str, value: int) -> Iterator[None]:
    """Set an attribute temporarily, for a decoder that takes exactly as many levels as the attribute says."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
