import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moss_train.cli.main import main
from moss_train.export import load_tokenizer
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.utils.errors import UserError

STRANGER = """
import sys
sys.modules["moss_train"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModel

folder, out = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
audio = torch.sin(torch.arange(8000) * 0.05)[None, None]
codes = model.encode(audio, return_dict=True).audio_codes
streamed = model.encode(audio, chunk_duration=0.02).audio_codes
assert torch.equal(codes, streamed)
save_file({"codes": codes, "audio": model.decode(codes).audio}, out)
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    stages = [
        {"patch_size": 80, "output_dimension": 16, "d_model": 32, "num_heads": 2, "num_layers": 1},
        {"patch_size": 4, "output_dimension": 24, "d_model": 32, "num_heads": 2, "num_layers": 1},
    ]
    quantizer = {"rvq_dim": 16, "num_quantizers": 4, "codebook_size": 100, "codebook_dim": 4}
    config = MossAudioTokenizerConfig.from_stages(16000, stages, quantizer, context_seconds=0.5)
    folder = tmp_path_factory.mktemp("source") / "model"
    MossAudioTokenizerModel(config).save_pretrained(folder)
    return folder


def test_an_export_works_where_moss_train_cannot_be_imported(model_folder, tmp_path, monkeypatch):
    out = tmp_path / "my-tokenizer"
    assert main(["export", f"checkpoint={model_folder}", f"out={out}"]) == 0
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    command = [sys.executable, "-c", STRANGER, str(out), str(tmp_path / "result.safetensors")]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    result = load_file(tmp_path / "result.safetensors")
    model = load_tokenizer(model_folder)
    audio = torch.sin(torch.arange(8000) * 0.05)[None, None]
    assert torch.equal(model.encode(audio).audio_codes, result["codes"])
    torch.testing.assert_close(model.decode(result["codes"]).audio, result["audio"], atol=1e-6, rtol=1e-5)
    assert json.loads((out / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_moss_audio_tokenizer.MossAudioTokenizerConfig",
        "AutoModel": "modeling_moss_audio_tokenizer.MossAudioTokenizerModel",
    }


def test_the_model_card_states_the_bitrate(model_folder, tmp_path):
    assert main(["export", f"checkpoint={model_folder}", f"out={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "50 frames per second" in card
    assert "350 bit/s per level, 1400 bit/s in all" in card
    assert "Hz, 1 channel |" in card
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # whoever may read the code may read the weights


def test_half_precision_weights_keep_the_quantizer(model_folder, tmp_path):
    assert main(["export", f"checkpoint={model_folder}", f"out={tmp_path / 'out'}", "dtype=bfloat16"]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {name.split(".")[0]: tensor.dtype for name, tensor in weights.items()}
    assert kinds == {"encoder": torch.bfloat16, "quantizer": torch.float32, "decoder": torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=."], "out=. exists already"),
        (["out=new", "dtype=int4"], "dtype='int4' is not one of"),
        (["out=new", "checkpoint=nowhere"], "checkpoint=nowhere does not exist"),
        (["out=new", "checkpoint=owner/nowhere"], "Hugging Face hub, and HF_HUB_OFFLINE is set"),
        (["out=new", "checkpoint=./nowhere"], "./nowhere does not exist"),
        (["out=new", "checkpoint=empty"], "neither a run, a checkpoint nor a model folder"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(model_folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    arguments = (
        arguments if len(arguments) > 1 and "checkpoint" in arguments[1] else [*arguments, f"checkpoint={model_folder}"]
    )
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_weights_that_do_not_fit_are_an_error(model_folder, tmp_path):
    folder = tmp_path / "model"
    load_tokenizer(model_folder).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantizer_kwargs"]["num_quantizers"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="missing_keys"):
        load_tokenizer(folder)
