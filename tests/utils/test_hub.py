"""Models given by name: a folder, or a repository on a hub that may not answer."""

import http.server
import json
import socket
import time
from collections.abc import Iterator

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from moss_train.semantic import ByteText, TextLM
from moss_train.utils import hub
from moss_train.utils.errors import UserError
from moss_train.utils.hub import connection_problem
from tests.local_server import serving


class Refuses(http.server.BaseHTTPRequestHandler):
    """Answers every request with an error."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[str]:
    with serving(Refuses) as url:
        yield url


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Allow this process to use the hub; the client was set to offline when it was imported."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub.hub_problem.cache_clear()
    yield
    hub.hub_problem.cache_clear()


def test_a_server_that_refuses_is_there(answering: str) -> None:
    assert connection_problem(answering, 5.0) is None


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    problem = connection_problem(f"http://127.0.0.1:{port}", 5.0)
    assert problem is not None
    assert problem.startswith(f"http://127.0.0.1:{port} cannot be reached")


def test_a_server_that_says_nothing_is_waited_for_only_shortly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        assert connection_problem(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.5) is not None
    assert time.monotonic() - begin < 5.0


def test_without_a_hub_a_name_is_looked_for_here(online: None, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        hub.from_pretrained(AutoConfig, "out/model")
    assert f"out/model is neither a folder in {tmp_path} nor in the cache" in str(caught.value)
    assert "http://127.0.0.1:9 cannot be reached" in str(caught.value)
    Qwen2Config(hidden_size=24).save_pretrained(tmp_path / "out/model")
    assert hub.from_pretrained(AutoConfig, "out/model").hidden_size == 24


@pytest.mark.parametrize("name", ["/gone", "./gone", "runs/gone", "a/b/c", "~/gone"])
def test_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} does not exist"):
        hub.from_pretrained(AutoConfig, name)


def test_a_tokenizer_is_here_or_has_an_owner(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"my-tokenizer does not exist in {tmp_path}: give a run"):
        hub.check_model_name("my-tokenizer")
    hub.check_model_name("owner/my-tokenizer")
    (tmp_path / "my-tokenizer").mkdir()
    hub.check_model_name("my-tokenizer")


def test_a_mistyped_folder_is_refused_before_the_hub_is_asked(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/cat_mini").mkdir(parents=True)
    hub.check_model_name("models/cat_mini")
    with pytest.raises(
        UserError, match=f"models/cat_min does not exist in {tmp_path}: did you mean models/cat_mini\\?"
    ):
        hub.check_model_name("models/cat_min")
    hub.check_model_name("models/other")  # no such folder exists, so it is a repository name


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel:attention"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"attn_implementation": {"text_config": "evil/kernel"}},
        {"text_config": {"attn_implementation": "evil/kernel"}},
        {"experts_implementation": "evil/kernel"},
        {"quantization_config": {"quant_method": "torchao"}},
    ],
)
def test_a_configuration_cannot_ask_for_code_of_others(tmp_path, change: dict) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=8, num_key_value_heads=1, **sizes)).save_pretrained(tmp_path)
    assert hub.from_pretrained(AutoModelForCausalLM, str(tmp_path)).config.hidden_size == 8
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=r"not run|not supported"):
        hub.from_pretrained(AutoModelForCausalLM, str(tmp_path))
    with pytest.raises(UserError, match=r"not run|not supported"):
        TextLM(latent_dim=4, text=ByteText(), config={**sizes, **change})


def test_code_beside_a_language_model_is_refused_without_a_question(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an explicit setting transformers would ask at a terminal whether to run it; the canary must not exist."""
    canary = tmp_path / "canary"
    for name in ("config", "model", "tokenizer"):
        (tmp_path / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    map_ = {"AutoConfig": "config.C", "AutoModelForCausalLM": "model.M", "AutoTokenizer": ["tokenizer.T", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": map_}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": map_}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        with pytest.raises((OSError, ValueError)):
            hub.from_pretrained(kind, str(tmp_path))
    assert not canary.exists()
