"""Compare the mel distance of held-out clips before and after training with baselines, and apply the gate."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from baselines import MelReport, Reconstructions, mean_power_spectrum, mel_report
from torch import Tensor

from moss_train.audio.io import read_audio
from moss_train.plotting import save_spectrograms

SAMPLING_RATE = 24000
PEAK = 0.7
ROWS = {
    "trained": "trained, all levels",
    "trained_half": "trained, half of the levels",
    "untrained": "untrained, all levels",
    "mini": "the committed model (recipes/cat_mini), all levels",
    "finetuned": "the committed model, fine-tuned, all levels",
    "silence": "silence",
    "noise": "noise with the training set's mean spectrum, at the clip's level",
    "low_pass": "the clip low-passed at 2 kHz",
}


def main() -> None:
    """Print the table, write `report.md` and `spectrogram.png`, and exit with status 1 if the gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=Path, required=True, help="manifest of the training clips")
    parser.add_argument("--gate", type=float, required=True, help="highest allowed share of the noise's distance")
    arguments = parser.parse_args()
    spectrum = mean_power_spectrum(training_clips(arguments.train))
    clips = list(reconstructions(arguments.out))
    report = mel_report(clips, noise_spectrum=spectrum, sampling_rate=SAMPLING_RATE)
    table = markdown(report, arguments.gate)
    print(table)
    (arguments.out / "report.md").write_text(table)
    save_picture(clips, arguments.out / "spectrogram.png")
    means = report.means()
    if means["trained"] > arguments.gate * means["noise"] or means["trained"] >= means["untrained"]:
        sys.exit("the trained model misses the gate")
    if means["finetuned"] >= means["mini"]:
        sys.exit("fine-tuning did not bring the committed model closer to the held-out clips")


def training_clips(manifest: Path) -> Iterator[Tensor]:
    """Yield training clips [1, T] at the training level."""
    for line in manifest.read_text().splitlines():
        audio, _ = read_audio(manifest.parent / json.loads(line)["path"], sampling_rate=SAMPLING_RATE, num_channels=1)
        yield audio * (PEAK / audio.abs().max())


def reconstructions(out: Path) -> Iterator[Reconstructions]:
    """Yield the outputs of the exported models for every held-out clip."""
    folders = {
        "trained": "trained-audio/all_levels",
        "trained_half": "trained-audio/half_levels",
        "untrained": "untrained-audio/all_levels",
        "mini": "mini-audio/all_levels",
        "finetuned": "finetuned-audio/all_levels",
    }
    for path in sorted((out / "trained-audio" / "original").glob("*.wav")):
        outputs = {name: read_audio(out / folder / path.name)[0] for name, folder in folders.items()}
        yield Reconstructions(path.stem, read_audio(path)[0], outputs)


def markdown(report: MelReport, gate: float) -> str:
    """Return the means over all held-out clips and per domain, and the result of the gate, as Markdown."""
    domains = sorted({clip.clip_id.split("_")[0] for clip in report.clips})
    lines = [
        f"| mel distance on {len(report.clips)} held-out clips | all | " + " | ".join(domains) + " |",
        "|---" * (2 + len(domains)) + "|",
    ]
    means = report.means()
    per_domain = [
        MelReport(tuple(clip for clip in report.clips if clip.clip_id.startswith(f"{domain}_"))).means()
        for domain in domains
    ]
    for name, label in ROWS.items():
        lines.append(f"| {label} | " + " | ".join(f"{values[name]:.2f}" for values in (means, *per_domain)) + " |")
    share = means["trained"] / means["noise"]
    return "\n".join([*lines, "", f"trained / noise = {share:.1%} (gate {gate:.0%})", ""])


def save_picture(clips: list[Reconstructions], path: Path) -> None:
    """Draw spectrograms of the longest speech clip: original, trained from scratch, and fine-tuned."""
    speech = [clip for clip in clips if clip.clip_id.startswith("speech")]
    clip = max(speech, key=lambda candidate: candidate.original.shape[-1])
    panels = {ROWS[name]: clip.outputs[name] for name in ("trained", "trained_half", "finetuned")}
    save_spectrograms({"original": clip.original, **panels}, SAMPLING_RATE, path, title=clip.clip_id)


if __name__ == "__main__":
    main()
