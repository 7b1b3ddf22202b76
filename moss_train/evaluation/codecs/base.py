"""Codecs as the evaluation sees them, and ours as one of them."""

import hashlib
import math
from typing import Protocol

import torch
from torch import Tensor, nn

from moss_train.model import MossAudioTokenizerModel
from moss_train.utils.errors import UserError


class Codec(Protocol):
    """An audio codec with levels of which any prefix decodes."""

    name: str
    sampling_rate: int  # Hz, of what it takes and gives
    num_channels: int
    frame_rate: float  # Hz
    codebook_sizes: tuple[int, ...]  # one per level
    fingerprint: str  # equal fingerprints make equal audio

    def encode(self, audio: Tensor) -> Tensor:
        """Codes [N, frames] int64 of a clip [C, T], both on the CPU."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Audio [C, T'] of the first n levels [n, frames], both on the CPU."""
        ...


def bitrate(codec: Codec, num_quantizers: int) -> float:
    """Bits per second of the first `num_quantizers` levels, every code counted with log2 of its codebook's size."""
    return codec.frame_rate * sum(math.log2(size) for size in codec.codebook_sizes[:num_quantizers])


def check_levels(codec: Codec, num_quantizers: list[int] | None) -> tuple[int, ...]:
    """The numbers of levels to decode, ascending; powers of two and all levels by default. Raises UserError."""
    available = len(codec.codebook_sizes)
    if num_quantizers is None:
        return tuple(sorted({2**power for power in range(available.bit_length())} | {available}))
    for wanted in num_quantizers:
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= available:
            raise UserError(f"num_quantizers={num_quantizers}: {codec.name} has levels 1 to {available}, got {wanted}")
    if not num_quantizers:
        raise UserError("num_quantizers=[] asks for nothing; give numbers of levels, as in num_quantizers=[1,8]")
    return tuple(sorted(set(num_quantizers)))


def weights_fingerprint(model: nn.Module) -> str:
    """Short hash of the names, shapes and first values of all weights, which any training changes."""
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
        self.num_channels: int = config.number_channels
        self.frame_rate: float = config.frame_rate
        self.codebook_sizes = (config.quantizer_kwargs["codebook_size"],) * config.num_quantizers
        precision = getattr(config, "compute_dtype", None) or "fp32"
        self.fingerprint = weights_fingerprint(model) + ("" if precision == "fp32" else f"-{precision}")
        self._model = model.eval()

    def encode(self, audio: Tensor) -> Tensor:
        """See `Codec`."""
        codes = self._model.encode(audio[None], return_dict=True).audio_codes
        return codes[:, 0].cpu()

    def decode(self, codes: Tensor) -> Tensor:
        """See `Codec`."""
        with torch.inference_mode():
            return self._model.decode(codes[:, None], return_dict=True).audio[0].float().cpu()
