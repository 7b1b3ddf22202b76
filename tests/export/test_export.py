import functools
import http.server
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moss_train.audio.io import read_audio, write_audio
from moss_train.cli.main import main
from moss_train.commands import pack as pack_command
from moss_train.export import load_tokenizer, verify, write
from moss_train.export.card import data_licences, licence_of_data
from moss_train.export.verify import compare
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.utils.checkpoint import CHECKPOINT_FILE, checkpoint_name, write_checkpoint
from moss_train.utils.errors import UserError
from tests.local_server import serving

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
assert torch.equal(codes, model.stream().encode(audio)[0])
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


@pytest.mark.processes
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
        "AutoModelForAudioTokenization": "modeling_moss_audio_tokenizer.MossAudioTokenizerModel",
    }


def test_the_model_card_states_the_bitrate(model_folder, tmp_path):
    assert main(["export", f"checkpoint={model_folder}", f"out={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "50 frames per second" in card
    assert "350 bit/s per level, 1400 bit/s in all" in card
    assert "Hz, 1 channel |" in card
    modes = {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(modes) == 1  # who may read the code may also read the weights


def test_half_precision_weights_keep_the_quantizer(model_folder, tmp_path):
    assert main(["export", f"checkpoint={model_folder}", f"out={tmp_path / 'out'}", "dtype=bfloat16"]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {name.split(".")[0]: tensor.dtype for name, tensor in weights.items()}
    assert kinds == {"encoder": torch.bfloat16, "quantizer": torch.float32, "decoder": torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=."], "out=. exists already"),
        (["out=new", "dtype=int4"], "dtype=int4 has to be one of float32, bfloat16, float16"),
        (["out=new", "level_db=23"], "level_db=23 has to be a number from -100 to 0, or null"),
        (["out=new", "part=middle"], "part=middle has to be one of encoder, decoder, or null"),
        (["out=new", "licence='do what you want'"], "is not an identifier"),
        (["out=new", "evaluation=empty"], "evaluation=empty has no table.csv"),
        (["out=new", "push=owner/name"], "push needs licence="),
        (["out=new", "checkpoint=nowhere"], "checkpoint=nowhere does not exist"),
        (["out=new", "checkpoint=owner/nowhere"], "Hugging Face hub, and HF_HUB_OFFLINE is set"),
        (["out=new", "checkpoint=./nowhere"], "./nowhere does not exist"),
        (["out=new", "checkpoint=empty"], "neither a run, a checkpoint nor a model folder"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(
    model_folder, tmp_path, monkeypatch, error_line, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    arguments = (
        arguments if len(arguments) > 1 and "checkpoint" in arguments[1] else [*arguments, f"checkpoint={model_folder}"]
    )
    assert message in error_line(["export", *arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_weights_that_do_not_fit_are_an_error(model_folder, tmp_path):
    folder = tmp_path / "model"
    load_tokenizer(model_folder).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantizer_kwargs"]["num_quantizers"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="missing_keys"):
        load_tokenizer(folder)


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_the_card_says_what_it_was_told_and_what_was_measured(model_folder, tmp_path):
    (tmp_path / "evaluation").mkdir()
    header = "domain,system,num_quantizers,bps,clips,failed,stoi,stoi_low,stoi_high,stoi_clips,pesq,pesq_clips,"
    header += "wer_errors,wer_errors_clips"
    rows = ["speech,mine,4,1400,2,0,0.7512,0.7,0.8,2,,0,0.1,2", "speech,original,,,2,0,1.0,1,1,2,,0,0.05,2"]
    (tmp_path / "evaluation" / "table.csv").write_text("\n".join([header, *rows]) + "\n")
    told = ["licence=CC-BY-4.0", "language=[en,de]", "data='two voices | read: aloud'", "level_db=-23"]
    out = tmp_path / "out"
    command = ["export", f"checkpoint={model_folder}", f"out={out}", f"evaluation={tmp_path / 'evaluation'}", *told]
    assert main(command) == 0
    facts = front_matter(out)
    assert (facts["license"], facts["language"]) == ("cc-by-4.0", ["en", "de"])
    assert (facts["library_name"], facts["pipeline_tag"]) == ("transformers", "feature-extraction")
    found = [metric for result in facts["model-index"][0]["results"] for metric in result["metrics"]]
    assert found == [{"type": "stoi", "value": 0.7512}, {"type": "wer", "value": 0.1}]
    card = (out / "README.md").read_text()
    assert "two voices \\| read: aloud" in card
    assert "about -23 dB RMS" in card
    assert json.loads((out / "config.json").read_text())["training_level_db"] == -23


def test_a_licence_is_never_guessed(model_folder, tmp_path, capsys):
    assert main(["export", f"checkpoint={model_folder}", f"out={tmp_path / 'out'}"]) == 0
    assert "license" not in front_matter(tmp_path / "out")
    assert "licence=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stated", "licence"),
    [
        (["CC0-1.0", "CC0-1.0"], "cc0-1.0"),
        (["cc0-1.0", "cc-by-4.0"], ""),
        (["cc0-1.0", None], ""),
        ([None, None], ""),
        (["ask the author", "ask the author"], ""),
    ],
)
def test_the_licence_of_a_run_is_that_of_all_its_clips(stated, licence, tmp_path, recordings, pack_config):
    files = sorted((recordings / "speech").glob("librivox*.flac"))[:2]
    keys = ("licence", "license")  # both spellings
    lines = [{"path": str(path), key: text} for path, key, text in zip(files, keys, stated, strict=True)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert pack_command.run(pack_config(input=tmp_path / "list.jsonl", out=tmp_path / "shards")) == 0
    run = tmp_path / "run"
    write_checkpoint(
        run / "checkpoints" / checkpoint_name(1), lambda folder: torch.save({}, folder / CHECKPOINT_FILE), {}
    )
    config = {"init": None, "data": {"train": [str(tmp_path / "shards")], "path": None}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    found = data_licences(run)
    assert found == {text or "none": stated.count(text) for text in stated}
    assert licence_of_data(found) == licence
    # The data of the initial weights is part of the training data.
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"init": "owner/name"}))
    assert data_licences(run) == {}


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_half_a_model_is_exported(model_folder, tmp_path, part):
    assert main(["export", f"checkpoint={model_folder}", f"out={tmp_path / 'out'}", f"part={part}"]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {part, "quantizer"}
    half = load_tokenizer(tmp_path / "out")
    with pytest.raises(ValueError, match="this model has no"):
        half(torch.zeros(1, 1, 320))


def test_sixteen_bit_weights_state_how_many_codes_change(model_folder, tmp_path, recordings):
    heldout = sorted(recordings.glob("speech/*.flac"))[0]
    options = ["dtype=bfloat16", f"heldout={heldout}"]
    assert main(["export", f"checkpoint={model_folder}", f"out={tmp_path / 'out'}", *options]) == 0
    found = re.search(r"bfloat16; ([\d.]+)% of the codes of \d+ s", (tmp_path / "out" / "README.md").read_text())
    assert found is not None
    audio, _ = read_audio(heldout, sampling_rate=16000, num_channels=1)
    exact = load_tokenizer(model_folder).encode(audio[None]).audio_codes
    rounded = MossAudioTokenizerModel.from_pretrained(tmp_path / "out").eval().encode(audio[None]).audio_codes
    assert float(found[1]) == pytest.approx(100 * float((exact != rounded).float().mean()), abs=0.05)


def test_heldout_audio_without_samples_is_one_line(model_folder, tmp_path, capsys):
    write_audio(tmp_path / "empty.wav", torch.zeros(1, 0), 16000)
    arguments = [f"checkpoint={model_folder}", f"out={tmp_path / 'out'}", f"heldout={tmp_path}", "dtype=bfloat16"]
    assert main(["export", *arguments]) == 2
    assert "empty.wav has no samples" in capsys.readouterr().err


def test_vectors_tell_this_model_from_another(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", f"checkpoint={model_folder}", f"out={out}"]) == 0
    vectors = load_file(out / "test_vectors" / "vectors.safetensors")
    assert vectors["audio"].shape[2] > 0.5 * 16000  # longer than the attention window
    assert all(passed for _, passed in compare(out, None))
    save_file({"codes": vectors["codes"]}, tmp_path / "port.safetensors")
    assert all(passed for _, passed in compare(out, tmp_path / "port.safetensors"))
    save_file({"codes": vectors["codes"].roll(1, 0).contiguous()}, tmp_path / "port.safetensors")
    assert [passed for _, passed in compare(out, tmp_path / "port.safetensors")] == [True, False]
    weights = load_file(out / "model.safetensors")
    weights["encoder.1.input_proj.weight"] = weights["encoder.1.input_proj.weight"] + 1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    assert [passed for _, passed in compare(out, None)][:2] == [True, False]


@pytest.mark.parametrize(
    ("file", "status", "message"),
    [
        ("model.safetensors", 1, "FAILED: the model can be loaded"),
        ("test_vectors/vectors.safetensors", 2, "cannot verify"),
    ],
)
def test_a_damaged_export_is_verified_without_a_traceback(
    model_folder, tmp_path, monkeypatch, capsys, file, status, message
):
    out = tmp_path / "out"
    assert main(["export", f"checkpoint={model_folder}", f"out={out}"]) == 0
    (out / file).write_bytes((out / file).read_bytes()[:200])  # an interrupted download
    monkeypatch.setattr(sys, "argv", ["verify.py", str(out)])
    assert verify.main() == status
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


class Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the Hub API that are needed to upload small files."""

    requests: ClassVar[list[tuple[str, str, bytes]]] = []
    status = 200

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        Hub.requests.append((self.path, self.headers["Authorization"], body))
        answer: dict = {}
        here = f"http://{self.headers['Host']}/owner/name"
        if self.path == "/api/repos/create":
            answer = {"url": here}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{here}/commit/1", "commitOid": "1" * 40, "success": True}
        self._answer(answer)

    def do_GET(self):
        self._answer({"id": "owner/name", "sha": "0" * 40, "siblings": []})

    def do_HEAD(self):
        self.do_GET()

    def _answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(Hub.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    """Return a local stand-in for the Hub."""
    Hub.requests.clear()
    Hub.status = 200
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Hub) as address:
        monkeypatch.setattr(write, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=address))
        yield Hub


def test_push_shows_what_goes_uploads_it_and_never_shows_the_token(hub, tmp_path, capsys):
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "test_vectors").mkdir()
    (tmp_path / "test_vectors" / "record.json").write_text("{}")
    assert write.push(tmp_path, "owner/name").endswith("/owner/name/commit/1")
    paths = [path for path, _, _ in hub.requests]
    assert paths[0] == "/api/repos/create"
    assert b"private" in hub.requests[0][2]
    commit = next(body for path, _, body in hub.requests if "/commit/" in path).decode()
    assert "README.md" in commit
    assert "test_vectors/record.json" in commit
    assert {authorization for _, authorization, _ in hub.requests} == {"Bearer hf_secret"}
    shown = capsys.readouterr()
    assert "2 files" in shown.err
    assert "hf_secret" not in shown.out + shown.err


def test_the_card_of_a_repository_loads_it_by_its_name(hub, model_folder, tmp_path):
    out = tmp_path / "here"
    assert main(["export", f"checkpoint={model_folder}", f"out={out}", "push=owner/there", "licence=cc0-1.0"]) == 0
    card = (out / "README.md").read_text()
    assert 'AutoModel.from_pretrained("owner/there", trust_remote_code=True)' in card
    assert 'pipeline("feature-extraction", model="owner/there", trust_remote_code=True)' in card


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "token is not valid"), (403, "may not write"), (500, "status 500")]
)
def test_a_refused_upload_is_one_line(hub, tmp_path, status, reason):
    hub.status = status
    with pytest.raises(UserError, match=reason) as error:
        write.push(tmp_path, "owner/name")
    assert "hf_secret" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_hub_that_cannot_be_reached_is_one_line(hub, tmp_path, monkeypatch):
    unreachable = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(write, "HfApi", unreachable)
    with pytest.raises(UserError, match="the Hub cannot be reached") as error:
        write.push(tmp_path, "owner/name")
    assert len(str(error.value).splitlines()) == 1


def test_an_upload_needs_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        write.push(tmp_path, "owner/name")
