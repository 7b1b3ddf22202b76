"""Sizes of the published models, expansion of run configurations, and what is refused."""

from pathlib import Path

import pytest
import torch
import yaml

from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel

from .small_models import QUANTIZER, RATE, STAGES, small_config, small_model

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiment"


def tokenizer_settings(name):
    """Return the tokenizer settings of an experiment, including those inherited from its defaults."""
    content = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text("utf-8"))
    settings, own = {}, content.get("tokenizer", {})
    for base in content.get("defaults", []):
        if base != "_self_":
            settings |= tokenizer_settings(base)
    return {**settings, **own, "quantizer": {**settings.get("quantizer", {}), **own.get("quantizer", {})}}


def counts(name):
    with torch.device("meta"):
        model = MossAudioTokenizerModel(MossAudioTokenizerConfig.from_stages(**tokenizer_settings(name)))
    parts = (model.encoder, model.quantizer, model.decoder)
    return [sum(parameter.numel() for parameter in part.parameters()) for part in parts]


def test_published_model():
    assert counts("cat_1b6") == [886_609_920, 1_346_560, 886_609_920]
    assert sum(counts("cat_1b6")) == 1_774_566_400


@pytest.mark.parametrize(
    ("width", "expected"), [(256, 319_557_632), (384, 505_485_312), (512, 710_418_432), (768, 1_169_043_456)]
)
def test_scaling_ladder(width, expected):
    encoder, _, decoder = counts(f"cat_ladder_{width}")
    assert encoder + decoder == expected


def test_nano():
    assert sum(counts("cat_nano")) == 21_969_664
    config = MossAudioTokenizerConfig.from_stages(**tokenizer_settings("cat_nano"))
    assert (config.sampling_rate, config.number_channels, config.downsample_rate) == (48000, 2, 3840)
    assert config.frame_rate == 12.5
    assert config.num_quantizers == 16


def test_windows_follow_the_rate_of_the_stage():
    with torch.device("meta"):
        model = MossAudioTokenizerModel(MossAudioTokenizerConfig.from_stages(**tokenizer_settings("cat_1b6")))
    assert [stage.window for stage in model.stages(model.encoder)] == [1000, 500, 250, 125]
    assert [stage.window for stage in model.stages(model.decoder)] == [125, 250, 500, 1000]
    stereo = small_model(number_channels=2)
    assert [stage.window for stage in stereo.stages(stereo.encoder)] == [64, 32, 16]


def test_window_of_one_stage_can_differ():
    stages = [{**STAGES[0], "context_duration": 0.2}, *STAGES[1:]]
    model = MossAudioTokenizerModel(small_config(stages=stages))
    assert [stage.window for stage in model.stages(model.encoder)] == [8, 16, 8]
    assert [stage.window for stage in model.stages(model.decoder)] == [8, 16, 8]


def test_second_version_of_the_published_model():
    """48 kHz stereo and six stages, each with its own window."""
    sizes = {"d_model": 768, "num_heads": 12, "num_layers": 12, "output_dimension": 384}
    last = {"d_model": 1280, "num_heads": 20, "num_layers": 32, "output_dimension": 768}
    patches, seconds = (240, 2, 2, 2, 2, 2), (1.0, 2.0, 4.0, 8.0, 10.0, 10.0)
    stages = [
        {**(last if number == 5 else sizes), "patch_size": patch, "context_duration": context}
        for number, (patch, context) in enumerate(zip(patches, seconds, strict=True))
    ]
    quantizer = {"rvq_dim": 512, "num_quantizers": 32, "codebook_size": 1024, "codebook_dim": 8}
    config = MossAudioTokenizerConfig.from_stages(48000, stages, quantizer, number_channels=2)
    assert (config.downsample_rate, config.frame_rate) == (3840, 12.5)
    with torch.device("meta"):
        model = MossAudioTokenizerModel(config)
    assert 2.0e9 < sum(parameter.numel() for parameter in model.parameters()) < 2.2e9
    assert [stage.window for stage in model.stages(model.encoder)] == [400, 400, 400, 400, 250, 125]
    assert [stage.window for stage in model.stages(model.decoder)] == [125, 250, 400, 400, 400, 400]


def test_configuration_survives_saving(tmp_path):
    config = small_config(number_channels=2)
    config.save_pretrained(tmp_path)
    loaded = MossAudioTokenizerConfig.from_pretrained(tmp_path)
    for key in ("encoder_kwargs", "decoder_kwargs", "quantizer_kwargs", "downsample_rate", "number_channels"):
        assert getattr(loaded, key) == getattr(config, key)
    assert loaded.enable_channel_interleave is True


def test_the_rate_may_be_given_by_its_other_name_alone():
    data = small_config().to_dict()
    del data["sampling_rate"]
    config = MossAudioTokenizerConfig(**data)
    assert (config.sampling_rate, config.output_sampling_rate, config.frame_rate) == (RATE, RATE, RATE / 16)


def changed_stage(index, **changes):
    return [{**stage, **changes} if number == index else stage for number, stage in enumerate(STAGES)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": changed_stage(1, d_model=18, num_heads=4)}, "d_model 18 must be an even multiple of num_heads 4"),
        ({"stages": changed_stage(1, d_model=18, num_heads=6)}, "d_model 18 must be an even multiple of num_heads 6"),
        ({"stages": changed_stage(0, depth=3)}, r"unknown keys \['depth'\]"),
        ({"stages": [{"patch_size": 4}]}, r"stages\[0\]: missing keys"),
        ({"stages": changed_stage(0, output_dimension=0)}, "output_dimension"),
        ({"stages": changed_stage(0, num_layers=0)}, "num_layers"),
        ({"stages": changed_stage(0, patch_size=-4)}, "patch_size"),
        ({"stages": changed_stage(0, context_duration=0.01)}, "window"),
        ({"stages": []}, "stages"),
        ({"number_channels": 3}, "number_channels=3"),
        ({"number_channels": 0}, "number_channels"),
        ({"context_seconds": -1.0}, "causal_transformer_context_duration"),
        ({"context_seconds": 0.05}, "window"),
        ({"sampling_rate": 0}, "sampling_rate"),
        ({"quantizer": {"rvq_dim": 8}}, "quantizer_kwargs lacks codebook_dim, codebook_size, num_quantizers"),
        ({"quantizer": {**QUANTIZER, "quantizer_type": "rvq"}}, "quantizer_type='rvq'"),
        ({"quantizer": {**QUANTIZER, "num_quantizers": 0}}, "num_quantizers"),
        ({"quantizer": {**QUANTIZER, "typo": 1}}, "typo"),
        ({"quantizer": {**QUANTIZER, "codebook_dim": QUANTIZER["rvq_dim"]}}, "rvq_dim and codebook_dim are both 20"),
    ],
)
def test_illegal_stages_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_config(**options)


def changed_entry(name, index, **changes):
    config = small_config().to_dict()
    config[name][index] |= changes
    return config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (small_config().to_dict() | {"downsample_rate": 32}, "multiply to 16, but downsample_rate 32"),
        (small_config(number_channels=2).to_dict() | {"downsample_rate": 16}, "to 16, but downsample_rate 16 x 2"),
        (changed_entry("encoder_kwargs", 1, input_dimension=5), "input_dimension 5 receives 4 channels"),
        (changed_entry("encoder_kwargs", 5, output_dimension=10), "ends with 10 channels, 24 are needed"),
        (changed_entry("decoder_kwargs", 0, output_dimension=33), "33 channels cannot be split into 2"),
        (
            changed_entry("encoder_kwargs", 1, module_type="Conv"),
            "module_type 'Conv' is not one of PatchedPretransform, Transformer",
        ),
        (changed_entry("encoder_kwargs", 1, patch_size=1), "a Transformer has no patch_size"),
        (changed_entry("encoder_kwargs", 0, d_model=4), "a PatchedPretransform has no d_model"),
        (changed_entry("encoder_kwargs", 1, layer_scale=None), "layer_scale must be a positive number, got None"),
        (changed_entry("encoder_kwargs", 1, context_duration=0), "context_duration must be a positive number, got 0"),
        (small_config().to_dict() | {"sampling_rate": 160.5}, "sampling_rate must be a positive int, got 160.5"),
        (small_config().to_dict() | {"decoder_kwargs": "x"}, "decoder_kwargs must be a list of modules, got 'x'"),
        (changed_entry("encoder_kwargs", 1, causal=False), "causal=False is not supported"),
        (changed_entry("encoder_kwargs", 1, positional_embedding="sin"), "positional_embedding='sin'"),
        (changed_entry("encoder_kwargs", 1, gating="silu"), "gating='silu'"),
        (changed_entry("encoder_kwargs", 1, norm="rms_norm"), "norm='rms_norm'"),
        (small_config().to_dict() | {"compute_dtype": "int8"}, "compute_dtype='int8'"),
        (small_config().to_dict() | {"attention_implementation": "magic"}, "attention_implementation='magic'"),
        (small_config(number_channels=2).to_dict() | {"enable_channel_interleave": False}, "enable_channel_interleave"),
        (small_config().to_dict() | {"decoder_kwargs": []}, "decoder_kwargs"),
    ],
)
def test_illegal_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MossAudioTokenizerConfig(**arguments)


def test_empty_configuration_is_refused_by_the_model():
    with pytest.raises(ValueError, match="no encoder_kwargs"):
        MossAudioTokenizerModel(MossAudioTokenizerConfig())


def test_other_rates_need_no_special_case():
    stages = [{**STAGES[0], "patch_size": 5}, {**STAGES[1], "patch_size": 3}, STAGES[2]]
    model = small_model(stages=stages, sampling_rate=8 * RATE)
    assert model.config.frame_rate == pytest.approx(8 * RATE / 30)
    audio = torch.randn(1, 1, 100)
    assert model.decode(model.encode(audio).audio_codes).audio.shape == (1, 1, 120)
