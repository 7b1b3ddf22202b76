"""Turn text into token ids inside the data workers; encoders are small and picklable.

At the end: the node of a text LM without references to files of the machine that it was trained on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from moss_train.utils.errors import UserError
from moss_train.utils.hub import from_pretrained


class TextEncoder(Protocol):
    """Text to token ids, the end token last, and back."""

    vocab_size: int
    end_id: int

    def __call__(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class ByteText:
    """UTF-8 bytes and an end token: every language, no vocabulary file."""

    end_id = 256
    vocab_size = 257

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text, the end token last."""
        return [*text.encode("utf-8"), self.end_id]

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids up to the end token; bytes that are not UTF-8 become replacement characters."""
        end = tokens.index(self.end_id) if self.end_id in tokens else len(tokens)
        return bytes(tokens[:end]).decode("utf-8", errors="replace")


class PretrainedText:
    """The tokenizer of a released language model.

    Args:
        path: local folder or repository with a transformers tokenizer.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token.
    """

    def __init__(self, path: str) -> None:
        self.tokenizer = from_pretrained(AutoTokenizer, path)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {path} has no end-of-sequence token")
        self.end_id: int = self.tokenizer.eos_token_id
        self.vocab_size = len(self.tokenizer)

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text, the end token last."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.end_id]

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def make_portable(node: Mapping[str, Any], text_folder: Path) -> dict[str, Any]:
    """The node with its architecture spelled out, its text encoder's files copied to `text_folder`.

    An LM of another architecture than Qwen2 keeps the name it was started from.
    """
    result = dict(node)
    if (pretrained := node.get("pretrained")) is not None:
        config = from_pretrained(AutoConfig, pretrained)
        if config.model_type == "qwen2":
            plain = config.to_diff_dict()
            result |= {"pretrained": None, "config": {key: plain[key] for key in sorted(plain) if is_plain(plain[key])}}
    path = node["text"].get("path")
    if path is not None:
        PretrainedText(path).tokenizer.save_pretrained(text_folder)
        result["text"] = {**node["text"], "path": None}
    return result


def resolve_lm_config(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node with the architecture of a local pretrained LM in its `config`; no weights are read.

    Raises:
        UserError: there is no such folder, or it is not a Qwen2.
    """
    path = node.get("pretrained")
    if path is None:
        return dict(node)
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"semantic.pretrained={path}: no folder with a config.json; nothing is downloaded to count: give a local "
            "folder, or semantic.pretrained=null and the sizes of the LM in semantic.config"
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"semantic.pretrained={path}: {' '.join(str(error).split())}") from error
    return with_config(node, config)


def with_config(node: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """The node of an LM with the architecture of this configuration. Raises UserError when it is not a Qwen2."""
    if config.model_type != "qwen2":
        raise UserError(
            f"semantic.pretrained={node['pretrained']} is a {config.model_type}, and only qwen2 is counted: give the "
            "sizes of a similar one in semantic.config, with semantic.pretrained=null"
        )
    # The types of the layers follow from their number, which the counting changes.
    plain = {key: value for key, value in config.to_dict().items() if is_plain(value) and key != "layer_types"}
    return {**node, "pretrained": None, "config": plain}


def with_local_text(node: Mapping[str, Any], text_folder: Path) -> dict[str, Any]:
    """Inverse of `make_portable`: the text encoder is read from where its files lie now."""
    if not text_folder.is_dir():
        return dict(node)
    return {**node, "text": {**node["text"], "path": str(text_folder.resolve())}}


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, nothing, or a container of these."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
