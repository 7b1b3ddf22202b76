"""List the clips to pack: a folder tree, a JSONL or CSV manifest, a Kaldi folder or a saved dataset."""

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from moss_train.audio.io import CONVERTIBLE_SUFFIXES
from moss_train.batch import TASKS
from moss_train.data.pack.list_formats import (
    JSON_SUFFIXES,
    KEYS,
    LICENCE_KEYS,
    MANIFEST_SUFFIXES,
    NEMO_KEYS,
    TABLE_SUFFIXES,
    TIMES,
    Entries,
    is_kaldi,
    is_saved_dataset,
    iterate_json,
    iterate_rows,
    iterate_table,
    iterate_utterances,
)
from moss_train.data.shards.format import DOMAIN_PATTERN
from moss_train.utils.errors import Fault, InvalidSample, SampleError, UserError
from moss_train.utils.files import parse_json, pluralize, special_kind

AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in "aif aifc aiff au caf flac mp3 oga ogg opus rf64 snd sph w64 wav wave".split()  # noqa: SIM905
)
"""Suffixes of the files that are used in a folder; manifests may name any file that libsndfile reads."""

RESERVED_DOMAINS = ("all", "update")

_MAX_LABEL_BYTES = 2**17  # of one clip; readers of shards accept eight times as much


@dataclass(frozen=True)
class SourceClip:
    """One clip to pack, as described by its file name or its manifest line."""

    path: Path
    id: str
    domain: str
    text: str | None = None
    task: str | None = None  # one of TASKS, set if and only if there is text
    language: str | None = None
    speaker: str | None = None
    licence: str | None = None  # as the manifest states it
    start_seconds: float = 0.0  # where the clip starts in its file
    end_seconds: float | None = None
    row: int | None = None  # of the saved dataset that `path` belongs to

    def labels(self) -> dict[str, str]:
        """Return the labels that are stored with the audio, without those that are None."""
        names = ("domain", "text", "task", "language", "speaker", "licence")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class SourceList:
    """Clips in their fixed order, with what was skipped while listing them."""

    source: Path
    clips: tuple[SourceClip, ...]
    ignored: dict[str, int] = field(default_factory=dict)  # suffixes or manifest keys without effect, with counts
    invalid: tuple[InvalidSample, ...] = ()  # lines that are not clips, and folder entries that are not ordinary files
    key: str = "input"  # configuration key that the source was given with
    whole: int | None = None  # clips and invalid ones of the list that this is a part of, if it is one

    @property
    def total(self) -> int:
        """Number of clips and invalid ones of the whole list: the limit of `max_invalid_fraction` applies to it."""
        return len(self.clips) + len(self.invalid) if self.whole is None else self.whole


def list_clips(source: Path, domain: str, key: str = "input") -> SourceList:
    """List the clips of a folder, a manifest, a Kaldi folder, a saved dataset or a single audio file.

    Lines and files that are not clips are listed in the result as `invalid`.

    Args:
        domain: domain of clips that do not state one.
        key: configuration key that the source was given with, for messages.

    Raises:
        UserError: there are no clips at all.
    """
    check_domain(domain, "domain")
    if not source.exists():
        raise UserError(f"{key}={source} does not exist; give a folder of audio files or a .jsonl manifest")
    name = source.name.lower()
    packed = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    if is_kaldi(source):
        found = _list_entries(source, iterate_utterances(source), domain)
    elif source.is_dir():
        saved = is_saved_dataset(source)
        found = _list_entries(source, iterate_rows(source), domain) if saved else _list_folder(source, domain, key)
    elif suffix in JSON_SUFFIXES:
        found = _list_entries(source, iterate_json(source), domain)
    elif suffix in TABLE_SUFFIXES and not packed:
        found = _list_entries(source, iterate_table(source, TABLE_SUFFIXES[suffix]), domain)
    elif suffix in AUDIO_SUFFIXES and not packed:
        found = SourceList(source, (SourceClip(source, _readable(Path(source.name)), domain),))
    elif suffix in CONVERTIBLE_SUFFIXES:
        raise UserError(f"{key}={source} is in a format that libsndfile does not read{how_to_convert([suffix])}")
    else:
        raise UserError(
            f"{key}={source} is neither a folder nor an audio file nor a .jsonl, .json, .csv, .tsv or .scp manifest"
        )
    return replace(found, key=key)


def is_list(path: Path) -> bool:
    """Return whether a file is a list of clips, judging by its name."""
    return path.name.lower().removesuffix(".gz").endswith((*MANIFEST_SUFFIXES, ".scp"))


def how_to_convert(suffixes: Iterable[str]) -> str:
    """Return advice on converting files in formats of phones and browsers; empty if no suffix is one of them."""
    found = sorted(set(suffixes) & CONVERTIBLE_SUFFIXES)
    return f"; convert each {' and '.join(found)} file: ffmpeg -i clip{found[0]} clip.flac" if found else ""


def read_drop_list(path: Path) -> frozenset[str]:
    """Read the ids of a drop list, one JSON object with `id` (and maybe a reason) per line. Raises UserError."""
    dropped = set()
    try:
        lines = path.read_text("utf-8").split("\n")  # not splitlines: U+2028 in an id ends no line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"drop={path} cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            dropped.add(str(parse_json(line, "line")["id"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a JSON object with an 'id' ({line!r})") from error
    return frozenset(dropped)


def check_domain(domain: str, where: str) -> str:
    """Return the domain, or raise UserError when it cannot be part of a file name."""
    if not isinstance(domain, str) or not DOMAIN_PATTERN.fullmatch(domain):
        raise UserError(f"{where}: domain {domain!r} has to be letters, digits, '-' and '_' (it names the shards)")
    if domain in RESERVED_DOMAINS:
        raise UserError(f"{where}: the domain cannot be called {domain!r}, which is a column of the tables: rename it")
    return domain


def _walk(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder; linked folders are followed once, hidden names are skipped.

    Entries that are neither folders nor ordinary files are yielded, too, and must not be opened: a pipe may block
    forever. Links that lead out of the folder are followed, because many corpora are kept that way, but with a warning:
    whoever shares the shards also shares what the links lead to.
    """
    seen: set[str] = set()
    top = os.path.realpath(folder)
    outside: list[Path] = []
    open_folders = [str(folder)]
    while open_folders:
        current = open_folders.pop()
        real = os.path.realpath(current)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(current) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            warnings.warn(f"{current} cannot be listed ({error.strerror}), its files are skipped", stacklevel=2)
            continue
        inner = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_link = entry.is_symlink()
            if is_link and not f"{os.path.realpath(entry.path)}{os.sep}".startswith(top + os.sep):
                outside.append(Path(entry.path))
            # For a link, not `entry.is_dir()`, which raises if the link is circular.
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                inner.append(entry.path)
            else:
                yield Path(entry.path)
        open_folders += reversed(inner)
    if outside:
        warnings.warn(
            f"{pluralize(len(outside), 'link')} in {folder} lead out of it and are followed, as {outside[0]} -> "
            f"{os.path.realpath(outside[0])}",
            stacklevel=2,
        )


def _list_folder(folder: Path, domain: str, key: str) -> SourceList:
    clips: list[tuple[str, Path]] = []
    bad: list[InvalidSample] = []
    ignored: dict[str, int] = {}
    for path in _walk(folder):
        suffix = path.suffix.lower()
        name = _readable(path.relative_to(folder))
        if suffix not in AUDIO_SUFFIXES:
            ignored[suffix or "no suffix"] = ignored.get(suffix or "no suffix", 0) + 1
            continue
        try:
            reason = special_kind(path)  # without opening it
        except OSError as error:
            reason = f"out of reach ({error.strerror})"
        if reason:
            bad.append(InvalidSample(name, f"{path} is {reason}, not a file", Fault.SPECIAL_FILE))
        else:
            clips.append((name, path))
    if not clips and bad:
        raise UserError(f"{key}={folder} has no audio files: {bad[0].reason}")
    if not clips:
        found = ", ".join(f"{count} {suffix}" for suffix, count in sorted(ignored.items())) or "no files"
        advice = how_to_convert(ignored) or "; libsndfile's formats are read"
        raise UserError(f"{key}={folder} has no audio files (found {found}){advice}")
    listed = tuple(SourceClip(path, id, domain) for id, path in sorted(clips))
    return SourceList(folder, listed, ignored, tuple(sorted(bad)))


def _readable(path: Path) -> str:
    """Return a path as text that can be stored: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _list_entries(source: Path, entries: Entries, domain: str) -> SourceList:
    clips: list[SourceClip] = []
    bad: list[InvalidSample] = []
    ignored: dict[str, int] = {}
    places: dict[str, str] = {}
    folder = source if source.is_dir() else source.parent
    for where, entry in entries:
        try:
            if isinstance(entry, UserError):
                raise entry
            clip = _clip_from_entry(entry, folder, domain, where)
            if clip.id in places and clip.start_seconds and not entry.get("id"):  # another part of the same file
                clip = replace(clip, id=f"{clip.id}@{clip.start_seconds:.3f}")
            if clip.id in places:
                raise SampleError(
                    Fault.REPEATED_ID,
                    f"{where}: {clip.id!r} is already on {places[clip.id]}; give every clip its own 'id'",
                )
        except UserError as error:
            bad.append(InvalidSample(where, str(error), error.fault if isinstance(error, SampleError) else Fault.LINE))
            continue
        places[clip.id] = f"line {where.rpartition(':')[2]}" if ":" in where else where
        clips.append(clip)
        for key in set(entry) - {*KEYS, *LICENCE_KEYS, *TIMES, *NEMO_KEYS, "row"}:
            ignored[key] = ignored.get(key, 0) + 1
    if not clips:
        raise UserError(
            bad[0].reason if bad else f"{source} has no lines; write one JSON object with a 'path' per clip"
        )
    return SourceList(source, tuple(clips), ignored, tuple(bad))


def _clip_from_entry(entry: dict, folder: Path, domain: str, where: str) -> SourceClip:
    clip_domain = check_domain(entry.get("domain") or domain, where)
    text = (entry.get("text") or "").strip() or None
    task = entry.get("task") or ("asr" if clip_domain == "speech" else "caption")
    if task not in TASKS:
        raise UserError(f"{where}: unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    size = sum(len(value.encode("utf-8", "surrogatepass")) for value in entry.values() if isinstance(value, str))
    if size > _MAX_LABEL_BYTES:
        raise UserError(f"{where}: path, id, text and labels have {size} bytes, more than {_MAX_LABEL_BYTES}")
    path = folder / entry["path"]
    try:
        reason = special_kind(path)
    except FileNotFoundError as error:
        raise SampleError(Fault.MISSING_FILE, f"{where}: no such file: {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte or half a character in the name
        raise SampleError(Fault.FILE, f"{where}: no such file: {str(path)!r} ({error})") from error
    if reason is not None:
        raise SampleError(Fault.SPECIAL_FILE, f"{where}: no such file: {path} is {reason}")
    licences = (entry.get(key) for key in LICENCE_KEYS)  # not a string in some lists by other programs
    return SourceClip(
        path=path,
        id=entry.get("id") or _readable(Path(entry["path"])),
        domain=clip_domain,
        text=text,
        task=task if text else None,
        language=entry.get("language") or None,
        speaker=entry.get("speaker") or None,
        licence=next((text.strip() for text in licences if isinstance(text, str) and text.strip()), None),
        start_seconds=entry.get("start_seconds") or 0.0,
        end_seconds=entry.get("end_seconds"),
        row=entry.get("row"),
    )
