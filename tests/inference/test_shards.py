"""Encoding and decoding corpora: the codes of a single clip, kills, damage, several processes."""

import importlib.util
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from moss_train import load_config
from moss_train.audio.io import read_audio
from moss_train.cli.main import main
from moss_train.config.schema import EncodeConfig, check_inputs
from moss_train.data.pack.resume import unfinished_folder
from moss_train.data.shards.codes import CodeShards, is_code_folder
from moss_train.data.shards.index import ShardIndex
from moss_train.inference import shards as shards_module
from moss_train.inference.decode import Decoder
from moss_train.inference.shards import decode_shards, encode_shards
from moss_train.model import MossAudioTokenizerModel
from moss_train.utils.errors import ConfigError, UserError
from tests.data.packed_clips import iterate_clips
from tests.model.small_models import save_one_stage_model

from ..faults.harness import Launcher, is_alive, wait_for_numbers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_one_stage_model(folder)
    return folder


@pytest.fixture(scope="module")
def codes(packed: Path, model: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("codes") / "train"
    report = encode_shards(options(model, packed, out), [CPU])
    assert (report.num_written, report.failures) == (len(ShardIndex.load(packed).shards), [])
    return out


def options(model: Path, packed: Path, out: Path, **others) -> EncodeConfig:
    return EncodeConfig(model, out, shards=packed, batch_seconds=20.0, **others)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_codes_are_those_of_single_clips_with_their_labels(packed: Path, model: Path, codes: Path) -> None:
    tokenizer = MossAudioTokenizerModel.from_pretrained(model).eval()
    found = CodeShards(codes)
    found.verify()
    audio_clips = iterate_clips([packed], sampling_rate=24000, num_channels=1)
    for (name, clip_codes, labels), (audio_name, audio, audio_labels) in zip(found, audio_clips, strict=True):
        assert (name, labels) == (audio_name, audio_labels)
        alone = tokenizer.encode(audio[None], return_dict=True).audio_codes[:, 0]
        assert torch.equal(clip_codes, alone)
    assert found.arrays["has_text"].sum() == ShardIndex.load(packed).arrays["has_text"].sum()
    assert found.source.num_levels == 3


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_make_the_same_bytes(packed: Path, model: Path, codes: Path, tmp_path: Path) -> None:
    encode_shards(options(model, packed, tmp_path / "out"), [CPU, CPU])
    assert bytes_of(tmp_path / "out") == bytes_of(codes)


@pytest.mark.processes
@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_makes_the_same_bytes(packed: Path, model: Path, codes: Path, tmp_path: Path) -> None:
    encode_shards(options(model, packed, tmp_path / "out", executor="ray"), [CPU])
    assert bytes_of(tmp_path / "out") == bytes_of(codes)


def test_a_stopped_job_goes_on_after_its_shards(
    packed: Path, model: Path, codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = shards_module.write_code_shard, []

    def stop_at_third(path: Path, clips: list) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(path, clips)

    monkeypatch.setattr(shards_module, "write_code_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        encode_shards(options(model, packed, tmp_path / "out"), [CPU])
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"was begun with another model, other options"):
        encode_shards(options(model, packed, tmp_path / "out", num_quantizers=2), [CPU])
    report = encode_shards(options(model, packed, tmp_path / "out"), [CPU])
    assert report.num_present == 2
    assert bytes_of(tmp_path / "out") == bytes_of(codes)
    assert not unfinished_folder(tmp_path / "out").exists()


def test_decode_gives_back_every_clip(packed: Path, model: Path, codes: Path, tmp_path: Path) -> None:
    assert is_code_folder(codes)
    assert not is_code_folder(packed)
    arguments = [f"model={model}", f"input={codes}", f"out={tmp_path / 'audio'}", "device=cpu", "num_quantizers=2"]
    assert main(["decode", *arguments]) == 0
    tokenizer = MossAudioTokenizerModel.from_pretrained(model).eval()
    for name, clip_codes, labels in list(CodeShards(codes))[::20]:
        audio, _ = read_audio((tmp_path / "audio" / name).with_suffix(".wav"))
        alone = tokenizer.decode(clip_codes[:2, None], return_dict=True).audio[0, :, : labels["num_samples"]]
        assert audio.shape == alone.shape
        assert (audio - alone.clamp(-1, 1)).abs().max() < 2e-4
    decoder = Decoder(tokenizer, 2)
    again = decode_shards(decoder, codes, tmp_path / "audio", ".wav", 20.0)
    assert (again.num_written, again.num_present) == (0, len(CodeShards(codes)))


def test_several_folders_of_codes_are_decoded(
    model: Path, codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = Path(shutil.copytree(codes, tmp_path / "other"))
    out = tmp_path / "audio"
    assert main(["decode", f"model={model}", f"input=[{codes},{other}]", f"out={out}", "device=cpu"]) == 0
    assert f"decode: {2 * len(CodeShards(codes))} files written" in capsys.readouterr().out
    for name, _, labels in CodeShards(codes):
        for folder in ("train", "other"):
            audio, _ = read_audio((out / folder / name).with_suffix(".wav"))
            assert audio.shape[1] == labels["num_samples"]
    same = Path(shutil.copytree(codes, tmp_path / "copy" / "train"))
    assert main(["decode", f"model={model}", f"input=[{codes},{same}]", f"out={out}", "device=cpu"]) == 2
    assert f"two folders of codes would become {out / 'train'}" in capsys.readouterr().err


def test_encoding_again_has_nothing_to_do(
    packed: Path, model: Path, codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before, num_shards = bytes_of(codes), len(ShardIndex.load(packed).shards)
    arguments = ["encode", f"shards={packed}", f"out={codes}", "device=cpu"]
    assert main([*arguments, f"model={model}/."]) == 0  # another name of the same model
    assert f"encode: 0 shards written to {codes}, {num_shards} already there" in capsys.readouterr().out
    assert bytes_of(codes) == before
    assert main([*arguments, f"model={model}", "num_quantizers=2"]) == 2
    assert "was made with another model" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("not codes")
    assert main(["encode", f"shards={packed}", f"out={tmp_path}", f"model={model}"]) == 2
    error = capsys.readouterr().err
    assert "exists and is not empty; give another folder" in error
    assert "overwrite" not in error  # `encode` has no such key


def test_bad_clips_are_named_and_left_out(packed: Path, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    location = ShardIndex.load(copy).locate(5)
    with Path(location.shard).open("r+b") as file:
        file.seek(location.audio_offset + location.audio_size // 2)
        file.write(b"\x00\xff" * 8)
    report = encode_shards(options(model, copy, tmp_path / "out"), [CPU])
    assert len(report.failures) == 1
    assert "damaged" in report.failures[0][1]
    again = encode_shards(options(model, copy, tmp_path / "out"), [CPU])
    assert again.failures == [(Path(location.shard), "clip 5 was skipped before")]
    assert len(CodeShards(tmp_path / "out")) == len(ShardIndex.load(copy)) - 1


def test_clips_skipped_before_an_interruption_are_reported_at_the_end(
    packed: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    location = ShardIndex.load(copy).locate(1)
    with Path(location.shard).open("r+b") as file:
        file.seek(location.audio_offset + location.audio_size // 2)
        file.write(b"\x00\xff" * 8)
    original = shards_module.write_code_shard

    def write_and_stop(path: Path, clips: list) -> None:
        original(path, clips)
        raise KeyboardInterrupt

    monkeypatch.setattr(shards_module, "write_code_shard", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        encode_shards(options(model, copy, tmp_path / "out"), [CPU])
    monkeypatch.undo()
    report = encode_shards(options(model, copy, tmp_path / "out"), [CPU])
    assert report.num_present == 1
    assert report.failures == [(Path(location.shard), "clip 1 was skipped before the interruption")]
    assert len(CodeShards(tmp_path / "out")) == len(ShardIndex.load(copy)) - 1


def test_codes_that_do_not_fit_the_model_are_named_and_passed_over(
    model: Path, codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = Path(shutil.copytree(codes, tmp_path / "copy"))
    shards = CodeShards(copy)
    offset, size = (int(shards.arrays[f"codes_{name}"][3]) for name in ("offset", "size"))
    with (copy / shards.shards[int(shards.arrays["shard"][3])].file).open("r+b") as file:
        file.seek(offset + size - 2)
        file.write((30_000).to_bytes(2, "little"))
    out = tmp_path / "audio"
    assert main(["decode", f"model={model}", f"input={copy}", f"out={out}", "device=cpu"]) == 1
    assert "clip 3: codes must lie in 0..31, got 0..30000" in capsys.readouterr().err
    assert len(list(out.rglob("*.wav"))) == len(shards) - 1
    save_one_stage_model(tmp_path / "smaller", num_quantizers=2)
    assert main(["decode", f"model={tmp_path / 'smaller'}", f"input={codes}", f"out={out}", "device=cpu"]) == 2
    assert "has 3 levels, the model has 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "kind", "path"),
    [
        (["out=o"], "required", "input"),
        (["out=o", "shards=.", "input=."], "conflict", "shards"),
        (["out=o", "shards=nowhere"], "missing", "shards"),
    ],
)
def test_wrong_options_are_one_line(model: Path, capsys, arguments: list[str], kind: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_inputs(load_config("encode", [f"model={model}", *arguments]))
    assert (caught.value.kind, caught.value.path) == (kind, path)
    assert main(["encode", f"model={model}", *arguments]) == 2
    assert capsys.readouterr().err == f"moss_train encode: {caught.value}\n"


def test_damaged_codes_are_refused(codes: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(codes, tmp_path / "copy"))
    shard = copy / CodeShards(copy).shards[0].file
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="its hash differs"):
        CodeShards(copy).verify()
    shard.write_bytes(content[:-512])
    with pytest.raises(UserError, match="its index says"):
        CodeShards(copy)


WAITS = """
import multiprocessing, sys, time
from pathlib import Path
import torch
from moss_train.config.schema import EncodeConfig
from moss_train.inference import shards

if __name__ == "__main__":
    options = EncodeConfig(sys.argv[1], sys.argv[3], shards=sys.argv[2], batch_seconds=20.0)
    encoding = shards.encode_in_processes(options, [0], [torch.device("cpu")], Path(sys.argv[3]))
    next(encoding)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def test_no_process_outlives_a_killed_parent(launcher: Launcher, packed: Path, model: Path, tmp_path: Path) -> None:
    """Each process holds a GPU, and nobody would be left to end it."""
    (tmp_path / "waits.py").write_text(WAITS)
    (tmp_path / "out").mkdir()
    parent = launcher.start_script(tmp_path / "waits.py", str(model), str(packed), str(tmp_path / "out"))
    children = wait_for_numbers(parent)
    found = [is_alive(child) for child in children]
    parent.send(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(map(is_alive, children)):
        time.sleep(0.1)
    left = [child for child in children if is_alive(child)]
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert found == [True]
    assert left == []
