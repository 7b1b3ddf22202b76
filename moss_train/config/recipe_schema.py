"""What a run trains and how: tokenizer, objective, optimizers, moving average and stages.

Keys of list entries, which `configs/fit.yaml` does not show, have their comments here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from moss_train.config.section import (
    AboveZero,
    BelowOne,
    Count,
    Fraction,
    Node,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Rule,
    Section,
    nearest,
)
from moss_train.utils.errors import ConfigError

Part = Literal["encoder", "quantizer", "decoder", "semantic"]


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
    """The architecture; together with `init`, only the changes to it."""

    omits_null: ClassVar[bool] = True

    sampling_rate: Count | None = None  # Hz
    output_sampling_rate: Count | None = None  # decoder's Hz, a multiple of the encoder's; null: equal, or as in init
    number_channels: Count | None = None  # 1 or 2; null: 1, or as in init
    stages: list[TokenizerStageConfig] | None = None  # of the encoder, in order; null: as in init
    quantizer: QuantizerConfig | None = None
    context_seconds: Positive | None = None  # attention window of every stage; null: 10
    layer_scale: Positive | None = None  # initial scale of every residual branch; null: 0.01
    patch_sizes: list[Count] | None = None  # with init: the stages' patch sizes, in place of those of init
    num_quantizers: Count | None = None  # with init: levels, in place of those of init


# The published loss weights; terms without a published weight are off.
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
# The built-in losses by name; `objective.losses` changes their arguments, replaces them or adds others.
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
    """The loss that is minimised."""

    quantizer_dropout: Fraction = 1.0
    discriminator_crop_seconds: Positive = 1.0
    discriminator_pre_emphasis: Fraction = 0.0
    discriminator_unit_rms: bool = False
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
        """Raise ConfigError for the first name that is not a term of the objective."""
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
    """AdamW and gradient clipping of one side; the learning rate is set by the stages."""

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
    """One optimizer for the generator, one for the discriminators."""

    generator: GeneratorOptimizerConfig = field(default_factory=GeneratorOptimizerConfig)
    discriminators: DiscriminatorOptimizerConfig = field(default_factory=DiscriminatorOptimizerConfig)


class EmaConfig(Section):
    """The moving average of the tokenizer's weights."""

    decay: BelowOne  # per update


class StageConfig(Section):
    """One stage of the training."""

    name: str  # for logs and charts
    updates: NonNegative  # generator updates in this stage
    batch_seconds: Positive  # seconds of audio per update, all GPUs together
    adversarial: bool = False  # discriminators are trained and take part in the loss
    learning_rate: Positive = 1e-4  # peak, of encoder, quantizer, decoder and text LM
    final_learning_rate: NonNegativeFloat = 1e-5  # at the end of the stage
    discriminator_learning_rate: Positive = 1e-4  # peak; it follows the same curve
    warmup_updates: NonNegative = 2000  # linear warm-up of the rates at the start of the stage
    discriminator_warmup_updates: NonNegative = 0  # first updates in which discriminators do not act on the generator
    adversarial_ramp_updates: NonNegative = 0  # updates after that over which the adversarial weights rise from 0
    semantic_warmup_updates: NonNegative = 0  # first updates in which the text LM passes no gradient to the tokenizer
    discriminator_every: Count = 1  # the discriminators are trained in every n-th update
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warm-up: cosine, or the peak with a decay at the end
    decay_fraction: AboveZero = 0.2  # length of that decay, as a fraction of the updates
    trainable: list[Part] | None = None  # parts that are trained; null: those of the run (trainable)
    weights: dict[str, NonNegativeFloat] = field(default_factory=dict)  # loss weights that differ in this stage
    quantize: bool = True  # false: trains with the continuous latent; afterwards the levels are fitted to data

    def check(self) -> None:
        check_trainable(self.trainable)


def check_trainable(parts: Sequence[str] | None) -> None:
    """Raise ConfigError for a list without any part of the tokenizer."""
    if parts is not None and not set(parts) & {"encoder", "quantizer", "decoder"}:
        raise ConfigError("value", "trainable", parts, "a list with encoder, quantizer or decoder among others")
