"""The configuration of `fit` and `estimate`, section by section.

To add a key, add a field here (or in `recipe_schema`, if it belongs to the recipe) and a line with a comment to
`configs/fit.yaml`; a test compares both. Its default has to be the behaviour of runs that were started without the key.
"""

from dataclasses import field
from typing import Annotated, Literal

from moss_train.config.recipe_schema import (
    EmaConfig,
    ObjectiveConfig,
    OptimizersConfig,
    Part,
    StageConfig,
    TokenizerConfig,
    check_trainable,
)
from moss_train.config.section import (
    AboveZero,
    BelowOne,
    Count,
    Fraction,
    Node,
    NonNegative,
    NonNegativeFloat,
    PathText,
    Positive,
    Section,
    Texts,
    at_least,
    within,
)
from moss_train.utils.errors import ConfigError

Network = Literal["semantic", "discriminators"]
ValidationMetric = Literal[
    "stoi", "pesq", "spectral", "si_sdr", "pitch", "buzz", "pulses", "recognition", "dnsmos", "distillmos"
]


class LoggingConfig(Section):
    """How often metrics are logged, and the peak speed of the device for MFU."""

    every_updates: Count = 10
    window_updates: Count = 100
    log_gradient_shares_every: Count | None = 100
    peak_tflops: Positive | None = None


class ValidationConfig(Section):
    """Held-out audio, the metrics computed on it, and samples to listen to."""

    data: list[PathText] | None = None
    every_updates: Count = 1000
    max_clips: Count = 64
    num_quantizers: list[Count] | None = None
    metrics: list[ValidationMetric | Node] = field(default_factory=list)
    metrics_clips: Count = 8
    samples_every_updates: Count = 5000
    samples_clips: Count | None = 4


class HealthConfig(Section):
    """Limits beyond which a run gives a warning, applied to the last `window_updates` updates together."""

    window_updates: Annotated[int, at_least(10)] = 200
    ignore_first_updates: NonNegative = 1000
    min_codebook_use: NonNegativeFloat = 0.02
    max_discriminator_margin: NonNegativeFloat = 0.95
    min_discriminator_margin: NonNegativeFloat = 0.02
    min_gradient_share: NonNegativeFloat = 0.01
    max_gradient_growth: NonNegativeFloat = 10.0
    max_data_wait: NonNegativeFloat = 0.25
    max_checkpoint_time: NonNegativeFloat = 0.1


class DataConfig(Section):
    """The training data, and how clips are cropped, mixed and scaled."""

    train: list[PathText] = field(default_factory=list)
    path: PathText | None = None
    cache: PathText | None = None
    domain: str = "speech"
    heldout_fraction: BelowOne = 0.02
    weights: dict[str, NonNegativeFloat] | None = None
    crop_seconds: Positive = 12.0
    max_seconds: Positive = 30.0
    max_text_tokens: Count | None = 2048
    micro_batch_seconds: Positive = 160.0
    min_length_ratio: AboveZero = 0.7
    peak: AboveZero | None = None
    loudness_lufs: Annotated[float, within(-70, 0)] | None = None
    gain_db: list[Annotated[float, within(-60, 60)]] | None = None
    max_invalid_fraction: Fraction = 0.01
    num_workers: NonNegative = 2

    def check(self) -> None:
        if self.crop_seconds > self.max_seconds:
            expected = f"has to be at most max_seconds={self.max_seconds:g}"
            raise ConfigError("conflict", "crop_seconds", self.crop_seconds, expected)
        if self.crop_seconds > self.micro_batch_seconds:
            expected = (
                f"is less than the longest clip, crop_seconds={self.crop_seconds:g}: raise it, or lower crop_seconds"
            )
            raise ConfigError("conflict", "micro_batch_seconds", self.micro_batch_seconds, expected)
        if self.gain_db is not None and not (len(self.gain_db) == 2 and self.gain_db[0] <= self.gain_db[1]):
            raise ConfigError("value", "gain_db", self.gain_db, "[lowest, highest], or null")
        if self.peak is not None and self.loudness_lufs is not None:
            raise ConfigError("conflict", "peak", self.peak, f"excludes loudness_lufs={self.loudness_lufs:g}")
        if self.path is not None and self.train:
            expected = "excludes data.train: give a folder of audio, or packed folders"
            raise ConfigError("conflict", "path", self.path, expected)


class TrainerConfig(Section):
    """Devices, processes and number formats."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: Literal["auto"] | Count = "auto"
    num_nodes: Literal["auto"] | Count = "auto"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    timeout_seconds: Positive = 1800.0
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    activation_checkpointing: list[Positive] = field(default_factory=list)
    compile: bool | str = "auto"
    deterministic: bool = False
    num_threads: Count | None = None

    def check(self) -> None:
        if isinstance(self.compile, str) and self.compile not in ("auto", *compile_backends()):
            expected = f"auto, true, false or a backend of torch: {', '.join(compile_backends())}"
            raise ConfigError("value", "compile", self.compile, expected)


def compile_backends() -> tuple[str, ...]:
    """Return the names that `torch.compile` takes as a backend, without importing torch; a test compares them."""
    from importlib.metadata import entry_points

    installed = (point.name for point in entry_points(group="torch_dynamo_backends"))
    return (*_COMPILE_BACKENDS, *installed)


_COMPILE_BACKENDS = (
    "inductor",
    "eager",
    "aot_eager",
    "aot_eager_decomp_partition",
    "aot_eager_default_partitioner",
    "aot_ts",
    "ts",
    "cudagraphs",
    "eager_noexcept",
    "eager_debug",
    "pre_dispatch_eager",
    "openxla",
    "openxla_eval",
    "tvm",
    "onnxrt",
)


class CheckpointConfig(Section):
    """When checkpoints are written and which of them stay."""

    every_updates: Count = 1000
    keep_last: Annotated[int, at_least(2)] = 2
    keep_every_updates: Count | None = None
    background: bool = False
    monitor: str | None = "mel_distance"

    def check(self) -> None:
        archived = self.keep_every_updates
        if archived is not None and archived % self.every_updates:
            expected = f"has to be a multiple of every_updates={self.every_updates}"
            raise ConfigError("conflict", "keep_every_updates", archived, expected)


class FitConfig(Section):
    """A whole run."""

    experiment_name: str
    run_dir: PathText
    name: str = "default"
    seed: NonNegative = 0
    init: PathText | None = None
    restore: list[Network] = field(default_factory=lambda: ["semantic", "discriminators"])
    new_module_warmup_updates: NonNegative = 0
    max_updates: NonNegative | None = None
    allow_config_changes: bool = False
    max_skipped_updates: Count = 3
    wandb: Literal["auto", "online", "offline"] | None = "auto"
    tensorboard: bool = False
    plugins: list[str] = field(default_factory=list)
    callbacks: list[Node] = field(default_factory=list)
    loggers: list[Node] = field(default_factory=list)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    tokenizer: TokenizerConfig | None = None
    semantic: Annotated[Node | None, Texts(("pretrained", "text.path"))] = None
    discriminators: list[Node] = field(default_factory=list)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizers: OptimizersConfig = field(default_factory=OptimizersConfig)
    ema: EmaConfig | None = None
    trainable: list[Part] = field(default_factory=lambda: ["encoder", "quantizer", "decoder", "semantic"])
    stages: list[StageConfig] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def check(self) -> None:
        check_trainable(self.trainable)
        for number, stage in enumerate(self.stages):
            if stage.adversarial and not self.discriminators:
                expected = "needs discriminators, and there are none"
                raise ConfigError("conflict", f"stages.{number}.adversarial", True, expected)
            if not stage.quantize and stage.updates:
                self._check_continuous_stage(number, stage)
            self.objective.check_terms(f"stages.{number}.weights", stage.weights)

    def _check_continuous_stage(self, number: int, stage: StageConfig) -> None:
        """Raise ConfigError for a stage without quantizer after which the levels cannot or must not be fitted."""
        expected = ""
        if not any(later.quantize and later.updates for later in self.stages[number + 1 :]):
            expected = "needs a later stage that quantizes, before which the levels are fitted to data"
        elif "quantizer" not in (self.trainable if stage.trainable is None else stage.trainable):
            expected = f"changes the codes, and trainable leaves the quantizer out: set stages.{number}.updates=0"
        if expected:
            raise ConfigError("conflict", f"stages.{number}.quantize", False, expected)


GpuName = Literal["h100", "h100_pcie", "h100_nvl", "h200", "h200_nvl", "b200", "a100", "a100_40gb", "l40s", "rtx4090"]


class EstimateConfig(FitConfig):
    """A run and the machines that it would use."""

    gpu: GpuName = "h100"
    gpus: Count = 8
    mfu: AboveZero | PathText = 0.3
    text_fraction: Fraction = 0.3
    text_tokens_per_second: NonNegativeFloat = 15.0
    allreduce_gb_per_second: Positive = 300.0
    scaling: PathText | None = None
