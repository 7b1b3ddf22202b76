"""Compare a decoder at a higher rate with plain resampling of the old model's output, on held-out clips.

    python recipes/output_48khz/measure.py out/output_48khz/run data/cc0_voices/heldout.jsonl

Both decode the same codes, and the script checks this. Every clip is scaled to a peak of 0.7 at the higher rate, as in
training. The results are printed as Markdown tables and written to `measured.json` beside the run's checkpoints:

- distances to the original at the higher rate: the seven-scale mel distance of the training log, and the Mel-Loss and
  STFT-Dist. of `evaluate profile=full48k` (here at the decoder's rate); also the seven-scale distance at the
  encoder's rate, which shows how the lower band changes;
- energy above half of the encoder's rate, in dB relative to the energy of the whole clip: the mean over clips;
- the start: how close the untrained decoder is to the resampled output, compared with alternatives to `init`'s method.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from moss_train.audio.io import read_audio, resample
from moss_train.data.stream.sample_reader import scale_to_peak
from moss_train.evaluation.metrics.signal import Profile, spectral_distances
from moss_train.export.load import load_tokenizer
from moss_train.losses import multi_scale_mel_distance
from moss_train.model import MossAudioTokenizerModel
from moss_train.training.run.resize_model import resampled_output, waveform_end

PEAK = 0.7


def main() -> None:
    """Measure every clip and print the means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="run or folder of the decoder at the higher rate")
    parser.add_argument("clips", type=Path, help="manifest of held-out clips at that rate")
    parser.add_argument("--init", default="recipes/cat_mini", help="the model that it began with")
    parser.add_argument("--every", type=int, default=1, help="take every n-th clip")
    parser.add_argument("--last-weights", action="store_true", help="not the moving average of a run")
    options = parser.parse_args()
    is_average = not options.last_weights and not (options.model / "config.json").exists()
    higher, old = load_tokenizer(options.model, ema=is_average), load_tokenizer(options.init)
    rows = [json.loads(line) for line in options.clips.read_text("utf-8").splitlines()][:: options.every]
    clips = [
        read_audio(options.clips.parent / row["path"], sampling_rate=higher.output_sampling_rate)[0] for row in rows
    ]
    results = [measure_clip(higher, old, scale_to_peak(clip.mean(0, keepdim=True), PEAK)) for clip in clips]
    means = {
        system: {name: fmean(result[system][name] for result in results) for name in values}
        for system, values in results[0].items()
    }
    means["start"] = {
        name: 10 * math.log10(sum(result["start"][name] for result in results) / len(results))
        for name in results[0]["start"]
    }
    print(f"{len(clips)} clips, {higher.config.num_quantizers} levels\n\n{tables(means, higher)}")
    if options.model.is_dir():
        content = {"clips": len(clips), "weights": "average" if is_average else "last", **means}
        (options.model / "measured.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")


@torch.no_grad()
def measure_clip(
    higher: MossAudioTokenizerModel, old: MossAudioTokenizerModel, original: Tensor
) -> dict[str, dict[str, float]]:
    """Return distances and energies of one clip [1, T] by system, and the start's relative errors (energy ratios)."""
    rate, low_rate = higher.output_sampling_rate, higher.sampling_rate
    audio = resample(original, rate, low_rate)[None]
    codes = old.encode(audio).audio_codes
    assert torch.equal(higher.encode(audio).audio_codes, codes), "the codes differ: another encoder or quantizer"
    decoded = old.decode(codes).audio
    length = original.shape[1]
    outputs = {
        "original": original,
        "resampled": resample(decoded, low_rate, rate)[0, :, :length],
        "decoder": higher.decode(codes).audio[0, :, :length],
    }
    profile = Profile("", rate, False)
    found = {}
    for name, output in outputs.items():
        low, low_original = (resample(signal, rate, low_rate) for signal in (output, original))
        distances = spectral_distances(original[0], output[0], profile)
        found[name] = {
            "mel distance": seven_scales(original, output, rate),
            "Mel-Loss": distances["mel_loss"],
            "STFT-Dist.": distances["stft_distance"],
            "mel distance, lower band": seven_scales(low_original, low, low_rate),
            "energy above": energy_above(output, low_rate / 2, rate),
        }
    return found | {"start": start_errors(old, higher, decoded)}


def seven_scales(wanted: Tensor, got: Tensor, rate: int) -> float:
    """Return the mel distance of the training log."""
    return multi_scale_mel_distance(wanted[None], got[None], torch.tensor([wanted.shape[1]]), rate).item()


def energy_above(audio: Tensor, hertz: float, rate: int) -> float:
    """Return the energy of [1, T] above a frequency in dB relative to the whole energy, at least -120."""
    power = torch.fft.rfft(audio[0].double()).abs().square()
    frequencies = torch.fft.rfftfreq(audio.shape[1], 1 / rate)
    return 10 * math.log10(max(1e-12, float(power[frequencies > hertz].sum() / power.sum())))


def start_errors(old: MossAudioTokenizerModel, higher: MossAudioTokenizerModel, decoded: Tensor) -> dict[str, float]:
    """Return the relative errors of patch-wise upsampling, against resampling the whole waveform.

    A new projection that is a linear function of the old one applies the same function to the patches of its output.
    """
    before, after = (waveform_end(model.config, "decoder") for model in (old, higher))
    patches = decoded.reshape(-1, before.patch).T  # one patch per column, like the rows of a projection
    wanted = resample(decoded, before.rate, after.rate)[0, 0]
    ratio = after.rate // before.rate
    following = torch.cat((patches[1:], patches[-1:]))
    weights = torch.arange(ratio)[:, None] / ratio
    linear = torch.stack([patches * (1 - weight) + following * weight for weight in weights], dim=1).flatten(0, 1)
    silent = resample(patches.T.contiguous(), before.rate, after.rate).T
    made = {"as init does": resampled_output(patches, before, after), "linear": linear, "silence at edges": silent}
    return {
        name: float((wave.T.flatten() - wanted).square().sum() / wanted.square().sum()) for name, wave in made.items()
    }


def tables(means: dict[str, dict[str, float]], higher: MossAudioTokenizerModel) -> str:
    """Return the means as Markdown tables."""
    names = [name for name in means["original"] if name != "energy above"]
    half = higher.sampling_rate / 2000
    labels = {
        "original": "original",
        "resampled": f"old decoder, resampled to {higher.output_sampling_rate} Hz",
        "decoder": f"decoder at {higher.output_sampling_rate} Hz",
    }
    lines = [f"| | {' | '.join(names)} | energy above {half:g} kHz (dB) |", "|---" * (len(names) + 2) + "|"]
    for system, label in labels.items():
        numbers = " | ".join(f"{means[system][name]:.3f}" for name in names)
        lines.append(f"| {label} | {numbers} | {means[system]['energy above']:.1f} |")
    lines += ["", "| the untrained decoder against the resampled output | error (dB) |", "|---|---|"]
    lines += [f"| {name} | {error:.1f} |" for name, error in means["start"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
