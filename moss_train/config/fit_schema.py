"""The configuration of `fit` and `estimate`, section by section.

A new key is a field here and a line with a comment in `configs/fit.yaml`; a test compares both. Its default is what
runs do that began without the key. Keys of list entries, which `fit.yaml` does not show, have their comments here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from moss_train.config.section import (
    Count,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    PathText,
    Positive,
    Rule,
    Section,
    Texts,
    at_least,
    nearest,
    within,
)
from moss_train.utils.errors import ConfigError

Part = Literal["encoder", "quantizer", "decoder", "semantic"]
Network = Literal["semantic", "discriminators"]
ValidationMetric = Literal["stoi", "pesq", "spectral", "si_sdr", "pitch", "buzz", "recognition", "dnsmos"]
Node = dict[str, Any]
"""A `_target_` with its arguments, which only the class itself can check."""
BelowOne = Annotated[float, Rule("at least 0 and below 1", lambda value: 0 <= value < 1)]
AboveZero = Annotated[float, Rule("above 0 and at most 1", lambda value: 0 < value <= 1)]


class LoggingConfig(Section):
    """How often numbers are written, and what they are compared with."""

    every_updates: Count = 10
    window_updates: Count = 100
    log_gradient_shares_every: Count | None = 100
    peak_tflops: Positive | None = None


class ValidationConfig(Section):
    """Held-out audio, the scores taken on it, and samples to hear."""

    data: list[PathText] | None = None
    every_updates: Count = 1000
    max_clips: Count = 64
    num_quantizers: list[Count] | None = None
    metrics: list[ValidationMetric | Node] = field(default_factory=list)
    metrics_clips: Count = 8
    samples_every_updates: Count = 5000
    samples_clips: Count | None = 4


class HealthConfig(Section):
    """Limits beyond which a run gets a warning; all of them hold over `window_updates`."""

    window_updates: Annotated[int, at_least(10)] = 200
    ignore_first_updates: NonNegative = 1000
    min_codebook_use: NonNegativeFloat = 0.02
    max_discriminator_margin: NonNegativeFloat = 0.95
    min_discriminator_margin: NonNegativeFloat = 0.02
    min_gradient_share: NonNegativeFloat = 0.01
    max_gradient_growth: NonNegativeFloat = 10.0
    max_data_wait: NonNegativeFloat = 0.25
    max_checkpoint_time: NonNegativeFloat = 0.1


class TokenizerStageConfig(Section):
    """One stage of the encoder; the decoder mirrors it."""

    omits_null: ClassVar[bool] = True

    patch_size: Count  # samples or frames that become one frame
    output_dimension: Count  # width of the stage's output
    d_model: Count  # width of its transformer
    num_heads: Count  # attention heads; d_model is an even multiple of it
    num_layers: Count  # transformer blocks
    dim_feedforward: Count | None = None  # width of the feed-forward layers; null: 4 x d_model
    context_duration: Positive | None = None  # attention window in seconds; null: tokenizer.context_seconds


class QuantizerConfig(Section):
    """The residual vector quantizer."""

    omits_null: ClassVar[bool] = True

    rvq_dim: Count  # width of the vectors that the levels quantize in turn
    num_quantizers: Count  # levels
    codebook_size: Count  # codes per level
    codebook_dim: Count  # width of a codebook vector
    quantizer_type: Literal["rlfq"] | None = None  # the only kind there is


class TokenizerConfig(Section):
    """The architecture; beside `init`, what changes of it."""

    omits_null: ClassVar[bool] = True

    sampling_rate: Count | None = None  # Hz
    output_sampling_rate: Count | None = None  # Hz, of the decoder, a multiple; null: the encoder's, or as in init
    number_channels: Count | None = None  # 1 or 2; null: 1, or as in init
    stages: list[TokenizerStageConfig] | None = None  # of the encoder, in order; null: as in init
    quantizer: QuantizerConfig | None = None
    context_seconds: Positive | None = None  # attention window of every stage; null: 10
    layer_scale: Positive | None = None  # initial scale of every residual branch; null: 0.01
    patch_sizes: list[Count] | None = None  # with init: the stages' patch sizes, in place of those of init
    num_quantizers: Count | None = None  # with init: levels, in place of those of init


# The published weights; what is not published is off.
WEIGHTS: dict[str, float | None] = {
    "semantic": 20.0,
    "reconstruction": 15.0,
    "commitment": 0.25,
    "codebook": 1.0,
    "adversarial": 1.0,
    "feature": 2.0,
    "mid_side": None,
    "complex_stft": 0.0,
    "waveform": 0.0,
    "relative_error": 0.0,
}
ADVERSARIAL_TERMS = ("adversarial", "feature")
# The losses that always have a name; `objective.losses` changes their arguments, replaces them or adds others.
LOSSES: dict[str, dict[str, Any]] = {
    "reconstruction": {"_target_": "moss_train.losses.MultiScaleMelLoss"},
    "commitment": {"_target_": "moss_train.losses.CommitmentLoss"},
    "codebook": {"_target_": "moss_train.losses.CodebookLoss"},
    "adversarial": {"_target_": "moss_train.losses.LeastSquaresLoss"},
    "feature": {"_target_": "moss_train.losses.FeatureMatchingLoss"},
    "mid_side": {"_target_": "moss_train.losses.MidSideLoss"},
    "complex_stft": {"_target_": "moss_train.losses.ComplexSTFTLoss"},
    "waveform": {"_target_": "moss_train.losses.WaveformLoss"},
    "relative_error": {"_target_": "moss_train.losses.RelativeSquaredErrorLoss"},
}


class ObjectiveConfig(Section):
    """What is minimised."""

    quantizer_dropout: Fraction = 1.0
    discriminator_crop_seconds: Positive = 1.0
    adversarial_reduction: Literal["mean", "sum"] = "mean"
    feature_reduction: Literal["relative_mean", "absolute_sum"] = "relative_mean"
    balance: dict[str, NonNegativeFloat] | None = None
    weights: dict[str, NonNegativeFloat | None] = field(default_factory=lambda: dict(WEIGHTS))
    losses: dict[str, Node | None] = field(default_factory=lambda: dict(LOSSES))

    def check(self) -> None:
        for term, weight in self.weights.items():
            if weight is None and WEIGHTS.get(term, 0.0) is not None:
                raise ConfigError("value", f"weights.{term}", None, "a number; 0 leaves the term out")
        for term, node in self.losses.items():
            if term in WEIGHTS and node is not None and "weight" in node:
                expected = f"has no effect: set objective.weights.{term}"
                raise ConfigError("conflict", f"losses.{term}.weight", node["weight"], expected)
        removed = {term for term, node in self.losses.items() if node is None}
        weights = {term: weight for term, weight in {**WEIGHTS, **self.weights}.items() if term not in removed}
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "losses", {**LOSSES, **self.losses})
        self.check_terms("weights", self.weights)
        self.check_terms("balance", self.balance or {})

    def check_terms(self, path: str, values: Mapping[str, float | None]) -> None:
        """Raise ConfigError for the first name that is no term of the objective."""
        known = [term for term in {**WEIGHTS, **self.losses} if self.losses.get(term, {}) is not None]
        for term, value in values.items():
            if term not in known:
                raise ConfigError("unknown_key", f"{path}.{term}", value, nearest(term, known))


class RateScales(Section):
    """Factors on the learning rate of the parts."""

    encoder: Positive = 1.0
    quantizer: Positive = 1.0
    decoder: Positive = 1.0
    semantic: Positive = 1.0


class DecayScales(Section):
    """Factors on the weight decay of the parts."""

    encoder: NonNegativeFloat = 1.0
    quantizer: NonNegativeFloat = 1.0
    decoder: NonNegativeFloat = 1.0
    semantic: NonNegativeFloat = 1.0


class OptimizerConfig(Section):
    """AdamW and gradient clipping of one side; the learning rate belongs to the stages."""

    betas: list[BelowOne] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: NonNegativeFloat = 0.01
    eps: Positive = 1.0e-8
    clip_norm: Annotated[float, Rule("above 0", lambda value: value > 0)] = 1.0

    def check(self) -> None:
        if len(self.betas) != 2:
            raise ConfigError("value", "betas", self.betas, "two numbers, as [0.9, 0.95]")


class GeneratorOptimizerConfig(OptimizerConfig):
    """The optimizer of encoder, quantizer, decoder and text LM."""

    learning_rate_scale: RateScales = field(default_factory=RateScales)
    weight_decay_scale: DecayScales = field(default_factory=DecayScales)


class DiscriminatorOptimizerConfig(OptimizerConfig):
    """The optimizer of the discriminators."""

    betas: list[BelowOne] = field(default_factory=lambda: [0.8, 0.99])
    weight_decay: NonNegativeFloat = 0.0


class OptimizersConfig(Section):
    """One optimizer for each side."""

    generator: GeneratorOptimizerConfig = field(default_factory=GeneratorOptimizerConfig)
    discriminators: DiscriminatorOptimizerConfig = field(default_factory=DiscriminatorOptimizerConfig)


class EmaConfig(Section):
    """The moving average of the tokenizer's weights."""

    decay: BelowOne  # per update


class StageConfig(Section):
    """One stage of the training."""

    name: str  # for logs and charts
    updates: NonNegative  # generator updates in this stage
    batch_seconds: Positive  # audio per update over all GPUs together
    adversarial: bool = False  # discriminators are trained and take part in the loss
    learning_rate: Positive = 1e-4  # peak, of encoder, quantizer, decoder and text LM
    final_learning_rate: NonNegativeFloat = 1e-5  # at the end of the stage
    discriminator_learning_rate: Positive = 1e-4  # peak; it follows the same curve
    warmup_updates: NonNegative = 2000  # linear warm-up of the rates at the start of the stage
    discriminator_warmup_updates: NonNegative = 0  # at first the discriminators do not act on the generator
    adversarial_ramp_updates: NonNegative = 0  # after that the adversarial weights rise from 0 over so many updates
    semantic_warmup_updates: NonNegative = 0  # at first the text LM learns without a gradient into the tokenizer
    discriminator_every: Count = 1  # the discriminators learn in every n-th update
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warm-up: cosine, or the peak with a decay at the end
    decay_fraction: AboveZero = 0.2  # of the updates, length of that decay
    trainable: list[Part] | None = None  # parts that learn; null: those of the run (trainable)
    weights: dict[str, float] = field(default_factory=dict)  # loss weights that differ in this stage
    quantize: bool = True  # false: learns with the continuous latent; then the levels are fitted to data

    def check(self) -> None:
        check_trainable(self.trainable)


def check_trainable(parts: Sequence[str] | None) -> None:
    """Raise ConfigError for a list without any part of the tokenizer."""
    if parts is not None and not set(parts) & {"encoder", "quantizer", "decoder"}:
        raise ConfigError("value", "trainable", parts, "a list with encoder, quantizer or decoder among others")


class DataConfig(Section):
    """What is learned from, and how clips are cut, mixed and scaled."""

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
    """A run and the machines it would have."""

    gpu: GpuName = "h100"
    gpus: Count = 8
    mfu: AboveZero | PathText = 0.3
    text_fraction: Fraction = 0.3
    text_tokens_per_second: NonNegativeFloat = 15.0
    allreduce_gb_per_second: Positive = 300.0
    scaling: PathText | None = None
