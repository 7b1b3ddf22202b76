import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from moss_train.audio.io import read_audio, resample
from moss_train.cli.main import main
from moss_train.export.load import ModelSource, find_checkpoint, load_tokenizer, open_source
from moss_train.training import CatModule
from moss_train.training.run.fit import fit
from moss_train.training.run.resize_model import WeightReport
from moss_train.training.run.warm_start import RECORD_FILE, InitPlan, initialize, plan_initialization, print_reports
from moss_train.utils.checkpoint import read_payload, weights_under
from moss_train.utils.errors import ConfigError, UserError

CAT_MINI = Path(__file__).parents[2] / "recipes" / "cat_mini"
FIRST, LAST = "encoder.1.input_proj.weight", "decoder.6.output_proj.weight"
NEXT = "encoder.3.input_proj.weight"
# Discriminators with sizes other than in the source run.
OTHER = ["discriminators.0.channels=[3, 5]", "semantic.config.hidden_size=16"]


@pytest.fixture(scope="module")
def source(small_overrides, tmp_path_factory) -> Path:
    """Train a run of the small recipe, with all networks."""
    directory = tmp_path_factory.mktemp("source") / "run"
    updates = ["stages.0.updates=1", "stages.1.updates=2"]
    assert main(["fit", *small_overrides, *updates, f"run_dir={directory}"]) == 0
    return directory


@pytest.fixture(scope="module")
def exported(source) -> Path:
    """Export the tokenizer of that run."""
    out = source.parent / "exported"
    assert main(["export", f"checkpoint={source}", f"out={out}"]) == 0
    return out


def begin(config: dict) -> tuple[CatModule, dict]:
    """Return a module as at the start of a run, and the report about its initial weights."""
    init_plan = plan_initialization(config)
    module = CatModule(**init_plan.arguments)
    return module, initialize(module, init_plan)


def assert_taken(module: torch.nn.Module, weights: dict, names: tuple[str, ...]) -> None:
    own = module.state_dict()
    assert all(torch.equal(own[name], weights[name]) for name in names)


def test_a_run_brings_all_its_networks_with_their_architecture(small_config, source):
    module, reports = begin(small_config(f"init={source}", "tokenizer=null", "seed=7", *OTHER))
    weights = open_source(source).load()
    assert module.discriminators.discriminators[0].layers[0].out_channels == 2
    for name in ("tokenizer", "semantic", "discriminators"):
        report = reports[name]
        assert len(report.loaded) == sum(1 for _ in getattr(module, name).parameters())
        assert (report.resampled, report.new, report.unused) == ((), (), ())
        assert_taken(getattr(module, name), weights[name], report.loaded)
    assert [stage.discriminator_warmup_updates for stage in module.schedule.stages] == [0, 1]


def test_discriminators_that_were_trained_on_other_input_are_named(small_config, source):
    other = (f"init={source}", "tokenizer=null", "objective.discriminator_pre_emphasis=0.97")
    message = "trained with objective.discriminator_pre_emphasis=0.0 and now get input with 0.97"
    with pytest.warns(UserWarning, match=re.escape(message)):
        plan_initialization(small_config(*other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_initialization(small_config(*other[:2]))
        plan_initialization(small_config(*other, "restore=[semantic]"))


def test_an_export_with_training_state_brings_them_too(small_config, source, tmp_path):
    out = tmp_path / "with-state"
    assert main(["export", f"checkpoint={source}", f"out={out}", "with_training_state=true"]) == 0
    assert load_tokenizer(out).config.num_quantizers == 4
    module, reports = begin(small_config(f"init={out}", "tokenizer=null", "seed=7", *OTHER))
    weights = open_source(source).load()
    for name in ("tokenizer", "semantic", "discriminators"):
        assert (reports[name].new, reports[name].unused) == ((), ())
        assert_taken(getattr(module, name), weights[name], reports[name].loaded)


def test_a_run_with_a_moving_average_is_exported_with_it(small_config, source, tmp_path, capsys):
    directory = fit(small_config("ema={decay: 0.5}", "max_updates=2", "stages.0.learning_rate=1e-2")).directory
    content = read_payload(find_checkpoint(directory), mmap=True)
    average, weights = content["ema"]["weights"], weights_under("tokenizer.", content["state_dict"])
    assert not torch.equal(average[LAST], weights[LAST])
    for option, expected in ((None, average), ("true", average), ("false", weights)):
        out = tmp_path / str(option)
        arguments = ["export", f"checkpoint={directory}", f"out={out}", *([f"ema={option}"] if option else [])]
        assert main(arguments) == 0
        assert ("(moving average)" in capsys.readouterr().out) == (option != "false")
        exported = load_tokenizer(out).state_dict()
        assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert torch.equal(load_tokenizer(directory).state_dict()[LAST], average[LAST])  # as encode and evaluate load it
    assert torch.equal(load_tokenizer(directory, ema=False).state_dict()[LAST], weights[LAST])


def test_before_the_first_update_there_is_no_average_to_export(small_config, source, tmp_path, capsys):
    first = fit(small_config("ema={decay: 0.5}", "max_updates=0")).directory
    assert main(["export", f"checkpoint={first}", f"out={tmp_path / 'first'}"]) == 0
    assert main(["export", f"checkpoint={first}", f"out={tmp_path / 'none'}", "ema=true"]) == 2
    assert "has no moving average" in capsys.readouterr().err
    assert main(["export", f"checkpoint={source}", f"out={tmp_path / 'none'}", "ema=true"]) == 2
    assert "has no moving average" in capsys.readouterr().err


def test_networks_that_init_does_not_bring_are_new_and_have_a_warm_up(small_config, exported, capsys):
    config = small_config(f"init={exported}", "tokenizer=null", "new_module_warmup_updates=3", "max_updates=0", *OTHER)
    with pytest.warns(UserWarning, match="newly initialised, init has none; warm-up of 3 updates") as warned:
        directory = fit(config).directory
    assert sum("newly initialised" in str(warning.message) for warning in warned) == 2
    assert "weights from" in capsys.readouterr().err
    record = json.loads((directory / RECORD_FILE).read_text())
    assert record["new_networks"] == ["semantic", "discriminators"]
    init_plan = plan_initialization(config, directory)
    assert init_plan.arguments["discriminators"][0]["channels"] == [3, 5]
    stages = CatModule(**init_plan.arguments).schedule.stages
    assert [(stage.semantic_warmup_updates, stage.discriminator_warmup_updates) for stage in stages] == [(3, 0), (0, 3)]


def test_a_stage_without_updates_has_no_warm_up(small_config, exported):
    config = small_config(f"init={exported}", "tokenizer=null", "new_module_warmup_updates=3", "stages.0.updates=0")
    stages = CatModule(**plan_initialization(config).arguments).schedule.stages
    assert [(stage.semantic_warmup_updates, stage.discriminator_warmup_updates) for stage in stages] == [(0, 0), (3, 3)]


@pytest.mark.parametrize("compute_dtype", ["bf16", "fp16"])
def test_the_precision_of_training_is_not_that_of_inference(finetune_config, exported, tmp_path, compute_dtype):
    """In float16 without a loss scale, gradients would be zero or not finite."""
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    options = json.loads((folder / "config.json").read_text()) | {"compute_dtype": compute_dtype}
    (folder / "config.json").write_text(json.dumps(options))
    plain, half = (begin(finetune_config(f"init={path}"))[0] for path in (exported, folder))
    audio = torch.randn(1, 1, 1920, generator=torch.Generator().manual_seed(0))
    latents = [module.tokenizer.encode_latent(audio) for module in (plain, half)]
    assert torch.equal(*latents)
    assert torch.equal(*(module.tokenizer.decode_latent(latents[0]) for module in (plain, half)))
    assert half.hparams["tokenizer"]["compute_dtype"] == compute_dtype  # an export of the run has it again


def test_weights_are_named_where_only_some_of_a_network_were_kept(capsys):
    source = ModelSource("x", None, {}, dict)
    names = tuple(f"layer.{number}" for number in range(324))
    reports = {
        "tokenizer": WeightReport(loaded=names, resampled=("encoder.1.input_proj.weight",)),
        "semantic": WeightReport(unused=names),
        "discriminators": WeightReport(loaded=names[:1], new=names[1:], unused=names[2:]),
    }
    print_reports(InitPlan({}, source), reports, 3)
    text = capsys.readouterr().err
    assert "tokenizer, resampled: encoder.1.input_proj.weight\n" in text
    assert "discriminators, new: layer.1, layer.2, layer.3, layer.4 and 319 more\n" in text
    assert "semantic," not in text
    assert "discriminators, unused" not in text  # those that did not fit the new networks
    assert "│ semantic       │ 0      │ 0         │ 0   │ 324    │" in text


def test_what_is_configured_away_stays_away_and_restore_chooses(small_config, source):
    config = small_config(f"init={source}", "tokenizer=null", "semantic=null", "restore=[]", *OTHER[:1])
    init_plan = plan_initialization(config)
    assert init_plan.arguments["semantic"] is None
    assert init_plan.arguments["discriminators"][0]["channels"] == [3, 5]
    assert init_plan.new_networks == ("discriminators",)
    with pytest.raises(ConfigError) as caught:
        small_config(f"init={source}", "tokenizer=null", "restore=[decoder]")
    assert (caught.value.kind, caught.value.path) == ("value", "restore.0")


def test_the_head_start_of_the_text_lm_leaves_the_tokenizer_alone(small_config, exported):
    module, _ = begin(small_config(f"init={exported}", "tokenizer=null", "new_module_warmup_updates=3"))
    assert [module.schedule.at(update).text_lm_trains_tokenizer for update in (2, 3, 4)] == [False, True, True]


def test_fine_tuning_the_decoder_moves_nothing_else_and_leaves_the_text_lm_out(small_config, source):
    config = small_config(f"init={source}", "tokenizer=null", "trainable=[decoder]", "max_updates=2")
    with pytest.warns(UserWarning, match="the text LM has no effect and is not built"):
        tuned = load_tokenizer(fit(config).directory).state_dict()
    old = load_tokenizer(source).state_dict()
    assert {name.split(".")[0] for name in old if not torch.equal(tuned[name], old[name])} == {"decoder"}


def test_a_resumed_run_does_not_need_its_init(small_config, source, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    config = small_config(f"init={copy}", "tokenizer=null", "max_updates=1")
    fit(config)
    shutil.rmtree(copy)
    assert fit(config.replace(max_updates=2)).update == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("discriminators.0.channels=[3, 5]", "discriminators[0].channels[0]: 2 -> 3"),
        ("semantic=null", "semantic: "),
        ("restore=[semantic]", "restore: "),
        ("+tokenizer.num_quantizers=3", "tokenizer: "),
    ],
)
def test_a_run_with_init_keeps_its_networks_too(small_config, source, change, named):
    begun = [f"init={source}", "tokenizer=null", "max_updates=0"]
    fit(small_config(*begun))
    with pytest.raises(UserError, match=re.escape(f"its networks cannot change any more: {named}")):
        fit(small_config(*begun, change, "allow_config_changes=true"))
    fit(small_config(*begun, "objective.weights.feature=3", "allow_config_changes=true"))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_with_init_again(small_config, source):
    config = small_config(f"init={source}", "tokenizer=null", "max_updates=0")
    directory = fit(config).directory
    shutil.rmtree(directory / "checkpoints")
    fit(config)
    tuned, old = load_tokenizer(directory), load_tokenizer(source)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), old.parameters(), strict=True))


CHANGED = {
    "a lower rate": (["tokenizer.sampling_rate=16000"], {FIRST, LAST}, set()),
    "a decoder at a higher rate": (["tokenizer.output_sampling_rate=48000"], {LAST}, set()),
    "stereo": (["tokenizer.number_channels=2"], {FIRST, LAST}, set()),
    "stereo at a higher rate": (["tokenizer.sampling_rate=48000", "tokenizer.number_channels=2"], {FIRST, LAST}, set()),
    "another first patch": (["tokenizer.patch_sizes=[120,2,2,2]"], set(), {FIRST, LAST}),
    "another inner patch": (
        ["tokenizer.patch_sizes=[240,4,2,2]"],
        set(),
        {NEXT, "decoder.4.output_proj.weight"},
    ),
    "a rate at the same patches": (
        ["tokenizer.sampling_rate=22050", "tokenizer.patch_sizes=[240,2,2,2]"],
        set(),
        set(),
    ),
}


@pytest.mark.parametrize(("changes", "resampled", "new"), CHANGED.values(), ids=CHANGED)
def test_layers_that_fit_are_kept_bit_by_bit(finetune_config, source, changes, resampled, new):
    module, reports = begin(finetune_config(f"init={source}", *changes))
    report, weights = reports["tokenizer"], open_source(source).load()
    assert set(report.resampled) == resampled
    assert set(report.new) == new
    assert set(report.unused) == new & weights["tokenizer"].keys()  # different shapes, or replacing an identity
    assert len(report.loaded) == sum(1 for _ in module.tokenizer.parameters()) - len(resampled | new)
    assert_taken(module.tokenizer, weights["tokenizer"], report.loaded)


def test_levels_can_be_dropped_and_added(finetune_config, source):
    fewer, reports = begin(finetune_config(f"init={source}", "tokenizer.num_quantizers=2"))
    assert reports["tokenizer"].new == ()
    assert {name.split(".")[2] for name in reports["tokenizer"].unused} == {"2", "3"}
    audio = torch.sin(torch.arange(24000) * 0.05)[None, None]
    expected = load_tokenizer(source).encode(audio, num_quantizers=2).audio_codes
    assert torch.equal(fewer.tokenizer.eval().encode(audio).audio_codes, expected)
    _, reports = begin(finetune_config(f"init={source}", "tokenizer.num_quantizers=5"))
    assert {name.split(".")[2] for name in reports["tokenizer"].new} == {"4"}


def test_stereo_begins_as_the_mono_model_on_both_channels(finetune_config, source):
    stereo = begin(finetune_config(f"init={source}", "tokenizer.number_channels=2"))[0].tokenizer.eval()
    mono = load_tokenizer(source)
    assert stereo.config.frame_rate == mono.config.frame_rate
    audio = torch.randn(1, 1, 9600, generator=torch.Generator().manual_seed(0)) * 0.1
    codes = mono.encode(audio).audio_codes
    assert torch.equal(stereo.encode(audio.expand(-1, 2, -1)).audio_codes, codes)
    both, one = stereo.decode(codes).audio, mono.decode(codes).audio
    torch.testing.assert_close(both, one.expand(-1, 2, -1), atol=1e-5, rtol=1e-4)


def test_a_lower_rate_begins_as_the_old_model_on_resampled_audio(finetune_config, source):
    lower = begin(finetune_config(f"init={source}", "tokenizer.sampling_rate=16000"))[0].tokenizer.eval()
    old = load_tokenizer(source)
    assert lower.config.frame_rate == old.config.frame_rate
    seconds = [torch.arange(2 * rate) / rate for rate in (16000, 24000)]
    low, high = (torch.sin(2 * torch.pi * 200 * t)[None, None] * 0.5 for t in seconds)
    with torch.no_grad():
        wanted, latent = old.encode_latent(high), lower.encode_latent(low[..., : 25 * 1280])
        wave_high, wave_low = old.decode_latent(wanted), lower.decode_latent(wanted)
    assert latent.shape == wanted.shape
    assert ((latent - wanted).norm() / wanted.norm()).item() < 0.15  # each patch is resampled separately
    # Away from patch boundaries it equals the resampled old waveform.
    a, b = (wave.reshape(-1, 160)[:, 20:140] for wave in (resample(wave_high, 24000, 16000), wave_low))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_decoder_at_a_higher_rate_begins_as_the_resampled_output(finetune_config, source, channels, recordings):
    """Errors in decibels relative to the waveform; a randomly initialized projection would be near 0."""
    start = [f"init={CAT_MINI}", "semantic=null", "discriminators=[]", "stages.0.adversarial=false"]
    if channels == 2:
        start.append("tokenizer.number_channels=2")
    module, reports = begin(finetune_config(*start, "tokenizer.output_sampling_rate=48000"))
    higher, old = module.tokenizer.eval(), load_tokenizer(CAT_MINI)
    assert reports["tokenizer"].new == ()
    assert (higher.config.sampling_rate, higher.config.frame_rate) == (24000, old.config.frame_rate)
    entry = json.loads((recordings / "heldout.jsonl").read_text().splitlines()[0])
    audio = read_audio(recordings / entry["path"], sampling_rate=24000, num_channels=1)[0][None]
    codes = old.encode(audio).audio_codes
    assert torch.equal(higher.encode(audio.expand(-1, channels, -1)).audio_codes, codes)
    wanted = resample(old.decode(codes).audio, 24000, 48000).expand(-1, channels, -1)
    error = (higher.decode(codes).audio - wanted).square().sum() / wanted.square().sum()
    assert 10 * torch.log10(error).item() < -30


def test_a_decoder_at_a_higher_rate_keeps_its_rate_when_it_is_tuned_on(finetune_config, source, tmp_path):
    first = begin(finetune_config(f"init={source}", "tokenizer.output_sampling_rate=48000"))[0].tokenizer
    first.save_pretrained(tmp_path / "higher")
    again, reports = begin(finetune_config(f"init={tmp_path / 'higher'}"))
    assert again.tokenizer.output_sampling_rate == 48000
    assert (reports["tokenizer"].resampled, reports["tokenizer"].new) == ((), ())
    back, reports = begin(finetune_config(f"init={tmp_path / 'higher'}", "tokenizer.output_sampling_rate=24000"))
    assert back.tokenizer.config.decoder_kwargs[-1]["patch_size"] == 240
    assert reports["tokenizer"].resampled == (LAST,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["tokenizer.sampling_rate=22050"], "first patch 220.5 samples"),
        (["tokenizer.output_sampling_rate=36000"], "tokenizer.output_sampling_rate=36000 is not a multiple"),
        (["tokenizer.sampling_rate=16000", "tokenizer.output_sampling_rate=24000"], "not a multiple of sampling_rate"),
        (["tokenizer.patch_sizes=[240,2,2]"], "must be 4 whole numbers"),
        (["tokenizer.patch_sizes=[15,1,1,1]", "tokenizer.number_channels=2"], "multiply to 15, not a multiple of 2"),
        (["tokenizer.context_seconds=3"], "tokenizer.context_seconds: the architecture comes with init"),
        (["+tokenizer.stages=[]"], "tokenizer.stages: the architecture comes with init"),
    ],
)
def test_changes_that_cannot_work_say_why(finetune_config, source, changes, message):
    config = finetune_config(f"init={source}", *changes)
    with pytest.raises(UserError, match=re.escape(message)):
        plan_initialization(config)
