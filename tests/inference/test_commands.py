from pathlib import Path

import pytest
import torch

from moss_train.audio.io import read_audio, write_audio
from moss_train.cli.main import main
from moss_train.inference.files import read_codes
from moss_train.model import MossAudioTokenizerModel
from tests.model.small_models import save_one_stage_model

RECORDING = sorted((Path(__file__).parents[2] / "recipes/quickstart/audio/speech").rglob("*.flac"))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved stereo model and three clips of a real recording, one of them damaged."""
    folder = tmp_path_factory.mktemp("inference")
    save_one_stage_model(folder / "model", sampling_rate=16000, number_channels=2)
    audio, rate = read_audio(RECORDING, num_channels=2)
    (folder / "in put/a").mkdir(parents=True)
    write_audio(folder / "in put/a/one.wav", audio, rate)
    write_audio(folder / "in put/two.flac", audio[:, :20001], rate)
    (folder / "in put/bad.wav").write_bytes(b"RIFF nothing")
    return folder


def test_encode_and_decode_a_folder(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["encode", "model=model", "input=in put", "out=codes", "device=cpu", "batch_seconds=5"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "encode: 2 files written to codes, 0 already there, 1 clip failed\n"
    assert "moss_train encode: skipped: in put/bad.wav is not audio" in captured.err
    codes, info = read_codes(Path("codes/a/one.safetensors"))
    samples, _ = read_audio("in put/a/one.wav", sampling_rate=16000)
    assert (info.num_channels, info.num_samples) == (2, samples.shape[1])
    assert codes.shape == (3, -(-samples.shape[1] // 240))

    assert main(["decode", "model=model", "input=codes", "out=audio", "format=flac", "device=cpu"]) == 0
    assert capsys.readouterr().out == "decode: 2 files written to audio, 0 already there, 0 clips failed\n"
    decoded, rate = read_audio("audio/a/one.flac")
    assert (decoded.shape, rate) == (samples.shape, 16000)
    assert sorted(path.name for path in Path("audio").rglob("*") if path.is_file()) == ["one.flac", "two.flac"]


def test_no_model_is_loaded_when_no_input_is_audio(folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes((folder / "model/config.json").read_bytes())  # without the weights
    monkeypatch.chdir(folder)
    arguments = ["encode", f"model={tmp_path / 'model'}", f"out={tmp_path / 'codes'}", "device=cpu"]
    assert main([*arguments, "input=in put/bad.wav"]) == 1
    captured = capsys.readouterr()
    assert "moss_train encode: skipped: in put/bad.wav is not audio" in captured.err
    assert captured.out == f"encode: 0 files written to {tmp_path / 'codes'}, 0 already there, 1 clip failed\n"
    assert main([*arguments, "input=in put"]) == 2
    assert "cannot load a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "ending", "encode"),
    [
        ("loudness=-40", "-40dB", lambda model, audio: model.encode(audio, loudness=-40)),
        ("peak=0.7", "-peak0.7", lambda model, audio: model.encode(audio * (0.7 / audio.abs().max()))),
    ],
)
def test_clips_are_brought_to_one_level(folder, monkeypatch, tmp_path, capsys, option, ending, encode):
    """The codes are those of the model at that level, and do not mix in one folder with those at another."""
    monkeypatch.chdir(folder)
    arguments = ["encode", "model=model", "input=in put/two.flac", "device=cpu", f"out={tmp_path / 'level'}"]
    assert main([*arguments, option]) == 0
    codes, info = read_codes(tmp_path / "level/two.safetensors")
    audio = read_audio("in put/two.flac", sampling_rate=16000)[0][None]
    model = MossAudioTokenizerModel.from_pretrained("model").eval()
    assert torch.equal(codes, encode(model, audio).audio_codes[:, 0])
    assert not torch.equal(codes, model.encode(audio).audio_codes[:, 0])
    assert info.fingerprint.endswith(ending)
    capsys.readouterr()
    assert main(arguments) == 2
    assert "was made with other weights or another level (model=model)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loudness=3"], "loudness is a level in dB relative to full scale, from -100 to 0, got 3"),
        (["peak=0.7", "loudness=-20"], "peak=0.7 excludes loudness=-20"),
    ],
)
def test_levels_that_cannot_be_are_refused(folder, monkeypatch, tmp_path, capsys, options, message):
    monkeypatch.chdir(folder)
    arguments = ["encode", "model=model", "input=in put/two.flac", "device=cpu", f"out={tmp_path / 'new'}"]
    assert main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["streaming=true", "chunk_duration=0.03", "batch_invariant=true"])
def test_other_ways_of_passing_give_the_same_codes(folder, monkeypatch, tmp_path, option):
    monkeypatch.chdir(folder)
    source = "in put/two.flac"
    for name, extra in (("plain", []), ("other", [option, "format=npz"])):
        assert main(["encode", "model=model", f"input={source}", f"out={tmp_path / name}", "device=cpu", *extra]) == 0
    plain, info = read_codes(tmp_path / "plain/two.safetensors")
    other, other_info = read_codes(tmp_path / "other/two.npz")
    assert torch.equal(plain, other)
    assert info == other_info
    for name, extra in (("plain", []), ("other", [option])):
        arguments = [
            "decode",
            "model=model",
            f"input={tmp_path / name}",
            f"out={tmp_path / name}",
            "device=cpu",
            *extra,
        ]
        assert main(arguments) == 0
    (audio, _), (again, _) = (read_audio(tmp_path / name / "two.wav") for name in ("plain", "other"))
    torch.testing.assert_close(audio, again, atol=2 / 2**15, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "input=in put", "out=o", "num_quantizers=9"], "num_quantizers must be between 1 and 3, got 9"),
        (["encode", "input=in put", "out=o", "device=warp"], "device=warp is not a device"),
        (["encode", "input=in put", "out=o", "format=wav"], "format=wav has to be one of safetensors, npz"),
        (["encode", "input=model", "out=o"], "input=model has no audio files"),
        (["decode", "input=in put", "out=o"], "input=in put has no .safetensors or .npz files"),
        (["decode", "input=model", "out=o", "format=mp3"], "format=mp3 has to be one of wav, flac"),
    ],
)
def test_wrong_options_are_one_line(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert main([*arguments, "model=model"]) == 2
    text = capsys.readouterr().err
    assert text.splitlines()[-1].startswith(f"moss_train {arguments[0]}: {message}")
    assert "Traceback" not in text
    assert not Path("o").exists()
