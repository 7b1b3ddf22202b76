"""Encode and decode clips with an exported tokenizer in an environment that has transformers but not moss_train.

Writes originals and reconstructions as WAV files and checks that streaming gives the same result as offline.
"""

# ruff: noqa: E402 - moss_train is blocked before anything else is imported
import sys

sys.modules["moss_train"] = None  # from here on, any import of moss_train raises ImportError

import json
from pathlib import Path

import soundfile
import torch
from transformers import AutoModel

PEAK = 0.7  # the peak level that cat_tiny is trained at
CHUNK_SECONDS = 0.08


def main(export: str, manifest: str, out: str, mode: str = "offline") -> None:
    """Process every clip of a JSONL manifest; in mode "streaming" also compare one-frame chunks with it."""
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
    """Return a clip [1, T] at the training level."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == sampling_rate, f"{path} has {rate} Hz, the model {sampling_rate} Hz"
    audio = torch.from_numpy(samples.T.copy())
    return audio * (PEAK / audio.abs().max())


def check_streaming(model: torch.nn.Module, audio: torch.Tensor, codes: torch.Tensor, outputs: dict) -> None:
    """Exit with an error unless chunks of one frame reproduce the codes and the audio of the whole clip."""
    streamed = model.encode(audio[None], return_dict=True, chunk_duration=CHUNK_SECONDS).audio_codes
    if not torch.equal(streamed, codes):
        sys.exit(f"{int((streamed != codes).sum())} of {codes.numel()} streamed codes differ from the offline codes")
    error = (outputs["streamed"] - outputs["all_levels"]).abs().max() / outputs["all_levels"].abs().max()
    if not error < 1e-4:
        sys.exit(f"streamed audio differs from offline audio by {error:.1e} of its maximum")


def write_clip(path: Path, audio: torch.Tensor, sampling_rate: int) -> None:
    """Write [1, T] as a 16-bit WAV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio.clamp(-1, 1).T.numpy(), sampling_rate, subtype="PCM_16")


if __name__ == "__main__":
    main(*sys.argv[1:])
