"""Models that are named: a folder, or a repository of a hub that may not answer."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from transformers import AutoConfig, Qwen2Config

from moss_train.utils import hub
from moss_train.utils.errors import UserError
from moss_train.utils.hub import why_unreachable


class Refuses(http.server.BaseHTTPRequestHandler):
    """Knows nothing, but answers."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that may ask the hub; the client itself was told at its import that it may not."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub.why_no_hub.cache_clear()
    yield
    hub.why_no_hub.cache_clear()


def test_a_server_that_refuses_is_there(answering: str) -> None:
    assert why_unreachable(answering, 5.0) is None


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    problem = why_unreachable(f"http://127.0.0.1:{port}", 5.0)
    assert problem is not None
    assert problem.startswith(f"http://127.0.0.1:{port} cannot be reached")


def test_a_server_that_says_nothing_is_waited_for_only_shortly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        assert why_unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.5) is not None
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
        hub.refuse_missing_model("my-tokenizer")
    hub.refuse_missing_model("owner/my-tokenizer")
    (tmp_path / "my-tokenizer").mkdir()
    hub.refuse_missing_model("my-tokenizer")
