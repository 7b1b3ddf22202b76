"""Pass whole batches through the codec in one pass, or in chunks that bound the memory."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .argument_checks import can_read
from .codec import LatentCodec
from .quantizer import FoldedQuantizer

BLOCK_SECONDS = 30.0


def block_frames(codec: LatentCodec, chunk_frames: int | None, frames: int) -> int:
    """Return the code frames per block: the given chunk, the whole clip, or blocks of `BLOCK_SECONDS` of a long one."""
    longest = max(1, round(BLOCK_SECONDS * codec.config.frame_rate))
    if chunk_frames is None:
        return max(1, frames) if frames <= 2 * longest else longest
    return chunk_frames


def encode_chunked(
    codec: LatentCodec, audio: Tensor, lengths: Tensor, num_quantizers: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Encode the first `lengths` samples of each item of audio [B, C, T] to codes [N, B, F] and latent [B, F, D]."""
    batch, frames = audio.shape[0], codec.num_frames(audio.shape[2])
    block = block_frames(codec, chunk, frames)
    states = codec.new_states("encoder", batch, block) if block < frames else None
    quantizer = FoldedQuantizer(codec.quantizer)
    codes = torch.empty(num_quantizers, batch, frames, dtype=torch.int64, device=audio.device)
    latent = torch.empty(0)
    for start in range(0, frames, block):
        part = slice(start, min(start + block, frames))
        encoded = codec.encode_latent(complete_frames(audio, lengths, part, codec.config.downsample_rate), states)
        if start == 0:
            latent = encoded.new_empty(batch, frames, encoded.shape[2])
        latent[:, part] = encoded
        codes[:, :, part] = quantizer.encode(encoded, num_quantizers)
    return codes, latent


def encode_unbatched(
    codec: LatentCodec, clips: Sequence[Tensor], num_quantizers: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Apply `encode_chunked` to clips [1, C, T] one by one; the results are padded with zeros."""
    results = []
    for clip in clips:
        length = torch.full((1,), clip.shape[2], device=clip.device)
        results.append(encode_chunked(codec, clip, length, num_quantizers, chunk))
    longest = max(codes.shape[2] for codes, _ in results)
    codes = [F.pad(codes, (0, longest - codes.shape[2])) for codes, _ in results]
    latents = [F.pad(latent, (0, 0, 0, longest - latent.shape[1])) for _, latent in results]
    return torch.cat(codes, dim=1), torch.cat(latents)


def complete_frames(audio: Tensor, lengths: Tensor, frames: slice, hop: int) -> Tensor:
    """Return the given frames of audio [B, C, T], silent beyond each item's length: [B, C, F * hop]."""
    part = audio[..., frames.start * hop : frames.stop * hop]
    if can_read(lengths) and int(lengths.min()) >= frames.stop * hop:
        return part
    position = torch.arange(frames.start * hop, frames.start * hop + part.shape[2], device=audio.device)
    part = part.masked_fill((position >= lengths[:, None])[:, None], 0)
    return F.pad(part, (0, (frames.stop - frames.start) * hop - part.shape[2]))


def decode_chunked(codec: LatentCodec, codes: Tensor, chunk: int | None) -> Tensor:
    """Return the audio [B, C, F * hop] of codes [n, B, F]."""
    batch, frames, hop = codes.shape[1], codes.shape[2], codec.config.downsample_rate
    block = block_frames(codec, chunk, frames)
    states = codec.new_states("decoder", batch, block) if block < frames else None
    quantizer = FoldedQuantizer(codec.quantizer)
    audio = torch.empty(batch, codec.config.number_channels, 0, dtype=codec.dtype, device=codes.device)
    for start in range(0, frames, block):
        stop = min(start + block, frames)
        decoded = codec.decode_latent(quantizer.decode(codes[:, :, start:stop]), states)
        if start == 0:
            audio = decoded.new_empty(*decoded.shape[:2], frames * hop)
        audio[..., start * hop : stop * hop] = decoded
    return audio


def decode_unbatched(codec: LatentCodec, clips: Sequence[Tensor], chunk: int | None) -> Tensor:
    """Apply `decode_chunked` to codes [n, 1, F] one by one; the results are padded with zeros."""
    results = [decode_chunked(codec, codes, chunk) for codes in clips]
    longest = max(audio.shape[2] for audio in results)
    return torch.cat([F.pad(audio, (0, longest - audio.shape[2])) for audio in results])
