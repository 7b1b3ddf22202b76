"""Semantic supervision (arXiv 2602.10934): a causal language model reads the quantized states and predicts text.

The gradient reaches the encoder through the straight-through estimator; the language model is dropped at inference.
Text encoders turn text into token ids inside the data workers; they are small and picklable. `make_portable` removes
paths of the training machine from the configuration node of a text LM, `with_local_text` sets them on another machine.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from moss_train.batch import TASKS
from moss_train.utils.errors import UserError
from moss_train.utils.hub import check_no_remote_kernels, from_pretrained

__all__ = ["ByteText", "PretrainedText", "TextLM"]


class TextEncoder(Protocol):
    """Converts text to token ids, the end token last, and back."""

    vocab_size: int
    end_id: int

    def __call__(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class ByteText:
    """Encodes text as its UTF-8 bytes and an end token: for every language, without a vocabulary file."""

    end_id = 256
    vocab_size = 257

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text, the end token last."""
        return [*text.encode("utf-8"), self.end_id]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids up to the end token; bytes that are not UTF-8 become replacement characters."""
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
        """Return the token ids of a text, the end token last."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.end_id]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def make_portable(node: Mapping[str, Any], text_folder: Path) -> dict[str, Any]:
    """Return a text LM's node with its architecture spelled out, and copy its text encoder's files to `text_folder`.

    An LM of another architecture than Qwen2 keeps the name of the pretrained LM that it was initialised from.
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
    """Return the node with the architecture of a local pretrained LM in its `config`; no weights are read.

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
    """Return the node of an LM with the architecture of this configuration. Raises UserError when it is not a Qwen2."""
    if config.model_type != "qwen2":
        raise UserError(
            f"semantic.pretrained={node['pretrained']} is a {config.model_type}, and only qwen2 is counted: give the "
            "sizes of a similar one in semantic.config, with semantic.pretrained=null"
        )
    # `layer_types` follows from the number of layers, which the count of operations varies.
    plain = {key: value for key, value in config.to_dict().items() if is_plain(value) and key != "layer_types"}
    return {**node, "pretrained": None, "config": plain}


def with_local_text(node: Mapping[str, Any], text_folder: Path) -> dict[str, Any]:
    """Undo `make_portable`: return the node with its text encoder's path set to `text_folder`, if that exists."""
    if not text_folder.is_dir():
        return dict(node)
    return {**node, "text": {**node["text"], "path": str(text_folder.resolve())}}


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, a text, None, or a container of these."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


class TextPrediction(NamedTuple):
    """Summed cross entropy of the text tokens (scalar, nats), the number of tokens, and how many were predicted right.

    A tuple, because FSDP2 has to find the tensors that need a gradient: in a dataclass, torch 2.11 does not find them.
    """

    loss_sum: Tensor
    num_tokens: int
    num_correct: Tensor


class TextLM(nn.Module):
    """A decoder-only LM that reads `[task tag][states after the quantizer][text]` and predicts only the text.

    Args:
        latent_dim: width of the states.
        text: text encoder (`ByteText` or `PretrainedText`); its vocabulary size is that of a model from scratch.
        config: `Qwen2Config` arguments of a model from scratch.
        pretrained: folder or repository of a causal LM to start from instead.

    Raises:
        ValueError: neither or both of `config` and `pretrained` are given, or the vocabularies do not fit.
    """

    def __init__(
        self,
        latent_dim: int,
        text: TextEncoder,
        config: Mapping[str, Any] | None = None,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        if (config is None) == (pretrained is None):
            raise ValueError("give either config (a model from scratch) or pretrained (a path or repository)")
        if not hasattr(text, "vocab_size"):
            raise ValueError(f"text must be a text encoder such as ByteText, got {text!r:.60}")
        self.text = text
        self.language_model: Any
        if pretrained is not None:
            # It is loaded in eval mode, in which the dropout of its configuration is off.
            self.language_model = from_pretrained(AutoModelForCausalLM, pretrained, dtype=torch.float32).train()
        else:
            check_no_remote_kernels(config or {}, "semantic.config")
            self.language_model = Qwen2ForCausalLM(Qwen2Config(**{"vocab_size": text.vocab_size, **(config or {})}))
        vocab_size = self.language_model.config.vocab_size
        if vocab_size < text.vocab_size:
            raise ValueError(f"the LM has {vocab_size} tokens, the text encoder needs {text.vocab_size}")
        hidden_size = self.language_model.config.hidden_size
        self.projection = nn.Linear(latent_dim, hidden_size)
        self.task_tags = nn.Embedding(len(TASKS), hidden_size)
        nn.init.normal_(self.task_tags.weight, std=self.language_model.config.initializer_range)

    def forward(
        self,
        states: Tensor,
        num_frames: Sequence[int] | Tensor,
        text_tokens: Tensor,
        text_lengths: Sequence[int] | Tensor,
        task_ids: Tensor,
    ) -> TextPrediction:
        """Return the cross entropy of each clip's text given its states; every clip must come with text.

        Args:
            states: [B, F, D] after the quantizer.
            num_frames: [B] valid frames; best as plain numbers, as `text_lengths`: the host reads both, and FSDP2 moves
                every tensor to the GPU.
            text_tokens: [B, L] token ids, the end token last.
            text_lengths: [B], at least 1.
            task_ids: [B] index into TASKS.
        """
        read = (x.tolist() if isinstance(x, Tensor) else x for x in (num_frames, text_lengths))
        lengths = list(zip(*read, strict=True))
        tags = self.task_tags(task_ids)
        audio = self.projection(states.to(self.projection.weight.dtype)).to(tags.dtype)
        text = self.language_model.get_input_embeddings()(text_tokens).to(tags.dtype)
        # The last token is a target but not an input. Padding is on the right, where causal attention ignores it.
        longest = max(frames + length for frames, length in lengths)
        nothing = tags.new_zeros(longest, tags.shape[1])
        # All pieces are copied once; the backward pass of `unbind` joins their gradients into one tensor.
        pieces = [
            piece
            for tag, sound, words, (frames, length) in zip(
                tags.split(1), audio.unbind(), text.unbind(), lengths, strict=True
            )
            for piece in (tag, sound[:frames], words[: length - 1], nothing[frames + length :])
        ]
        inputs = torch.cat(pieces).unflatten(0, (len(lengths), longest))
        hidden = self.language_model.model(
            inputs_embeds=inputs, use_cache=False, attention_mask=self._causal_mask(inputs.shape[1])
        ).last_hidden_state
        # The last audio state predicts the first token, so the predictions start one position before the text.
        spans = list(zip(hidden.unbind(), text_tokens.unbind(), lengths, strict=True))
        predicting = torch.cat([clip[frames : frames + text] for clip, _, (frames, text) in spans])
        targets = torch.cat([tokens[:text] for _, tokens, (_, text) in spans])
        logits = self.language_model.lm_head(predicting).float()
        return TextPrediction(
            loss_sum=F.cross_entropy(logits, targets, reduction="sum"),
            num_tokens=len(targets),
            num_correct=(logits.argmax(dim=-1) == targets).sum(),
        )

    def _causal_mask(self, length: int) -> dict[str, None] | None:
        """Return no mask for every kind of layer, as all attention is causal; None lets transformers make the masks.

        transformers would look for packed sequences in the positions, and so wait for the GPU in every micro-batch.
        """
        config = self.language_model.config
        kinds = set(getattr(config, "layer_types", None) or ())
        is_plain = config.model_type == "qwen2" and config._attn_implementation == "sdpa"
        window = getattr(config, "sliding_window", None)
        if not is_plain or (kinds != {"full_attention"} and (window is None or length > window)):
            return None
        return dict.fromkeys(kinds)

    @torch.no_grad()
    def generate(self, states: Tensor, task_ids: Tensor, max_tokens: int) -> list[int]:
        """Return the token ids of one clip's text by greedy decoding, up to the end token or `max_tokens`.

        Args:
            states: [1, F, D] after the quantizer.
            task_ids: [1] index into TASKS.
        """
        audio = self.projection(states.to(self.projection.weight.dtype))
        inputs = torch.cat((self.task_tags(task_ids)[:, None], audio), dim=1)
        tokens: list[int] = []
        cache = None
        while len(tokens) < max_tokens:
            output = self.language_model.model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            token = self.language_model.lm_head(output.last_hidden_state[:, -1:]).argmax(dim=-1)
            tokens.append(int(token))
            if tokens[-1] == self.text.end_id:
                break
            inputs = self.language_model.get_input_embeddings()(token)
        return tokens
