"""Rebuild recipes/quickstart/audio from two Debian packages; the same input and library versions give the same bytes.

    apt-get download sonic-pi-samples pocketsphinx-testdata
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done
    python tools/build_quickstart_audio.py unpacked

Writes 24 kHz mono 16-bit FLAC files in speech/, sound/ and music/, train.jsonl, heldout.jsonl and NOTICE.
"""

import argparse
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

SAMPLING_RATE = 24_000
SAMPLES = Path("usr/share/sonic-pi/samples")
SAMPLES_COPYRIGHT = Path("usr/share/doc/sonic-pi-samples/copyright")
SPEECH = Path("usr/share/pocketsphinx/test/data")
SPEECH_COPYRIGHT = Path("usr/share/doc/pocketsphinx-testdata/copyright")
OUTPUT = Path(__file__).resolve().parent.parent / "recipes/quickstart/audio"

MUSIC_FAMILIES = {"bass", "guit", "loop"}
MUSIC_CLIPS = {"ambi_choir", "ambi_piano"}
HELDOUT_FAMILIES = {"misc", "sn", "vinyl"}
HELDOUT_CLIPS = {
    *("cards_003", "librivox_0880", "librivox_0930"),
    *("ambi_piano", "bass_woodsy_c", "loop_compus", "loop_garzul", "loop_safari", "loop_weirdo"),
}

# Families with descriptive file names, and the words with which captions of the family begin.
CAPTION_PREFIXES = {
    "ambi": "ambient sound",
    "drum": "acoustic drum kit",
    "elec": "electronic sound",
    "misc": "sound effect",
    "perc": "percussive sound",
    "vinyl": "vinyl record",
}
CAPTION_WORDS = {"hi": "high", "lo": "low", "mid": "middle", "filt": "filtered", "bass": "bass drum"}
# Clips with a caption are never cropped in training, so long ones would make the quickstart's batches long.
MAX_CAPTION_SECONDS = 4.0


@dataclass(frozen=True)
class Clip:
    """One recording: its source and what the manifest says about it; fields without a value are None."""

    name: str
    source: Path
    domain: str
    text: str | None = None
    task: str | None = None
    language: str | None = None
    speaker: str | None = None

    def manifest_entry(self) -> dict[str, str]:
        """Return the manifest line as a mapping, without empty fields; `path` is relative to the manifest."""
        facts = {"text": self.text, "task": self.task, "domain": self.domain}
        facts |= {"language": self.language, "speaker": self.speaker}
        return {"path": f"{self.domain}/{self.name}.flac"} | {key: value for key, value in facts.items() if value}

    def is_heldout(self) -> bool:
        """Tell whether the clip is held out; near-duplicates share a family and therefore are on the same side."""
        return self.name in HELDOUT_CLIPS or self.name.split("_")[0] in HELDOUT_FAMILIES


def caption(name: str, seconds: float) -> str | None:
    """Return a caption from a sound's file name, or None if the name is a number or a proper name or the sound is long.

    Example: `drum_cymbal_soft` -> `acoustic drum kit, cymbal soft`.
    """
    family, _, rest = name.partition("_")
    if family not in CAPTION_PREFIXES or seconds > MAX_CAPTION_SECONDS or name[-1].isdigit():
        return None
    words = [CAPTION_WORDS.get(word, word) for word in rest.split("_")]
    return f"{CAPTION_PREFIXES[family]}, {' '.join(words)}"


def sample_clips(root: Path) -> list[Clip]:
    """List the recordings of sonic-pi-samples by name: loops and melodic material as music, the rest as sound."""
    clips = []
    for source in sorted((root / SAMPLES).glob("*.flac")):
        name = source.stem
        if name.split("_")[0] in MUSIC_FAMILIES or name in MUSIC_CLIPS:
            clips.append(Clip(name, source, "music"))
            continue
        text = caption(name, soundfile.info(source).duration)
        clips.append(Clip(name, source, "sound", text=text, task="caption" if text else None))
    return clips


def speech_clips(root: Path) -> list[Clip]:
    """List the read sentences of pocketsphinx-testdata with their transcripts.

    Raises:
        ValueError: a transcription line is not of the form `<s> words </s> (file)`.
    """
    clips = []
    for speaker, transcription in (("cards", "cards.transcription"), ("librivox", "transcription")):
        folder = root / SPEECH / speaker
        for line in (folder / transcription).read_text(encoding="utf-8").splitlines():
            match = re.fullmatch(r"<s> (.+?)\s+</s> \((\S+)\)", line.strip())
            if match is None:
                raise ValueError(f"{folder / transcription}: cannot read the line {line!r}")
            text, stem = match.groups()
            name = f"{speaker}_{stem.split('-')[-1]}"
            clips.append(Clip(name, folder / f"{stem}.wav", "speech", text, "asr", "en", speaker))
    return sorted(clips, key=lambda clip: clip.name)


def convert(source: Path, target: Path) -> tuple[float, bool]:
    """Write a recording as 24 kHz mono FLAC, level unchanged; return its seconds and whether a peak was clipped."""
    audio, rate = soundfile.read(source, dtype="float32", always_2d=True)
    mono = torch.from_numpy(audio.mean(axis=1))
    values = torch.round(resample(mono, rate, SAMPLING_RATE) * 32768).numpy()
    clipped = np.clip(values, -32768, 32767)
    target.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(target, clipped.astype(np.int16), SAMPLING_RATE, subtype="PCM_16", compression_level=1.0)
    return len(values) / SAMPLING_RATE, bool((clipped != values).any())


def paragraphs(copyright_file: Path) -> list[dict[str, str]]:
    """Split a Debian copyright file into paragraphs, each a mapping from field to text without the indentation."""
    result = []
    for block in copyright_file.read_text(encoding="utf-8").split("\n\n"):
        fields: dict[str, str] = {}
        field = ""
        for line in block.strip("\n").splitlines():
            if line.startswith((" ", "\t")):
                fields[field] += "\n" + ("" if line.strip() == "." else line[1:].rstrip())
            else:
                field, _, value = line.partition(":")
                fields[field] = value.strip()
        result.append(fields)
    return result


def licence_text(parts: list[dict[str, str]], name: str) -> str:
    """Return the longest text that the copyright file gives for a licence, which is its full text."""
    texts = [part["License"] for part in parts if part.get("License", "").split("\n")[0] == name]
    return max(texts, key=len).partition("\n")[2].strip("\n")


def licence_table(clips: list[Clip], parts: list[dict[str, str]]) -> list[str]:
    """Return one table row per recording: its name here, licence, author and source."""
    entries = {Path(name).stem: part for part in parts for name in part.get("Files", "").split()}
    rows = []
    for clip in clips:
        entry = entries.get(clip.name)
        if clip.domain == "speech":
            facts = ("BSD-2", "1995-2014 Carnegie Mellon University, 2014-2015 Alpha Cephei Inc.", clip.source.name)
        elif entry is None:
            facts = ("CC0 [1]", "Sonic Pi contributors", "sonic-pi-samples")
        else:
            facts = (entry["License"], entry["Copyright"], entry.get("Source", "sonic-pi-samples"))
        rows.append(" | ".join((f"{clip.domain}/{clip.name}.flac", *facts)))
    return rows


def notice(clips: list[Clip], root: Path) -> str:
    """Return the text of NOTICE: where each recording comes from, under which licence, and the licence texts."""
    sample_parts, speech_parts = paragraphs(root / SAMPLES_COPYRIGHT), paragraphs(root / SPEECH_COPYRIGHT)
    sections = [
        "The recordings in this folder are not part of moss_train and have their own licences.\n"
        "They come from the Debian packages sonic-pi-samples (sound/ and music/) and pocketsphinx-testdata (speech/)\n"
        "and were mixed to mono, resampled to 24 kHz and stored as 16-bit FLAC by tools/build_quickstart_audio.py.",
        "[1] The README of the samples declares all of them CC0; the package's copyright file has no entry of its own\n"
        "for this one, and its entry for everything else is MIT. Both texts are below.",
        "file | licence | author | source\n" + "\n".join(licence_table(clips, sample_parts)),
    ]
    mit = "Copyright 2016 Samuel Aaron\n\n" + licence_text(sample_parts, "MIT")
    texts = [("CC0", licence_text(sample_parts, "CC0")), ("MIT", mit), ("BSD-2", bsd_text(speech_parts))]
    sections += [f"{'=' * 20} {name} {'=' * 20}\n\n{text}" for name, text in texts]
    return "\n\n".join(sections) + "\n"


def bsd_text(parts: list[dict[str, str]]) -> str:
    """Return the copyright lines and the licence of pocketsphinx."""
    entry = next(part for part in parts if part.get("Files") == "*")
    return f"Copyright {entry['Copyright']}\n\n{licence_text(parts, 'BSD-2')}"


def build(root: Path, output: Path) -> None:
    """Replace the recordings, manifests and NOTICE in `output` by those made from the packages unpacked in `root`."""
    clips = speech_clips(root) + sample_clips(root)
    for domain in ("speech", "sound", "music"):
        shutil.rmtree(output / domain, ignore_errors=True)
    seconds = {"train": 0.0, "heldout": 0.0}
    num_clipped = 0
    manifests: dict[str, list[str]] = {"train": [], "heldout": []}
    for clip in clips:
        part = "heldout" if clip.is_heldout() else "train"
        length, was_clipped = convert(clip.source, output / clip.domain / f"{clip.name}.flac")
        num_clipped += was_clipped
        seconds[part] += length
        manifests[part].append(json.dumps(clip.manifest_entry()))
    for part, lines in manifests.items():
        (output / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{part}: {len(lines)} clips, {seconds[part]:.1f} s")
    print(f"{num_clipped} clips had a peak above full scale after resampling, which was clipped")
    (output / "NOTICE").write_text(notice(clips, root), encoding="utf-8")


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unpacked", type=Path, help="folder into which both packages were unpacked")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    arguments = parser.parse_args()
    build(arguments.unpacked, arguments.output)


if __name__ == "__main__":
    main()
