"""How a batch goes through the stack: in one pass, or in blocks that hand on their state and bound the memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import LARGEST_BLOCK
from .cache import StageState
from .packing import FEWEST_ROWS, LARGEST_PACKED, LARGEST_ROWS
from .quantizer import FoldedQuantizer

if TYPE_CHECKING:
    from .modeling_moss_audio_tokenizer import MossAudioTokenizerModel

BLOCK_SECONDS = 30.0


def run_stages(
    modules: nn.ModuleList, x: Tensor, states: list[StageState] | None, num_frames: Tensor | None, frames: int
) -> Tensor:
    """Pass [B, T, C] through patch modules and transformer stages, with streaming states when given.

    Args:
        num_frames: [B] valid code frames of each item, None when all `frames` are valid.
        frames: code frames in `x`, from which each stage's own rate follows.
    """
    remaining = iter(states or ())
    for module in modules:
        if not hasattr(module, "transformer") or states is None:
            x = module(x)
        else:
            valid = None if num_frames is None else num_frames * (x.shape[1] // frames)
            x = module(x, next(remaining), valid)
    return x


def new_states(model: "MossAudioTokenizerModel", name: str, batch_size: int, chunk_frames: int) -> list[StageState]:
    """Empty states for the stages of the model's "encoder" or "decoder".

    Args:
        chunk_frames: code frames per chunk for which the rings are sized; any other number is exact too.
    """
    part = getattr(model, name)
    nbytes = sum(parameter.nbytes for parameter in part.parameters())
    states = []
    for stage in model.stages(part):
        frames = chunk_frames * stage.frames_per_code_frame
        pack = nbytes <= LARGEST_PACKED and FEWEST_ROWS <= batch_size * frames <= LARGEST_ROWS
        states.append(stage.new_state(batch_size, min(frames, LARGEST_BLOCK), model.compute_dtype, pack))
    return states


def block_frames(model: "MossAudioTokenizerModel", chunk_frames: int | None, frames: int) -> int:
    """Code frames per block: the wanted chunk, the whole clip, or blocks of `BLOCK_SECONDS` when it is long."""
    longest = max(1, round(BLOCK_SECONDS * model.config.frame_rate))
    if chunk_frames is None:
        return max(1, frames) if frames <= 2 * longest else longest
    return chunk_frames


def encode_in_blocks(
    model: "MossAudioTokenizerModel", audio: Tensor, lengths: Tensor, num_quantizers: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Codes [N, B, F] and latent [B, F, D] of audio [B, C, T] of which each item's first `lengths` samples count."""
    batch, frames = audio.shape[0], model.num_frames(audio.shape[2])
    block = block_frames(model, chunk, frames)
    states = new_states(model, "encoder", batch, block) if block < frames else None
    quantizer = FoldedQuantizer(model.quantizer)
    codes = torch.empty(num_quantizers, batch, frames, dtype=torch.int64, device=audio.device)
    latent = torch.empty(0)
    for start in range(0, frames, block):
        part = slice(start, min(start + block, frames))
        encoded = model.encode_latent(whole_frames(audio, lengths, part, model.config.downsample_rate), states)
        if start == 0:
            latent = encoded.new_empty(batch, frames, encoded.shape[2])
        latent[:, part] = encoded
        codes[:, :, part] = quantizer.encode(encoded, num_quantizers)
    return codes, latent


def encode_each(
    model: "MossAudioTokenizerModel", clips: Sequence[Tensor], num_quantizers: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """`encode_in_blocks` for clips [1, C, T] one by one; the results are padded with zeros."""
    results = []
    for clip in clips:
        length = torch.full((1,), clip.shape[2], device=clip.device)
        results.append(encode_in_blocks(model, clip, length, num_quantizers, chunk))
    longest = max(codes.shape[2] for codes, _ in results)
    codes = [F.pad(codes, (0, longest - codes.shape[2])) for codes, _ in results]
    latents = [F.pad(latent, (0, 0, 0, longest - latent.shape[1])) for _, latent in results]
    return torch.cat(codes, dim=1), torch.cat(latents)


def whole_frames(audio: Tensor, lengths: Tensor, frames: slice, hop: int) -> Tensor:
    """The given frames of audio [B, C, T], silent beyond each item's length: [B, C, F * hop]."""
    part = audio[..., frames.start * hop : frames.stop * hop]
    if audio.device.type == "cpu" and int(lengths.min()) >= frames.stop * hop:
        return part  # another device would have to be waited for
    position = torch.arange(frames.start * hop, frames.start * hop + part.shape[2], device=audio.device)
    part = part.masked_fill((position >= lengths[:, None])[:, None], 0)
    return F.pad(part, (0, (frames.stop - frames.start) * hop - part.shape[2]))


def decode_in_blocks(model: "MossAudioTokenizerModel", codes: Tensor, chunk: int | None) -> Tensor:
    """Audio [B, C, F * hop] of codes [n, B, F]."""
    batch, frames, hop = codes.shape[1], codes.shape[2], model.config.downsample_rate
    block = block_frames(model, chunk, frames)
    states = new_states(model, "decoder", batch, block) if block < frames else None
    quantizer = FoldedQuantizer(model.quantizer)
    audio = torch.empty(batch, model.config.number_channels, 0, dtype=model.dtype, device=codes.device)
    for start in range(0, frames, block):
        stop = min(start + block, frames)
        decoded = model.decode_latent(quantizer.decode(codes[:, :, start:stop]), states)
        if start == 0:
            audio = decoded.new_empty(*decoded.shape[:2], frames * hop)
        audio[..., start * hop : stop * hop] = decoded
    return audio


def decode_each(model: "MossAudioTokenizerModel", clips: Sequence[Tensor], chunk: int | None) -> Tensor:
    """`decode_in_blocks` for codes [n, 1, F] one by one; the results are padded with zeros."""
    results = [decode_in_blocks(model, codes, chunk) for codes in clips]
    longest = max(audio.shape[2] for audio in results)
    return torch.cat([F.pad(audio, (0, longest - audio.shape[2])) for audio in results])
