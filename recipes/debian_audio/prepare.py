"""Write manifests of the speech, music and sounds in unpacked Debian packages, for `moss_train pack`.

    python recipes/debian_audio/prepare.py UNPACKED OUT

UNPACKED is the folder into which run.sh unpacks the packages; train.jsonl and heldout.jsonl are written to OUT. Missing
packages are skipped, so part of the list is enough.
"""

import argparse
import hashlib
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from moss_train.audio.io import audio_info
from moss_train.utils.errors import UserError

MAX_CHARACTERS_PER_SECOND = 25.0  # with more, the text is longer than what is spoken
TRACK_PARTS, PART_SECONDS = 8, 12.0
HELDOUT_SPEAKERS = {"fillets-cs-big", "pocketsphinx-librivox", "klettres-it", "klettres-en_GB", "ktuberling-fr"}
HELDOUT_PERCENT = 5

MUSIC = {
    "usr/share/games/wesnoth/*/data/core/music": "orchestral fantasy game music",
    "usr/share/games/hedgewars/Data/Music": "cartoon game music",
    "usr/share/games/colobot/music": "ambient science fiction game music",
    "usr/share/games/singularity/music": "electronic ambient game music",
    "usr/share/starfighter/music": "space game music",
    "usr/share/games/fillets-ng/music": "calm underwater game music",
    "usr/share/hyperrogue/music": "ambient game music",
    "usr/share/games/frozen-bubble/snd": "puzzle game music",
    "usr/share/games/etr/music": "winter racing game music",
}
SOUNDS = {
    "usr/share/sonic-pi/samples": "",
    "usr/share/games/ufoai/base/sound": "game sound",
    "usr/share/games/wesnoth/*/data/core/sounds": "game sound",
    "usr/share/games/hedgewars/Data/Sounds": "cartoon game sound",
    "usr/share/starfighter/sound": "space game sound",
    "usr/share/sounds": "computer notification sound",
    "usr/share/games/colobot/sounds": "",
    "usr/share/games/etr/sounds": "winter racing game sound",
    "usr/share/games/frozen-bubble/snd": "puzzle game sound",
    "usr/share/hyperrogue/sounds": "game sound",
}
AUDIO = (".ogg", ".oga", ".wav", ".flac", ".mp3")
TRACK_SECONDS = 20.0  # in folders that hold both, longer files are music, shorter ones sounds

Clip = dict[str, object]


def main() -> None:
    """Write both manifests and print the hours."""
    parser = argparse.ArgumentParser(description="Manifests of the audio in unpacked Debian packages.")
    parser.add_argument("unpacked", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    root = arguments.unpacked.resolve()
    sources = (fillets, tuxpaint, klettres, ktuberling, pocketsphinx, voices, music, sounds)
    clips = [clip for source in sources for clip in source(root)]
    unique = list({clip["id"]: clip for clip in clips if measure(clip)}.values())
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("heldout", True)):
        chosen = [clip for clip in unique if is_heldout(clip) == wanted]
        write(arguments.out / f"{name}.jsonl", chosen)
        minutes: dict[str, float] = {}
        for clip in chosen:
            minutes[str(clip["domain"])] = minutes.get(str(clip["domain"]), 0.0) + float(str(clip["seconds"])) / 60
        print(f"{name}: {len(chosen)} clips,", ", ".join(f"{key} {value:.1f} min" for key, value in minutes.items()))
    if not unique:
        sys.exit(f"{root} holds none of the packages")


def write(path: Path, clips: list[Clip]) -> None:
    """Write a manifest, without the fields that only this script needs."""
    with path.open("w", encoding="utf-8") as file:
        for clip in clips:
            values = {
                key: value for key, value in clip.items() if value is not None and key not in ("group", "seconds")
            }
            file.write(json.dumps(values, ensure_ascii=False) + "\n")


def is_heldout(clip: Clip) -> bool:
    """Tell whether a clip is held out: whole speakers, and of the rest a share of texts, tracks and families."""
    if clip.get("speaker") in HELDOUT_SPEAKERS:
        return True
    group = str(clip.get("group") or clip.get("text") or clip["id"])
    return int(hashlib.sha256(group.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT


def measure(clip: Clip) -> bool:
    """Add the duration, and remove a text that is too long for it. Returns False for files that cannot be read."""
    try:
        seconds = audio_info(str(clip["path"])).seconds
    except UserError:
        return False
    if "end_seconds" in clip:
        seconds = float(str(clip["end_seconds"])) - float(str(clip["start_seconds"]))
    clip["seconds"] = seconds
    spoken = clip["domain"] == "speech" and clip.get("text")
    if spoken and len(str(clip["text"])) > MAX_CHARACTERS_PER_SECOND * seconds:
        clip["text"] = None
    return seconds >= 0.2


def speech(path: Path, root: Path, language: str, speaker: str, text: str | None) -> Clip:
    """Return a clip of speech."""
    labels = {"domain": "speech", "language": language, "speaker": speaker, "text": (text or "").strip() or None}
    return {"path": str(path), "id": path.relative_to(root).as_posix()} | labels


def fillets(root: Path) -> Iterator[Clip]:
    """Yield the clips of Fish Fillets: whole sentences in Czech and Dutch, with texts from the levels' scripts."""
    dialog = re.compile(r'dialogId\("([^"]+)", "([^"]+)", "[^"]*"\)\s*dialogStr\("([^"]*)"\)')
    for language in ("cs", "nl"):
        for script in sorted(root.glob(f"usr/share/games/fillets-ng/script/*/dialogs_{language}.lua")):
            for name, font, text in dialog.findall(script.read_text("utf-8", errors="replace")):
                path = root / "usr/share/games/fillets-ng/sound" / script.parent.name / language / f"{name}.ogg"
                if path.is_file():
                    character = font.removeprefix("font_")
                    yield speech(path, root, language, f"fillets-{language}-{character}", text)


def tuxpaint(root: Path) -> Iterator[Clip]:
    """Yield the clips of Tux Paint: spoken descriptions of pictures in many languages, and sounds of what they show."""
    stamps = root / "usr/share/tuxpaint/stamps"
    for path in sorted(stamps.rglob("*.ogg")):
        name, _, language = path.stem.partition("_desc")
        texts = read_stamp(path.with_name(f"{name}.txt"))
        if "_desc" in path.stem:
            language = language.removeprefix("_") or "en"
            yield speech(path, root, language, f"tuxpaint-{language}", texts.get(language))
        elif path.with_suffix(".png").exists() or path.with_suffix(".svg").exists():
            labels = {"domain": "sound", "text": f"sound of: {texts['en']}" if "en" in texts else None}
            yield {"path": str(path), "id": path.relative_to(root).as_posix(), "group": name} | labels


def read_stamp(path: Path) -> dict[str, str]:
    """Return the descriptions of a Tux Paint stamp by language; the first line of the file is English."""
    if not path.is_file():
        return {}
    first, *rest = path.read_text("utf-8", errors="replace").splitlines() or [""]
    translations = (line.partition(".utf8=") for line in rest)
    return {"en": first.strip()} | {key: value.strip() for key, sign, value in translations if sign}


def klettres(root: Path) -> Iterator[Clip]:
    """Yield the clips of KLettres: letters and syllables in twenty languages."""
    folder = root / "usr/share/klettres"
    for listing in sorted(folder.glob("*/sounds.xml")):
        for sound in ElementTree.parse(listing).iter("sound"):
            path = folder / str(sound.get("file"))
            if path.is_file():
                yield speech(path, root, listing.parent.name, f"klettres-{listing.parent.name}", sound.get("name"))


def ktuberling(root: Path) -> Iterator[Clip]:
    """Yield the clips of KTuberling: names of things in twenty languages, without their texts."""
    for path in sorted((root / "usr/share/ktuberling/sounds").glob("*/*")):
        if path.suffix in AUDIO:
            yield speech(path, root, path.parent.name, f"ktuberling-{path.parent.name}", None)


def pocketsphinx(root: Path) -> Iterator[Clip]:
    """Yield the clips of pocketsphinx: ten sentences and names of cards in English."""
    folder = root / "usr/share/pocketsphinx/test/data"
    line = re.compile(r"<s>(.*)</s>\s*\((.+)\)")
    for listing in (folder / "librivox/transcription", folder / "cards/cards.transcription"):
        for text, name in line.findall(listing.read_text("utf-8")) if listing.is_file() else []:
            path = listing.parent / f"{name}.wav"
            if path.is_file():
                yield speech(path, root, "en", f"pocketsphinx-{listing.parent.name}", text)


def voices(root: Path) -> Iterator[Clip]:
    """Yield the clips of Hedgewars: exclamations by voice actors, without their texts."""
    for path in sorted((root / "usr/share/games/hedgewars/Data/Sounds/voices").glob("*/*.ogg")):
        language = path.parent.name.partition("_")[2] or "en"
        yield speech(path, root, language, f"hedgewars-{path.parent.name}", None)


def files_of(root: Path, pattern: str) -> list[Path]:
    """Return the audio files below the folders that match a pattern, without folders of voices, which are speech."""
    found = (path for folder in root.glob(pattern) for path in folder.rglob("*"))
    return sorted(path for path in found if path.suffix in AUDIO and "/voices/" not in path.as_posix())


def music(root: Path) -> Iterator[Clip]:
    """Yield excerpts of every music track, spread over its length."""
    for pattern, style in MUSIC.items():
        for path in files_of(root, pattern):
            seconds = audio_info(path).seconds
            if seconds < TRACK_SECONDS:
                continue
            count = min(TRACK_PARTS, int(seconds // PART_SECONDS))
            for number in range(count):
                start = int(1000 * (seconds - PART_SECONDS) * number / max(1, count - 1)) / 1000
                times = {"start_seconds": start, "end_seconds": round(start + PART_SECONDS, 3)}
                name = f"{path.relative_to(root).as_posix()}#{number}"
                labels = {"domain": "music", "text": f"music: {style}, {words(path)}", "group": path.stem}
                yield {"path": str(path), "id": name} | labels | times


def sounds(root: Path) -> Iterator[Clip]:
    """Yield sound effects, with captions from their folder and file names."""
    for pattern, kind in SOUNDS.items():
        for path in files_of(root, pattern):
            if audio_info(path).seconds < TRACK_SECONDS:
                text = ", ".join(part for part in (kind, path.parent.name, words(path)) if part)
                group = re.sub(r"[\d_-]+$", "", path.stem)
                name = path.relative_to(root).as_posix()
                yield {"path": str(path), "id": name, "domain": "sound", "text": text, "group": group}


def words(path: Path) -> str:
    """Return a file name as words: camel case is split; digits and punctuation become spaces."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", path.stem)
    return re.sub(r"[\W_\d]+", " ", spaced).strip().lower()


if __name__ == "__main__":
    main()
