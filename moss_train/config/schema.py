"""The configuration classes of all commands (`fit` and `estimate`: see `fit_schema`), and the check of their inputs."""

from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from moss_train.config.fit_schema import EstimateConfig, FitConfig
from moss_train.config.section import (
    AboveZero,
    Count,
    Fraction,
    Node,
    NonNegative,
    NonNegativeFloat,
    PathText,
    Positive,
    Section,
    at_least,
    within,
)
from moss_train.utils.errors import ConfigError, UserError
from moss_train.utils.hub import check_model_name, is_path_like

EvaluationMetric = Literal[
    "text_model",
    "stoi",
    "pesq",
    "spectral",
    "si_sdr",
    "pitch",
    "buzz",
    "pulses",
    "speaker",
    "recognition",
    "dnsmos",
    "distillmos",
]
Codec = Literal[
    "encodec", "dac", "mimi", "higgs", "xcodec2", "speechtokenizer", "bigcodec", "qwen3_tts", "mimo", "xy_tokenizer"
]


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
    loudness: float | None = None
    peak: AboveZero | None = None
    batch_seconds: Positive = 120.0
    precision: Literal["fp32", "bf16"] | None = None
    device: list[str] = field(default_factory=lambda: ["auto"])

    def check(self) -> None:
        if (self.input is None) == (self.shards is None):
            expected = "give either audio (input=) or a folder that pack made (shards=)"
            if self.input is None:
                raise ConfigError("required", "input", None, expected)
            raise ConfigError("conflict", "shards", self.shards, f"excludes input: {expected}")
        if self.peak is not None and self.loudness is not None:
            raise ConfigError("conflict", "peak", self.peak, f"excludes loudness={self.loudness:g}")
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
    """Evaluation of a codec."""

    out: PathText
    model: PathText | None = None
    codec: Codec | None = None
    pairs: PathText | None = None
    weights: PathText | None = None
    code_dir: PathText | None = None
    data: list[PathText] | None = None
    num_quantizers: list[Count] | None = None
    domain: str = "speech"
    max_clips: Count | None = None
    clip_seconds: Annotated[float, at_least(0.1)] | None = None
    peak: AboveZero | None = None
    seed: NonNegative = 0
    profile: Literal["official", "dac24k", "full48k"] = "official"
    metrics: list[EvaluationMetric | Node] = field(
        default_factory=lambda: [name for name in get_args(EvaluationMetric) if "mos" not in name]
    )
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
        if self.peak is not None and self.pairs is not None:
            raise ConfigError("conflict", "peak", self.peak, "has no effect with pairs=")
        for key in ("weights", "code_dir"):
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
    ema: bool | None = None
    part: Literal["encoder", "decoder"] | None = None
    licence: str | None = None
    language: list[str] = field(default_factory=list)
    data: str | None = None
    level_db: Annotated[float, within(-100, 0)] | None = None
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

    run_dir: PathText = "runs"
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


AUDIO = ": give a folder of audio files or a .jsonl manifest"
SHARDS = ": give folders that `moss_train pack` made"
PATH_KEYS = {
    "data.train": SHARDS,
    "data.path": AUDIO,
    "validation.data": AUDIO,
    "semantic.pretrained": "",
    "semantic.text.path": "",
    "input": AUDIO,
    "shards": SHARDS,
    "data": AUDIO,
    "pairs": "",
    "drop": "",
}
"""Keys that name existing files or folders, and the advice if they do not exist."""
REMOTE_KEYS = ((FitConfig, "data.train"), (InspectConfig, "shards"))
"""Those keys whose values may also be addresses on servers."""


def check_inputs(config: Section) -> None:
    """Raise ConfigError if an input of a command does not exist, or a required one is not given.

    A run that has started keeps copies of what it was started from, so the originals may be gone.
    """
    if isinstance(config, FitConfig):
        if not config.stages:
            raise ConfigError("required", "stages", None, "a run needs one or more")
        has_architecture = config.tokenizer is not None and config.tokenizer.stages is not None
        if config.init is None and not has_architecture:
            raise ConfigError("required", "tokenizer.stages", None, "choose an experiment, or give init=<model>")
        if config.init is not None and has_architecture:
            expected = (
                "excludes tokenizer.stages, the architecture comes with init: use experiment=finetune or tokenizer=null"
            )
            raise ConfigError("conflict", "init", config.init, expected)
        if not isinstance(config, EstimateConfig) and Path(config.run_dir, "checkpoints").exists():
            return
    for key in ("init", "checkpoint", "model"):  # these keys name a model; `checkpoint` is a section in `fit`
        for name in _texts(config, key):
            try:
                check_model_name(name)
            except UserError as error:
                raise ConfigError("missing", key, name, str(error).partition(" does not exist")[2]) from error
    if isinstance(config, EstimateConfig):
        return  # it reads no data
    for key in PATH_KEYS:
        if key == "data" and isinstance(config, ExportConfig):
            continue  # there it is a sentence for the model card
        for name in _texts(config, key):
            if "://" in name and (type(config), key) not in REMOTE_KEYS:
                raise ConfigError("conflict", key, name, "is an address: only data.train and inspect read from servers")
            may_be_elsewhere = "://" in name or (key.startswith("semantic.") and not is_path_like(name))
            if not may_be_elsewhere and not Path(name).expanduser().exists():
                raise ConfigError("missing", key, name, PATH_KEYS[key])
    if isinstance(config, FitConfig) and not config.data.train and config.data.path is None:
        expected = (
            "give the folders that `moss_train pack` made, as data.train=/my/shards, or a folder of audio files, as "
            "data.path=/my/audio"
        )
        raise ConfigError("required", "data.train", None, expected)


def _texts(config: Any, key: str) -> Iterator[str]:
    """Yield the texts under a dotted key: one, several of a list, or none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    yield from (value for value in (config if isinstance(config, list) else [config]) if isinstance(value, str))
