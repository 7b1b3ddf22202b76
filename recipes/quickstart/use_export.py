"""Encode and decode clips with an exported tokenizer, as someone who has transformers but not moss_train.

Writes the originals and the reconstructions as WAV files and checks that streaming gives the offline result.
"""

# ruff: noqa: E402 - moss_train is blocked before anything else is imported
import sys

sys.modules["moss_train"] = None  # from here on, importing it raises ImportError

import json
from pathlib import Path

import soundfile
import torch
from transformers import AutoModel

PEAK = 0.7  # the level that cat_tiny is trained at
CHUNK_SECONDS = 0.08


def main(export: str, manifest: str, out: str, mode: str = "offline") -> None:
    """Process every clip of a JSONL manifest; in mode "streaming" also in chunks of one frame, which must agree."""
    model = AutoModel.from_pretrained(export, trust_remote_code=True).eval()
    half = model.config.quantizer_kwargs["num_quantizers"] // 2
    entries = [json.loads(line) for line in Path(manifest).read_text().splitlines()]
    for entry in entries:
        audio = read_clip(Path(manifest).parent / entry["path"], model.sampling_rate)
        codes = model.encode(audio[None], return_dict=True).audio_codes
        outputs = {
            "original": audio,
            "all_levels": model.decode(codes, return_dict=True).audio[0],
            "half_levels": model.decode(codes[:half], return_dict=True).audio[0],
        }
        if mode == "streaming":
            outputs["streamed"] = model.decode(codes, return_dict=True, chunk_duration=CHUNK_SECONDS).audio[0]
            check_streaming(model, audio, codes, outputs)
        name = Path(entry["path"]).with_suffix("").as_posix().replace("/", "_")
        for kind, samples in outputs.items():
            write_clip(Path(out) / kind / f"{name}.wav", samples[:, : audio.shape[1]], model.sampling_rate)
    checked = ", streamed codes equal offline codes" if mode == "streaming" else ""
    print(f"{export}: {len(entries)} clips encoded and decoded{checked}")


def read_clip(path: Path, sampling_rate: int) -> torch.Tensor:
    """[1, T], at the level of training."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == sampling_rate, f"{path} has {rate} Hz, the model {sampling_rate} Hz"
    audio = torch.from_numpy(samples.T.copy())
    return audio * (PEAK / audio.abs().max())


def check_streaming(model: torch.nn.Module, audio: torch.Tensor, codes: torch.Tensor, outputs: dict) -> None:
    """Exit with an error unless chunks of one frame give the codes and the audio of the whole clip."""
    streamed = model.encode(audio[None], return_dict=True, chunk_duration=CHUNK_SECONDS).audio_codes
    if not torch.equal(streamed, codes):
        sys.exit(f"{int((streamed != codes).sum())} of {codes.numel()} streamed codes differ from the offline codes")
    error = (outputs["streamed"] - outputs["all_levels"]).abs().max() / outputs["all_levels"].abs().max()
    if not error < 1e-4:
        sys.exit(f"streamed audio differs from offline audio by {error:.1e} of its maximum")


def write_clip(path: Path, audio: torch.Tensor, sampling_rate: int) -> None:
    """16-bit WAV of [1, T]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio.clamp(-1, 1).T.numpy(), sampling_rate, subtype="PCM_16")


if __name__ == "__main__":
    main(*sys.argv[1:])
