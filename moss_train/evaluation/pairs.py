"""Read folders of references and reconstructions made by any codec as an evaluation set."""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moss_train.audio.io import read_audio, resample
from moss_train.evaluation.reconstruct import ClipReconstructions, Condition, EvaluationClip, Rendition, check_audio
from moss_train.utils.errors import UserError

LAYOUTS = (("gt_audios", "syn_audios"), ("reference", "reconstruction"), ("original", "reconstructed"))
"""Names of the two folders; the first are those of the evaluation code released with MOSS-Audio-Tokenizer."""

_DEPTH = re.compile(r"rvq(\d+)")


@dataclass(frozen=True)
class PairFolder:
    """Two folders side by side, with the condition and the domain that their path tells."""

    reference: Path
    degraded: Path
    condition: Condition
    domain: str


def find_pairs(root: Path, domain: str, bits_per_level: float | None) -> list[PairFolder]:
    """All folders of pairs at or below `root`.

    In MODEL/rvqN/DATASET/{gt_audios,syn_audios} the path names system, levels and dataset, which becomes the domain;
    elsewhere the system is the folder's name. Raises UserError when there are none.
    """
    if not root.is_dir():
        raise UserError(f"pairs={root} is not a folder")
    found: list[PairFolder] = []
    for reference_name, degraded_name in LAYOUTS:
        for reference in sorted(path for path in (root / reference_name, *root.rglob(reference_name)) if path.is_dir()):
            degraded = reference.with_name(degraded_name)
            if degraded.is_dir() and all(folder.reference != reference for folder in found):
                found.append(PairFolder(reference, degraded, *_named(reference.parent, domain, bits_per_level)))
    if not found:
        names = " or ".join(f"{first}/ and {second}/" for first, second in LAYOUTS)
        raise UserError(f"pairs={root} has no folders {names}")
    return found


def _named(folder: Path, domain: str, bits_per_level: float | None) -> tuple[Condition, str]:
    depth = _DEPTH.fullmatch(folder.parent.name)
    if depth is None:
        return Condition(folder.resolve().name), domain
    levels = int(depth[1])
    bits = None if bits_per_level is None else bits_per_level * levels
    return Condition(folder.parent.parent.resolve().name, levels, bits), folder.name


class PairRenderer:
    """Reads the reconstructions of a clip from every folder that has its domain; nothing is aligned or adjusted."""

    def __init__(self, folders: list[PairFolder], domain: str) -> None:
        self._folders = folders
        self._domain = domain  # speech, music, ...; the clips are grouped by data set

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All conditions, by system and bitrate."""
        unique = dict.fromkeys(folder.condition for folder in self._folders)
        return tuple(sorted(unique, key=lambda item: (item.system, item.num_quantizers or 0)))

    def clips(self) -> list[EvaluationClip]:
        """The references of all folders; a file of the same name in several folders of a domain is one clip."""
        clips: dict[tuple[str, str], EvaluationClip] = {}
        for folder in self._folders:
            for path in audio_files(folder.reference):
                name = path.relative_to(folder.reference).with_suffix("").as_posix()
                read = _Reader(path)
                clip = EvaluationClip(f"{folder.domain}/{name}", folder.domain, read, {"domain": self._domain})
                clips.setdefault((folder.domain, name), clip)
        if not clips:
            raise UserError(f"{self._folders[0].reference} has no audio files")
        return [clips[key] for key in sorted(clips)]

    def depends_on(self, clip: EvaluationClip) -> str:
        """The bytes of the reconstructions."""
        digest = hashlib.sha256()
        for folder in self._folders:
            name = clip.id.removeprefix(f"{clip.domain}/")
            if folder.domain == clip.domain and (path := _path(folder.degraded, name)) is not None:
                digest.update(str(folder.condition).encode() + path.read_bytes())
        return digest.hexdigest()

    def lacking(self, found: Collection[Condition]) -> tuple[Condition, ...]:
        """None: another file beside a reference makes another row (see `depends_on`)."""
        return ()

    def render(
        self, clip: EvaluationClip, audio: Tensor, rate: int, wanted: Collection[Condition] = ()
    ) -> ClipReconstructions:
        """Pair a reference [C, T] with all its reconstructions; missing or unreadable ones are failures."""
        check_audio(audio, clip.id)
        renditions: list[Rendition] = []
        failures: dict[Condition, str] = {}
        for folder in (folder for folder in self._folders if folder.domain == clip.domain):
            try:
                renditions.append(_read_pair(folder, clip.id.removeprefix(f"{clip.domain}/")))
            except UserError as error:
                failures[folder.condition] = str(error)
        return ClipReconstructions(tuple(renditions), audio.shape[-1] / rate, failures=failures)


def _read_pair(folder: PairFolder, name: str) -> Rendition:
    wanted, wanted_rate = read_audio(_find(folder.reference, name))
    got, got_rate = read_audio(_find(folder.degraded, name))
    return Rendition(folder.condition, wanted, resample(got, got_rate, wanted_rate), wanted_rate)


@dataclass(frozen=True)
class _Reader:
    path: Path

    def __call__(self) -> tuple[Tensor, int]:
        return read_audio(self.path)


def audio_files(folder: Path) -> list[Path]:
    """WAV and FLAC files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".wav", ".flac"))


def _find(folder: Path, name: str) -> Path:
    path = _path(folder, name)
    if path is None:
        raise UserError(f"{folder} has no {name}.flac or {name}.wav")
    return path


def _path(folder: Path, name: str) -> Path | None:
    return next((path for suffix in (".flac", ".wav") if (path := folder / f"{name}{suffix}").is_file()), None)
