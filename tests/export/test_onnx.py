"""ONNX graphs and their runtime against the torch model, on clips longer than every attention window."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from moss_train import load_config
from moss_train.cli.main import main
from moss_train.evaluation.results import read_rows
from moss_train.export import onnx_runtime
from moss_train.export.onnx import write_graphs
from moss_train.export.onnx_runtime import Tokenizer
from moss_train.export.write import known_audio
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from tests.model.small_models import num_real_differences, relative_error, small_model

ROOT = Path(__file__).parents[2]
CAT_MINI = ROOT / "recipes" / "cat_mini"
OTHER_RATIOS = (
    {"patch_size": 6, "output_dimension": 16, "d_model": 16, "num_heads": 2, "num_layers": 1},
    {"patch_size": 3, "output_dimension": 24, "d_model": 32, "num_heads": 2, "num_layers": 2},
)
FAMILIES = {
    "mono": {},
    "stereo": {"number_channels": 2},
    "higher_output": {"output_sampling_rate": 480},
    "other_ratios": {"stages": OTHER_RATIOS, "context_seconds": 1.0},
    "wide_quantizer": {"quantizer": {"rvq_dim": 24, "num_quantizers": 3, "codebook_size": 17, "codebook_dim": 4}},
}


def compare(model: MossAudioTokenizerModel, tokenizer: Tokenizer, audio: torch.Tensor) -> None:
    """Assert that codes are equal except for ties, and audio to 1e-4 of its maximum, with all levels and with one."""
    encoded = model.encode(audio)
    codes = torch.from_numpy(tokenizer.encode(audio.numpy()))
    assert num_real_differences(model, encoded.encoder_hidden_states, codes, encoded.audio_codes) == 0
    assert float((codes == encoded.audio_codes).float().mean()) > 0.999
    for levels in (len(codes), 1):
        decoded = torch.from_numpy(tokenizer.decode(codes[:levels].numpy()))
        assert relative_error(decoded, model.decode(codes[:levels]).audio) < 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[MossAudioTokenizerModel, Tokenizer]:
    """A small random model and its graphs."""
    model = small_model(**FAMILIES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    write_graphs(model, folder, chunk_frames=3)
    return model, Tokenizer(folder, threads=1)


def some_audio(model: MossAudioTokenizerModel, batch: int = 2, frames: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    samples = frames * model.config.downsample_rate - 3  # the last frame is incomplete
    return torch.randn(batch, model.config.number_channels, samples, generator=generator) * 0.3


def test_graphs_of_every_family_equal_torch(family):
    model, tokenizer = family
    longest = max(model.config.stage_windows("encoder_kwargs").values())
    assert some_audio(model).shape[2] * model.config.number_channels > 2 * longest
    compare(model, tokenizer, some_audio(model))


def test_streams_equal_whole_clips_whatever_the_chunks(family):
    model, tokenizer = family
    audio = some_audio(model).numpy()
    codes = tokenizer.encode(audio)
    stream = tokenizer.stream(2, num_quantizers=2)
    sizes = np.random.default_rng(0).integers(0, 5 * tokenizer.hop, 200).cumsum()
    parts = [stream.encode(part) for part in np.split(audio, sizes[sizes < audio.shape[2]], axis=2)]
    parts.append(stream.flush())
    assert len({part.shape[2] for part in parts}) > 3
    streamed = np.concatenate(parts, axis=2)
    assert float((streamed == codes[:2]).mean()) > 0.99
    whole = tokenizer.decode(codes)
    heard = np.concatenate([stream.decode(part) for part in np.split(codes, [1, 2, 6, 20], axis=2)], axis=2)
    assert np.abs(heard - whole).max() < 1e-4 * np.abs(whole).max()


def test_items_of_a_batch_are_independent(family):
    model, tokenizer = family
    audio = some_audio(model).numpy()
    short = 7 * tokenizer.hop + 1
    codes = tokenizer.encode(audio, lengths=[audio.shape[2], short])
    assert np.array_equal(codes[:, 1, :8], tokenizer.encode(audio[1:, :, :short])[:, 0])
    assert not codes[:, 1, 8:].any()
    stream = tokenizer.stream(2)
    stream.decode(codes[:, :, :5])
    stream.reset([False, True])
    heard = stream.decode(codes[:, :, 5:12])
    whole = tokenizer.decode(codes[:, :, :12])[:1, :, 5 * model.config.upsample_rate :]
    assert tokenizer.output_sampling_rate == model.output_sampling_rate
    fresh = tokenizer.decode(codes[:, 1:, 5:12])
    assert np.abs(heard - np.concatenate((whole, fresh))).max() < 1e-4 * np.abs(whole).max()


@pytest.fixture(scope="module")
def cat_mini() -> MossAudioTokenizerModel:
    return MossAudioTokenizerModel.from_pretrained(CAT_MINI).eval()


@pytest.fixture(scope="module")
def mini_folder(cat_mini, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    write_graphs(cat_mini, folder, chunk_frames=8)
    return folder


@pytest.mark.parametrize("seconds", [12.0, pytest.param(60.0, marks=pytest.mark.nightly)])
def test_cat_mini_equals_torch_beyond_every_window(cat_mini, mini_folder, seconds):
    assert seconds > cat_mini.config.causal_transformer_context_duration
    compare(cat_mini, Tokenizer(mini_folder, threads=1), known_audio(24000, 1, seconds).float())


def test_int8_weights_are_a_quarter_of_the_size_and_stay_close(cat_mini, mini_folder, tmp_path):
    write_graphs(cat_mini, tmp_path, chunk_frames=8, weights="int8")
    for name in ("encoder.onnx", "decoder.onnx"):
        assert (tmp_path / name).stat().st_size < 0.4 * (mini_folder / name).stat().st_size
    audio = known_audio(24000, 1, 2.0).float()[:1]
    exact, rounded = Tokenizer(mini_folder, threads=1), Tokenizer(tmp_path, threads=1)
    codes = exact.encode(audio.numpy())
    assert float((rounded.encode(audio.numpy())[0] == codes[0]).mean()) > 0.4
    error = rounded.decode(codes) - exact.decode(codes)
    assert 0 < np.sqrt((error**2).mean()) < 0.2 * exact.decode(codes).std()


def test_weights_of_large_models_lie_beside_the_graphs(tmp_path):
    model = small_model()
    (tmp_path / "inside").mkdir()
    (tmp_path / "beside").mkdir()
    write_graphs(model, tmp_path / "inside")
    write_graphs(model, tmp_path / "beside", largest_file=1000)
    moved = (tmp_path / "beside").rename(tmp_path / "moved")
    assert {path.name for path in moved.iterdir()} == {
        "codec.json",
        *(f"{part}.{kind}" for part in ("encoder", "decoder") for kind in ("onnx", "weights")),
    }
    for part in ("encoder", "decoder"):  # large weights are in separate files
        numbers = sum(value.numel() for value in getattr(model, part).parameters())
        assert (moved / f"{part}.weights").stat().st_size > 0.8 * 4 * numbers
    inside, outside = Tokenizer(tmp_path / "inside"), Tokenizer(moved)
    codes = inside.encode(some_audio(model).numpy())
    assert np.array_equal(outside.encode(some_audio(model).numpy()), codes)
    assert np.array_equal(outside.decode(codes), inside.decode(codes))
    (moved / "decoder.weights").unlink()
    with pytest.raises(ValueError, match=r"decoder\.onnx is damaged, copy or export it again"):
        Tokenizer(moved).decode(codes)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_halves_of_the_published_size_are_exported_and_equal_torch(part, tmp_path):
    """Each half of cat_1b6 has 3.3 GiB of weights; a protobuf file is limited to 2 GiB."""
    folder, out = tmp_path / "half", tmp_path / "graphs"
    config = MossAudioTokenizerConfig.from_stages(**load_config("fit", ["experiment=cat_1b6"]).tokenizer.to_plain())
    config.part = part
    torch.manual_seed(0)
    model = MossAudioTokenizerModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "layer_scale" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    try:
        model.save_pretrained(folder)
        command = [sys.executable, "-m", "moss_train", "export", f"checkpoint={folder}", f"out={out}", "format=onnx"]
        process = subprocess.Popen([*command, f"part={part}", "licence=cc0-1.0"], cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        size = (out / f"{part}.weights").stat().st_size
        assert size > 2**31
        assert usage.ru_maxrss * 1024 < 2 * size + 2 * 2**30  # the weights of torch and of the runtime
        tokenizer, generator = Tokenizer(out, threads=1), torch.Generator().manual_seed(1)
        if part == "encoder":
            audio = torch.randn(1, 1, 3 * config.downsample_rate, generator=generator) * 0.3
            assert np.array_equal(tokenizer.encode(audio.numpy()), model.encode(audio).audio_codes.numpy())
        else:
            codes = torch.randint(1024, (32, 1, 3), generator=generator)
            decoded = torch.from_numpy(tokenizer.decode(codes.numpy()))
            assert relative_error(decoded, model.decode(codes).audio) < 1e-4
    finally:  # pytest would keep these 7 GB
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)


def test_graphs_are_evaluated_like_a_model(exported, tmp_path):
    """Rates and levels equal the model's, and so do the metrics, except for rounding."""
    (tmp_path / "audio").mkdir()
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    soundfile.write(tmp_path / "audio" / "tone.wav", tone, 8000)
    values = {}
    for name, model in (("graphs", exported), ("model", exported.parent / "model")):
        arguments = [f"model={model}", f"data={tmp_path / 'audio'}", f"out={tmp_path / name}", "report_clips=0"]
        assert main(["evaluate", *arguments, "metrics=[spectral,si_sdr]", "anchors=false"]) == 0
        (row,) = read_rows(tmp_path / name / "per_clip.jsonl")
        values[name] = {entry.condition.num_quantizers: entry.values for entry in row.conditions}
    assert values["graphs"].keys() == values["model"].keys() == {1, 2, 4}
    for levels, expected in values["model"].items():
        assert len(expected) >= 3
        assert values["graphs"][levels] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_graphs_take_no_other_precision(exported, tmp_path, capsys):
    arguments = [f"model={exported}", f"data={CAT_MINI}", f"out={tmp_path / 'new'}", "precision=bf16"]
    assert main(["evaluate", *arguments]) == 2
    assert "precision=bf16" in capsys.readouterr().err


STRANGER = """
import sys
for name in ("torch", "moss_train", "transformers", "onnx"):
    sys.modules[name] = None
import numpy as np
folder = sys.argv[1]
sys.path.insert(0, folder)
from runtime import Tokenizer
tokenizer = Tokenizer(folder)
codes = tokenizer.encode(np.sin(np.arange(1000, dtype=np.float32)))
assert tokenizer.decode(codes[:2]).shape == (1, 1, 1008)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Export a small model with the command."""
    root = tmp_path_factory.mktemp("exported")
    small_model().save_pretrained(root / "model")
    arguments = [f"checkpoint={root / 'model'}", f"out={root / 'graphs'}", "format=onnx", "licence=cc0-1.0"]
    assert main(["export", *arguments, "chunk_frames=4"]) == 0
    return root / "graphs"


@pytest.mark.processes
def test_the_folder_works_without_torch_and_checks_itself(exported):
    card = (exported / "README.md").read_text()
    example = card.split("```python\n")[1].split("```")[0]  # run in the parent folder, as the card says
    soundfile.write(exported.parent / "speech.wav", np.sin(np.arange(1500)) / 2, small_model().sampling_rate)
    for command in (["-c", STRANGER, str(exported)], ["-c", example], [str(exported / "runtime.py")]):
        done = subprocess.run([sys.executable, *command], cwd=exported.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "passed"
    assert len((exported / "runtime.py").read_text().splitlines()) < 200
    assert 'license: "cc0-1.0"' in card
    assert "samples[:1000]" in card


def test_the_card_says_what_it_was_told_and_only_what_the_folder_can_do(exported, tmp_path):
    (tmp_path / "table.csv").write_text("domain,num_quantizers,bps,stoi,stoi_clips\nspeech,4,20,0.7512,2\n")
    arguments = [f"checkpoint={exported.parent / 'model'}", "format=onnx", f"evaluation={tmp_path}", "level_db=-23"]
    assert main(["export", *arguments, f"out={tmp_path / 'whole'}"]) == 0
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "| speech | 4 | 20 | stoi | 0.7512 |" in card
    assert '{"type": "stoi", "value": 0.7512}' in card
    assert "| level of the training data | about -23 dB RMS relative to full scale |" in card
    assert main(["export", *arguments, f"out={tmp_path / 'half'}", "part=decoder"]) == 0
    card = (tmp_path / "half" / "README.md").read_text()
    assert "holds the decoder only" in card
    assert "tokenizer.decode(" in card
    assert ".encode(" not in card


def test_the_card_of_int8_weights_promises_no_equal_streams(exported, tmp_path):
    model = exported.parent / "model"
    assert main(["export", f"checkpoint={model}", f"out={tmp_path / 'int8'}", "format=onnx", "weights=int8"]) == 0
    for folder, is_exact in ((exported, True), (tmp_path / "int8", False)):
        card = (folder / "README.md").read_text()
        assert ("equal to decoding the whole" in card) == is_exact
        assert ("depend on how a clip is cut into" in " ".join(card.split())) != is_exact


@pytest.mark.parametrize(("part", "other"), [("encoder", "decoder"), ("decoder", "encoder")])
def test_half_a_model_refuses_the_other_half(part, other, tmp_path):
    write_graphs(small_model(), tmp_path, part=part)
    tokenizer = Tokenizer(tmp_path)
    codes, audio = np.zeros((4, 1, 3), np.int64), np.zeros((1, 1, 48), np.float32)
    assert (tokenizer.encode(audio) if part == "encoder" else tokenizer.decode(codes)).shape[2] in (3, 48)
    with pytest.raises(ValueError, match=f"has no {other}"):
        _ = tokenizer.decode(codes) if part == "encoder" else tokenizer.encode(audio)


def test_a_damaged_folder_is_named(exported, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(exported, folder)
    graph = folder / "decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"decoder\.onnx is damaged, copy or export it again") as error:
        Tokenizer(folder).decode(np.zeros((1, 1, 1), np.int64))
    assert len(str(error.value).splitlines()) == 1
    (folder / "codec.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no complete ONNX export: codec\.json"):
        Tokenizer(folder)


@pytest.mark.parametrize("size", [0, 300])
def test_damaged_test_vectors_are_one_line(exported, tmp_path, monkeypatch, capsys, size):
    folder = Path(shutil.copytree(exported, tmp_path / "damaged"))
    (folder / "test_vectors.npz").write_bytes((folder / "test_vectors.npz").read_bytes()[:size])
    monkeypatch.setattr(sys, "argv", ["runtime.py", str(folder)])
    assert onnx_runtime.main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cannot check {folder}: ")
    assert error.count("\n") == 1


def test_a_missing_package_is_named(exported, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        Tokenizer(exported).encode(np.zeros(16, np.float32))
    arguments = [f"checkpoint={CAT_MINI}", f"out={tmp_path / 'new'}", "format=onnx"]
    assert main(["export", *arguments]) == 2
    assert "needs the package onnxruntime: pip install" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode(np.zeros((1, 2, 48), np.float32)), r"expected audio \[B, 1, T\], got shape \(1, 2, 48\)"),
        (lambda t: t.encode(np.zeros(48, np.int16)), "expected floating-point audio"),
        (lambda t: t.encode(np.full(48, np.nan, np.float32)), "not finite"),
        (lambda t: t.encode(np.zeros(0, np.float32)), "has no samples"),
        (lambda t: t.encode(np.zeros(48, np.float32), lengths=[49]), "lengths must be 1 numbers from 0 to 48"),
        (lambda t: t.encode(np.zeros(48, np.float32), num_quantizers=5), "5 levels: need"),
        (lambda t: t.decode(np.zeros((5, 1, 3), np.int64)), r"\[1\.\.4, B, frames\]"),
        (lambda t: t.decode(np.full((1, 1, 3), 32)), r"0\.\.31, got 32\.\.32"),
        (lambda t: t.stream(2).decode(np.zeros((1, 1, 3), np.int64)), "has 2 items, the chunk has 1"),
    ],
)
def test_bad_input_is_one_line(exported, call, message):
    with pytest.raises(ValueError, match=message):
        call(Tokenizer(exported))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["format=onnx", "chunk_frames=0"], "chunk_frames"),
        (["format=onnx", "dtype=bfloat16"], "format=onnx takes neither dtype nor with_training_state"),
        (["weights=int8"], "weights=int8 needs format=onnx"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, capsys, options, message):
    assert main(["export", f"checkpoint={CAT_MINI}", f"out={tmp_path / 'new'}", *options]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
