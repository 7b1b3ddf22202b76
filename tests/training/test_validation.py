import math
from dataclasses import replace

import pytest
import torch

from moss_train.audio.io import read_audio, write_audio
from moss_train.cli.main import main
from moss_train.data.clips import list_sources
from moss_train.data.stream.stream import ClipFormat
from moss_train.export.load import load_tokenizer
from moss_train.losses import multi_scale_mel_distance
from moss_train.training import CatModule
from moss_train.training.callbacks import validation
from moss_train.training.callbacks.validation_data import depths, load_held_out, scores
from moss_train.training.loggers.base import read_table
from moss_train.utils.checkpoint import best_checkpoint, list_checkpoints, read_best, record_best

from ..faults.harness import assert_same_run
from .runs import column, wait_for_end

FORMAT = ClipFormat(24000, 1, 1920, peak=0.7)


def scores_of(directory):
    """Return the rows of validation.csv without measured times."""
    rows = read_table(directory / "validation.csv")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_validation_leaves_no_trace_in_the_training(watched, whole):
    assert_same_run(watched, whole)


def test_rows_by_update_count_with_every_score(watched):
    rows = scores_of(watched)
    assert [row["update"] for row in rows] == ["0", "2", "4", "6", "8"]
    assert column(rows, "clips") == [4.0] * 5
    assert column(rows, "mel_distance") == column(rows, "mel_distance/4")
    by_domain = sum(column(rows, f"mel_distance/{domain}/2")[0] * n for domain, n in DOMAINS.items()) / 4
    assert by_domain == pytest.approx(column(rows, "mel_distance/2")[0])
    assert column(rows, "mel_distance")[-1] < column(rows, "mel_distance")[0]
    assert math.log(100) < column(rows, "text_lm_loss")[0] < math.log(700)  # 257 tokens, untrained
    assert all(0 < value <= 1 for level in range(1, 5) for value in column(rows, f"usage/{level}"))
    assert len(column(rows, "all/si_sdr/4")) == 5


DOMAINS = {"music": 1, "sound": 2, "speech": 1}


def test_scores_are_those_of_the_published_interface(watched, recordings):
    """The last row equals a computation from the last checkpoint through the public encode and decode."""
    model = load_tokenizer(list_checkpoints(watched / "checkpoints")[-1])
    clips = load_held_out([str(recordings / "heldout.jsonl")], FORMAT_OF_RUN, max_clips=4, max_seconds=6)
    distances = []
    for clip in clips:
        audio = clip.target[None]
        codes = model.encode(audio, return_dict=True).audio_codes
        restored = model.decode(codes[:2], return_dict=True).audio[..., : audio.shape[2]]
        distances.append(multi_scale_mel_distance(audio, restored, torch.tensor([audio.shape[2]]), 24000).item())
    last = scores_of(watched)[-1]
    assert float(last["mel_distance/2"]) == pytest.approx(sum(distances) / len(distances), rel=1e-4)


FORMAT_OF_RUN = ClipFormat(24000, 1, 1920)


def test_the_best_checkpoint_stays_and_is_recorded(watched):
    distances = column(read_table(watched / "validation.csv"), "mel_distance")
    best = read_best(watched / "checkpoints")
    assert (best.metric, best.value) == ("mel_distance", min(distances))
    assert best.update == 2 * distances.index(min(distances))
    assert best_checkpoint(watched / "checkpoints").name == best.name


def test_the_best_checkpoint_can_be_exported(watched, whole, tmp_path, capsys):
    assert main(["export", f"checkpoint={watched}", "select=best", f"out={tmp_path / 'best'}"]) == 0
    best = load_tokenizer(best_checkpoint(watched / "checkpoints")).state_dict()
    exported = load_tokenizer(tmp_path / "best").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in best.items())
    assert main(["export", f"checkpoint={whole}", "select=best", f"out={tmp_path / 'none'}"]) == 2
    assert "has no best checkpoint" in capsys.readouterr().err


def test_samples_are_there_to_hear_and_to_read(watched):
    folders = sorted(path.name for path in (watched / "samples").iterdir())
    assert folders == ["original", "update-00000000", "update-00000004", "update-00000008"]
    originals = sorted((watched / "samples" / "original").glob("*.flac"))
    assert len(originals) == 4
    for path in originals:
        audio, rate = read_audio(path)
        for count in ("02", "04"):
            restored, restored_rate = read_audio(watched / "samples" / folders[-1] / f"{path.stem}.levels-{count}.flac")
            assert (restored.shape, restored_rate) == (audio.shape, rate)
    text = (watched / "samples" / folders[-1] / "transcripts.md").read_text()
    assert "| truth | seven of clubs |" in text
    assert "| levels-04 | " in text


def test_samples_come_with_the_first_validation_that_is_due(validated, tmp_path):
    overrides = [
        *validated,
        "validation.samples_every_updates=3",
        "validation.samples_clips=1",
        "validation.max_clips=1",
    ]
    assert main(["fit", *overrides, f"run_dir={tmp_path}"]) == 0  # validation after every second update
    folders = sorted(path.name for path in (tmp_path / "samples").glob("update-*"))
    assert folders == ["update-00000000", "update-00000004", "update-00000006", "update-00000008"]  # 8 is the last


def test_the_originals_are_those_of_the_clips_of_the_last_start(validated, tmp_path):
    overrides = [*validated, "validation.samples_every_updates=2", f"run_dir={tmp_path / 'run'}"]
    for seconds, updates in ((1.0, 1), (2.0, 2)):  # other clips under the same name
        (tmp_path / f"{seconds}").mkdir()
        write_audio(tmp_path / f"{seconds}" / "clip.flac", torch.full((1, round(24000 * seconds)), 0.1), 24000)
        further = [f"validation.data={tmp_path / f'{seconds}'}", f"max_updates={updates}"]
        assert main(["fit", *overrides, *further]) == 0
        original, _ = read_audio(tmp_path / "run" / "samples" / "original" / "1-clip.flac")
        assert original.shape[1] == 24000 * seconds


def test_a_score_on_other_clips_is_no_reason_to_keep_a_checkpoint_as_the_best(validated, tmp_path):
    run = tmp_path / "run"
    overrides = [*validated, f"run_dir={run}", "validation.samples_clips=null", "validation.metrics=[]"]
    found = []
    for name, updates in (("one", 2), ("one", 4), ("other", 6)):
        (tmp_path / name).mkdir(exist_ok=True)
        write_audio(tmp_path / name / f"{name}.flac", torch.full((1, 24000), 0.1), 24000)
        assert main(["fit", *overrides, f"validation.data={tmp_path / name}", f"max_updates={updates}"]) == 0
        found.append(read_best(run / "checkpoints"))
        record_best(run / "checkpoints", replace(found[-1], value=0.5))  # as if these clips were easy
    assert found[1] == replace(found[0], value=0.5)
    score = float(read_table(run / "validation.csv")[-1]["mel_distance"])
    assert (found[2].update, found[2].value) == (6, score)


def test_a_resumed_run_has_the_same_validations(validated, watched, tmp_path):
    overrides = [*validated, f"run_dir={tmp_path}"]
    assert main(["fit", *overrides, "max_updates=5"]) == 0
    assert main(["fit", *overrides]) == 0
    assert scores_of(tmp_path) == scores_of(watched)
    assert read_best(tmp_path / "checkpoints") == read_best(watched / "checkpoints")


def test_a_kill_during_or_after_a_validation_neither_loses_nor_repeats_it(validated, tmp_path, monkeypatch):
    command = ["fit", *validated, "validation.every_updates=3", "validation.max_clips=1", f"run_dir={tmp_path}"]
    command += ["validation.metrics=[]", "validation.samples_clips=null"]
    with monkeypatch.context() as patch:  # after the first validation, before the first update
        patch.setattr(CatModule, "training_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command)
    with monkeypatch.context() as patch:  # during the last validation
        real = validation.validate
        patch.setattr(validation, "validate", lambda module, plan: real(module, plan) if module.update < 8 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command)
    assert main(command) == 0
    assert column(read_table(tmp_path / "validation.csv"), "update") == [0, 3, 6, 8]


def test_two_processes_have_the_scores_of_one(launcher, validated, watched, tmp_path):
    overrides = [*validated, f"run_dir={tmp_path}", "validation.max_clips=3", "max_updates=1"]
    wait_for_end(launcher.start_ranks("fit", *overrides))
    pair = scores_of(tmp_path)
    assert main(["fit", *validated, f"run_dir={tmp_path / 'one'}", "validation.max_clips=3", "max_updates=1"]) == 0
    (one,) = scores_of(tmp_path / "one")
    assert [name for name, value in one.items() if value] == [name for name, value in pair[0].items() if value]
    for name, value in one.items():
        if value:
            assert float(pair[0][name]) == pytest.approx(float(value), rel=1e-5), name


def test_metrics_are_computed_in_float32_in_a_run_in_bfloat16(validated, tmp_path):
    """Autocast would resample the audio for them in bfloat16, which numpy does not know."""
    overrides = [
        "validation.metrics=[stoi]",
        "validation.metrics_clips=4",
        "trainer.precision=bf16-mixed",
        "max_updates=1",
    ]
    assert main(["fit", *validated, *overrides, f"run_dir={tmp_path}"]) == 0
    (row,) = scores_of(tmp_path)
    assert 0 < float(row["all/stoi/4"]) < 1, row


def test_scores_by_hand():
    sums = {"clips": 2.0, "clips/a": 2.0, "clips/b": 0.0, "mel_distance/1": 6.0, "mel_distance/4": 4.0}
    sums |= {"mel_distance/a/1": 6.0, "mel_distance/a/4": 4.0, "mel_distance/b/1": 0.0, "mel_distance/b/4": 0.0}
    sums |= {"text_tokens": 10.0, "nats/1": 40.0, "nats/4": 20.0, "nats/other": 70.0, "nats/silent": 50.0}
    row = scores(sums | {"correct/4": 5.0}, torch.full((4, 2), 500), (1, 4))
    assert row["mel_distance"] == row["mel_distance/a/4"] == 2.0
    assert row["mel_distance/1"] == 3.0
    assert "mel_distance/b/4" not in row
    assert (row["text_lm_loss"], row["text_lm_loss/1"], row["text_lm_loss_no_audio"]) == (2.0, 4.0, 5.0)
    assert row["text_accuracy"] == 0.5
    assert row["perplexity/4"] == pytest.approx(2.0)


def test_depths_are_one_a_quarter_half_and_all():
    assert depths(32) == (1, 8, 16, 32)
    assert depths(4) == (1, 2, 4)
    assert depths(1) == (1,)
    assert depths(32, [4]) == (4, 32)


def test_clips_are_chosen_in_turn_and_brought_to_the_format(recordings):
    source = str(recordings / "heldout.jsonl")
    clips = load_held_out([source], FORMAT, max_clips=4, max_seconds=2.0)
    assert {clip.domain for clip in clips} == {"music", "sound", "speech"}
    assert load_held_out([source], FORMAT, max_clips=2, max_seconds=2.0)[0].id == clips[0].id
    whole = {clip.id: clip for clip in list_sources([source], "x")}
    for clip in clips:
        assert clip.audio.shape[-1] % 1920 == 0
        assert clip.target.shape[1] <= 48000
        assert clip.target.abs().max().item() == pytest.approx(0.7, rel=1e-5)
        audio, rate = whole[clip.id].read()
        assert (clip.text is None) == (audio.shape[-1] > 2 * rate or "text" not in whole[clip.id].labels)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("validation.data=/nowhere", "validation.data=/nowhere does not exist"),
        ("validation.num_quantizers=[5]", "validation.num_quantizers=[5]: the model has levels 1 to 4"),
        ("checkpoint.monitor=mel", "checkpoint.monitor=mel is no score of the validation"),
    ],
)
def test_impossible_settings_are_one_line_before_anything_starts(validated, tmp_path, error_line, override, message):
    assert message in error_line(["fit", *validated, f"run_dir={tmp_path / 'run'}", override])
    assert not (tmp_path / "run").exists()
