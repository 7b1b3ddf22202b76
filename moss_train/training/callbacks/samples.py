"""Write reconstructions, spectrograms and transcripts of fixed held-out clips during training."""

import gc
import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from moss_train.audio.io import write_audio
from moss_train.batch import TASKS
from moss_train.plotting import save_spectrograms
from moss_train.training.callbacks.validation_data import DecodedClip, HeldOutClip, reconstruct
from moss_train.training.loggers.base import ClipSample
from moss_train.training.module import CatModule
from moss_train.utils.files import atomic_write, markdown_table

ORIGINAL = "original"
MAX_TOKENS = 256  # of a transcript


class AudioSampleWriter:
    """Writes reconstructions as FLAC, spectrograms as PNG and the text LM's transcripts beside the reference text.

    Args:
        directory: folder `samples` of the run.
        clips: held-out clips, the same ones during the whole run.
        levels: numbers of quantizer levels to decode, ascending.
        sampling_rate: sampling rate of the decoded audio in Hz.
        every_updates: samples are made with the first validation at or after each multiple of this update number, and
            with the final one.
        validation_updates: updates between two validations.
    """

    def __init__(
        self,
        directory: Path,
        clips: Sequence[HeldOutClip],
        levels: Sequence[int],
        sampling_rate: int,
        every_updates: int,
        validation_updates: int,
    ) -> None:
        self.directory = directory
        self.clips = clips
        self.names = [f"{i}-{plain_name(clip.id)}" for i, clip in enumerate(clips, start=1)]
        self.levels = tuple(levels)
        self.sampling_rate = sampling_rate
        self.every_updates = every_updates
        self.validation_updates = validation_updates
        self.draws = find_spec("matplotlib") is not None
        self.originals: set[Path] = set()  # written since this start: a resumed run may have other clips

    def make(self, module: CatModule, is_main: bool) -> list[ClipSample]:
        """Write and return the samples of this update; an empty list when none are due.

        Every rank computes them, because networks may be sharded over ranks; only the main one writes.
        """
        previous = module.update - self.validation_updates
        is_due = module.update // self.every_updates > previous // self.every_updates
        if not is_due and module.update != module.schedule.updates:
            return []
        folder = self.directory / f"update-{module.update:08d}"
        samples, lines = [], [f"# Transcripts at update {module.update}", ""]
        for name, clip in zip(self.names, self.clips, strict=True):
            made = reconstruct(module.tokenizer, clip, self.levels)
            texts = {}
            if module.semantic is not None and clip.text is not None:  # greedy transcripts of the text LM by depth
                task = torch.tensor([TASKS.index(clip.task)], device=module.device)
                longest = min(MAX_TOKENS, 2 * len(module.semantic.text(clip.text)))
                texts["truth"] = clip.text
                for count, states in made.states.items():
                    tokens = module.semantic.generate(states, task, longest)
                    texts[label(count)] = module.semantic.text.decode(tokens)
                escaped = [(key, json.dumps(text, ensure_ascii=False)[1:-1]) for key, text in texts.items()]
                lines += [f"## {name}", "", *markdown_table(("heard", "text"), escaped), ""]
            if is_main:
                samples.append(self._write(module.update, folder, name, clip, made, texts))
        if is_main and len(lines) > 2:
            with atomic_write(folder / "transcripts.md") as temporary:
                temporary.write_text("\n".join(lines), "utf-8")
        gc.collect()  # figures hold reference cycles: a dozen figures, 50 MB, would wait for the next collection
        return samples

    def _write(
        self, update: int, folder: Path, name: str, clip: HeldOutClip, made: DecodedClip, texts: Mapping[str, str]
    ) -> ClipSample:
        audio = {ORIGINAL: clip.target} | {label(count): made.audio[count] for count in self.levels}
        paths = {key: folder / f"{name}.{key}.flac" for key in audio}
        paths[ORIGINAL] = self.directory / ORIGINAL / f"{name}.flac"
        for key, path in paths.items():
            if path not in self.originals:
                with atomic_write(path) as temporary:
                    write_audio(temporary, audio[key].nan_to_num().clamp(-1, 1), self.sampling_rate)
        self.originals.add(paths[ORIGINAL])
        picture = folder / f"{name}.png" if self.draws else None
        if picture is not None:
            with atomic_write(picture) as temporary:
                save_spectrograms(audio, self.sampling_rate, temporary, title=f"{clip.id}, update {update}")
        return ClipSample(update, name, paths, picture, texts)


def label(num_quantizers: int) -> str:
    """Return the name of a depth in file names; names sort by depth."""
    return f"levels-{num_quantizers:02d}"


def plain_name(clip_id: str) -> str:
    """Return a clip's id as part of a file name."""
    stem = re.sub(r"\.(aiff?|flac|mp3|ogg|opus|wav)$", "", clip_id, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._")[-60:] or "clip"
