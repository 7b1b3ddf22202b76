"""The configuration classes of all commands. See `fit_schema` for those of `fit` and `estimate`."""

from dataclasses import field
from typing import Annotated, Literal

from moss_train.config.fit_schema import EstimateConfig, FitConfig, Node
from moss_train.config.section import (
    Count,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    PathText,
    Positive,
    Section,
    at_least,
    within,
)
from moss_train.utils.errors import ConfigError

EvaluationMetric = Literal[
    "text_model", "stoi", "pesq", "spectral", "si_sdr", "pitch", "buzz", "speaker", "recognition", "dnsmos"
]
Codec = Literal[
    "encodec", "dac", "mimi", "higgs", "xcodec2", "speechtokenizer", "bigcodec", "qwen3_tts", "mimo", "xy_tokenizer"
]
DEFAULT_METRICS: tuple[EvaluationMetric, ...] = (
    "text_model",
    "stoi",
    "pesq",
    "spectral",
    "si_sdr",
    "pitch",
    "buzz",
    "speaker",
    "recognition",
)


class PackConfig(Section):
    """Audio to shards."""

    input: PathText
    out: PathText
    domain: str = "speech"
    sampling_rate: Annotated[int, within(2000, 768000)] = 24000
    num_channels: Count = 1
    min_seconds: NonNegativeFloat = 0.1
    segment_seconds: Positive | None = 60.0
    max_seconds: Positive | None = 600.0
    min_level_db: float | None = None
    drop: PathText | None = None
    shard_bytes: Count = 268435456
    max_invalid_fraction: Fraction = 0.0
    num_workers: Count | None = None
    executor: Literal["local", "ray"] = "local"
    overwrite: bool = False

    def check(self) -> None:
        for name in ("max_seconds", "segment_seconds"):
            value = getattr(self, name)
            if value is not None and not value > max(self.min_seconds, 0.01):
                raise ConfigError("conflict", name, value, f"has to be above min_seconds={self.min_seconds:g}, or null")


class EncodeConfig(Section):
    """Audio to codes."""

    model: PathText
    out: PathText
    input: list[PathText] | None = None
    shards: PathText | None = None
    executor: Literal["local", "ray"] = "local"
    format: Literal["safetensors", "npz"] = "safetensors"
    num_quantizers: Count | None = None
    streaming: bool = False
    chunk_duration: Positive | None = None
    batch_invariant: bool = False
    batch_seconds: Positive = 120.0
    precision: Literal["fp32", "bf16"] | None = None
    device: list[str] = field(default_factory=lambda: ["auto"])

    def check(self) -> None:
        if (self.input is None) == (self.shards is None):
            expected = "give either audio (input=) or a folder that pack made (shards=)"
            if self.input is None:
                raise ConfigError("required", "input", None, expected)
            raise ConfigError("conflict", "shards", self.shards, f"excludes input: {expected}")
        if self.shards is None and len(self.device) != 1:
            raise ConfigError("conflict", "device", self.device, "has several devices, which only shards= can use")


class DecodeConfig(Section):
    """Codes to audio."""

    model: PathText
    input: list[PathText]
    out: PathText
    format: Literal["wav", "flac"] = "wav"
    num_quantizers: Count | None = None
    streaming: bool = False
    chunk_duration: Positive | None = None
    batch_invariant: bool = False
    batch_seconds: Positive = 120.0
    precision: Literal["fp32", "bf16"] | None = None
    device: str = "auto"


class EvaluateConfig(Section):
    """Measures of a codec."""

    out: PathText
    model: PathText | None = None
    codec: Codec | None = None
    pairs: PathText | None = None
    weights: PathText | None = None
    code: PathText | None = None
    data: list[PathText] | None = None
    num_quantizers: list[Count] | None = None
    domain: str = "speech"
    max_clips: Count | None = None
    clip_seconds: Annotated[float, at_least(0.1)] | None = None
    seed: NonNegative = 0
    profile: Literal["official", "dac24k"] = "official"
    metrics: list[EvaluationMetric | Node] = field(default_factory=lambda: list(DEFAULT_METRICS))
    speaker_model: PathText | None = None
    recognition: Literal["auto", "faster_whisper", "whisper"] = "auto"
    recognition_model: PathText | None = None
    missing_values: Literal["exclude", "official"] = "exclude"
    anchors: bool = True
    strict: bool = False
    report_clips: NonNegative | list[str] = 2
    compare: list[PathText] = field(default_factory=list)
    bits_per_level: Positive | None = None
    num_workers: NonNegative = 0
    precision: Literal["fp32", "bf16"] | None = None
    device: str = "auto"
    plugins: list[str] = field(default_factory=list)

    def check(self) -> None:
        given = [key for key in ("model", "codec", "pairs") if getattr(self, key) is not None]
        if not given:
            raise ConfigError("required", "model", None, "give one of model=, codec= and pairs=")
        if len(given) > 1:
            expected = f"excludes {given[0]}: give one of model=, codec= and pairs="
            raise ConfigError("conflict", given[1], getattr(self, given[1]), expected)
        if self.data is None and self.pairs is None:
            raise ConfigError("required", "data", None, "give audio to measure on, as data=<folder>")
        if self.data is not None and self.pairs is not None:
            raise ConfigError("conflict", "data", self.data, "has no effect with pairs=")
        for key in ("weights", "code"):
            if self.codec is None and getattr(self, key) is not None:
                raise ConfigError("conflict", key, getattr(self, key), "has no effect without codec=")


class ExportConfig(Section):
    """A checkpoint to a Hugging Face folder or to ONNX graphs."""

    checkpoint: PathText
    out: PathText
    format: Literal["huggingface", "onnx"] = "huggingface"
    weights: Literal["float32", "int8"] = "float32"
    chunk_frames: Count = 8
    select: Literal["newest", "best"] = "newest"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    with_training_state: bool = False
    ema: bool = False
    part: Literal["encoder", "decoder"] | None = None
    licence: str | None = None
    language: list[str] = field(default_factory=list)
    data: str | None = None
    level_db: float | None = None
    evaluation: PathText | None = None
    heldout: PathText | None = None
    push: str | None = None
    private: bool = True


class InspectConfig(Section):
    """Checks of packed folders."""

    shards: list[PathText]
    out: PathText
    silent_db: float = -60.0
    clipped_fraction: Fraction = 0.01
    max_characters_per_second: Positive = 40.0
    num_workers: Count | None = None


class DoctorConfig(Section):
    """Checks of a machine."""

    run_directory: PathText = "runs"
    min_free_disk_gb: NonNegativeFloat = 25.0


COMMANDS: dict[str, type[Section]] = {
    "decode": DecodeConfig,
    "doctor": DoctorConfig,
    "encode": EncodeConfig,
    "estimate": EstimateConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "fit": FitConfig,
    "inspect": InspectConfig,
    "pack": PackConfig,
}
