"""Store what a model makes of known audio, so that a port or another installation can be checked against it."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from moss_train.model import MossAudioTokenizerModel

FOLDER = "test_vectors"
SECONDS_BEYOND_WINDOW = 2.0
TOLERANCES = {"codes": 0.99, "audio": 2e-3}
"""Fraction of equal codes, and largest error of the audio relative to its peak, that another installation may have."""


def known_audio(sampling_rate: int, num_channels: int, seconds: float) -> Tensor:
    """Return two clips [2, C, T] that are the same everywhere: gliding harmonics in syllables, and noise in bursts."""
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
    # 16-bit steps, so that the stored numbers are the ones that were encoded.
    return (mono[:, None] * scales * 32768).round().clamp(-32768, 32767) / 32768


@torch.no_grad()
def write_test_vectors(model: MossAudioTokenizerModel, complete: MossAudioTokenizerModel, folder: Path) -> None:
    """Write `test_vectors/` and `verify.py` into an exported folder.

    Args:
        model: as it is written, perhaps with 16-bit weights or half of them.
        complete: the whole model in float32, whose codes are the reference.
    """
    config = model.config
    seconds = config.causal_transformer_context_duration + SECONDS_BEYOND_WINDOW
    audio = known_audio(config.sampling_rate, config.number_channels, seconds).float()
    source = complete if model.part == "decoder" else model
    encoded: Any = source.encode(audio)
    codes: Tensor = encoded.audio_codes
    tensors = {"audio": (audio * 32768).to(torch.int16), "codes": codes.to(torch.int32)}
    if model.part != "encoder":
        decoded: Any = model.decode(codes)
        tensors["decoded"] = decoded.audio.float()[:1, :1].contiguous()
    target = folder / FOLDER
    target.mkdir()
    (target / "vectors.safetensors").write_bytes(save(tensors))
    files = sorted(folder.glob("*.safetensors"))
    record = {
        "tolerances": TOLERANCES,
        "codes_sha256": hashlib.sha256(tensors["codes"].numpy().tobytes()).hexdigest(),
        "weights_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    (target / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.copyfile(Path(__file__).with_name("verify.py"), folder / "verify.py")


@torch.no_grad()
def count_changed_codes(exact: MossAudioTokenizerModel, rounded: MossAudioTokenizerModel, clips: list[Tensor]) -> float:
    """Return the fraction of codes of clips [C, T] that differ between two models."""
    changed = total = 0
    for clip in clips:
        outputs: list[Any] = [model.encode(clip[None]) for model in (exact, rounded)]
        codes: list[Tensor] = [output.audio_codes for output in outputs]
        changed += int((codes[0] != codes[1]).sum())
        total += codes[0].numel()
    return changed / total
