"""Measure how much of a model's latent is lost in quantization: distances by number of levels, and without quantizer.

    python recipes/cat_mini/limits.py recipes/cat_mini data/cc0_voices/heldout.jsonl

"none" decodes the continuous latent with the same decoder. If it is hardly better than all levels, the levels already
carry nearly all of this latent; a model trained with more bits may still use them. The relative error is the energy of
the difference of the waveforms divided by the energy of the original.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

import torch

from moss_train.audio.io import read_audio
from moss_train.losses.reconstruction import multi_scale_mel_distance
from moss_train.model import MossAudioTokenizerModel
from moss_train.training.step.quantizer_start import pass_unquantized

PEAK = 0.7  # the peak level that cat_mini was trained at
EVERY = 5  # every fifth clip of the manifest is measured


@torch.inference_mode()
def main(folder: str, manifest: Path) -> None:
    """Print the mel distance and the relative error for 1, 4, 8, 16 and no levels, as means over clips."""
    torch.set_num_threads(1)
    model = MossAudioTokenizerModel.from_pretrained(folder).eval()
    lines = manifest.read_text("utf-8").splitlines()[::EVERY]
    rows: dict[str, list[tuple[float, float]]] = {}
    for entry in map(json.loads, lines):
        audio, _ = read_audio(manifest.parent / entry["path"], sampling_rate=model.sampling_rate, num_channels=1)
        hop = model.config.downsample_rate
        audio = audio[None, :, : audio.shape[1] // hop * hop]
        audio = audio * (PEAK / audio.abs().max())
        latent = model.encode_latent(audio)
        codes = model.encode(audio, return_dict=True).audio_codes
        decoded = {str(n): model.decode(codes[:n], return_dict=True).audio for n in (1, 4, 8, 16)}
        decoded["none"] = model.decode_latent(pass_unquantized(model.quantizer, latent).quantized)
        lengths = torch.tensor([audio.shape[2]])
        for name, restored in decoded.items():
            distance = multi_scale_mel_distance(audio, restored, lengths, model.sampling_rate).item()
            error = ((audio - restored).square().sum() / audio.square().sum()).item()
            rows.setdefault(name, []).append((distance, error))
    print(f"{len(lines)} clips\n| levels | mel distance | relative error |\n|---|---|---|")
    for name, values in rows.items():
        distances, errors = zip(*values, strict=True)
        print(f"| {name} | {fmean(distances):.3f} | {fmean(errors):.3f} |")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
