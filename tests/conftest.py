"""Real recordings of the quick start, packed once for all tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test waits for a network

from moss_train.commands import pack as pack_command

ROOT = Path(__file__).parents[1]
RECORDINGS = ROOT / "recipes" / "quickstart" / "audio"


def _config(**changes: Any) -> dict:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    return yaml.safe_load((ROOT / "configs" / "pack.yaml").read_text()) | plain


@pytest.fixture(scope="session")
def pack_config() -> Callable[..., dict]:
    """The shipped configuration of `pack`, with the changes it is called with."""
    return _config


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Folder of real recordings: speech, sound and music as FLAC at 24 kHz."""
    return RECORDINGS


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick start's training manifest as shards, small ones so that there are several per domain."""
    out = tmp_path_factory.mktemp("packed") / "train"
    config = _config(input=RECORDINGS / "train.jsonl", out=out, shard_bytes=300_000)
    assert pack_command.run(config) == 0
    return out
