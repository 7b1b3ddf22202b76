"""The list of clips to pack: every audio file of a folder tree, or the lines of a JSONL manifest."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moss_train.types import TASKS
from moss_train.utils.errors import UserError

AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in "aif aifc aiff au caf flac mp3 oga ogg opus rf64 snd sph w64 wav wave".split()  # noqa: SIM905
)
"""Suffixes that are taken from a folder; manifests may name any file that libsndfile reads."""

DOMAIN_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

_KEYS = ("path", "id", "domain", "text", "task", "language", "speaker")


@dataclass(frozen=True)
class SourceClip:
    """One clip to pack, as its file name or its manifest line describes it."""

    path: Path
    id: str
    domain: str
    text: str | None = None
    task: str | None = None  # one of TASKS, set exactly where there is text
    language: str | None = None
    speaker: str | None = None

    def labels(self) -> dict[str, str]:
        """What is stored beside the audio: the labels that are there."""
        values = {"domain": self.domain, "text": self.text, "task": self.task}
        values |= {"language": self.language, "speaker": self.speaker}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class SourceList:
    """Clips in their fixed order, with what was passed over while listing them."""

    source: Path
    clips: tuple[SourceClip, ...]
    ignored: dict[str, int] = field(default_factory=dict)  # suffixes or manifest keys without effect, with counts


def list_clips(source: Path, domain: str) -> SourceList:
    """List the clips of a folder or a JSONL manifest; `domain` is for clips that do not say one.

    Raises UserError, with the line of a manifest, for whatever cannot be packed as written.
    """
    check_domain(domain, "domain")
    if source.is_dir():
        return _list_folder(source, domain)
    if not source.exists():
        raise UserError(f"input={source} does not exist; give a folder of audio files or a .jsonl manifest")
    if source.suffix.lower() not in (".jsonl", ".ndjson"):
        raise UserError(f"input={source} is neither a folder nor a .jsonl manifest")
    return _list_manifest(source, domain)


def check_domain(domain: str, where: str) -> str:
    """Return the domain, or raise UserError when it cannot be part of a file name."""
    if not isinstance(domain, str) or not DOMAIN_PATTERN.fullmatch(domain):
        raise UserError(f"{where}: domain {domain!r} has to be letters, digits, '-' and '_' (it names the shards)")
    return domain


def _walk(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder; linked folders are followed once, hidden names are passed over."""
    seen: set[str] = set()
    for root, directories, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _list_folder(folder: Path, domain: str) -> SourceList:
    paths: list[Path] = []
    ignored: dict[str, int] = {}
    for path in _walk(folder):
        suffix = path.suffix.lower()
        if suffix in AUDIO_SUFFIXES:
            paths.append(path)
        else:
            ignored[suffix or "no suffix"] = ignored.get(suffix or "no suffix", 0) + 1
    if not paths:
        found = ", ".join(f"{count} {suffix}" for suffix, count in sorted(ignored.items())) or "no files"
        raise UserError(f"input={folder} has no audio files (found {found}); libsndfile's formats are read")
    clips = sorted((_readable(path.relative_to(folder)), path) for path in paths)
    return SourceList(folder, tuple(SourceClip(path, id, domain) for id, path in clips), ignored)


def _readable(path: Path) -> str:
    """Path as text that can be stored: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _list_manifest(manifest: Path, domain: str) -> SourceList:
    clips: list[SourceClip] = []
    ignored: dict[str, int] = {}
    lines: dict[str, int] = {}
    with manifest.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{manifest}:{number}"
            entry = _parse_line(line, where)
            clip = _clip_from_entry(entry, manifest.parent, domain, where)
            if clip.id in lines:
                first = lines[clip.id]
                raise UserError(f"{where}: {clip.id!r} is already on line {first}; give every clip its own 'id'")
            lines[clip.id] = number
            clips.append(clip)
            for key in entry.keys() - set(_KEYS):
                ignored[key] = ignored.get(key, 0) + 1
    if not clips:
        raise UserError(f"{manifest} has no lines; write one JSON object with a 'path' per clip")
    return SourceList(manifest, tuple(clips), ignored)


def _parse_line(line: bytes, where: str) -> dict:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of JSON ({error})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise UserError(f"{where}: every line has to be a JSON object with a 'path'")
    for key in _KEYS:
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise UserError(f"{where}: {key!r} has to be a string, got {entry[key]!r}")
    return entry


def _clip_from_entry(entry: dict, folder: Path, domain: str, where: str) -> SourceClip:
    clip_domain = check_domain(entry.get("domain") or domain, where)
    text = (entry.get("text") or "").strip() or None
    task = entry.get("task") or ("asr" if clip_domain == "speech" else "caption")
    if task not in TASKS:
        raise UserError(f"{where}: unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    path = folder / entry["path"]
    if not path.is_file():
        raise UserError(f"{where}: no such file: {path}")
    return SourceClip(
        path=path,
        id=entry.get("id") or entry["path"],
        domain=clip_domain,
        text=text,
        task=task if text else None,
        language=entry.get("language") or None,
        speaker=entry.get("speaker") or None,
    )
