"""The text language model of the semantic loss (arXiv 2602.10934); dropped at inference."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from moss_train.batch import TASKS
from moss_train.semantic.text_encoder import TextEncoder
from moss_train.utils.hub import from_pretrained, refuse_kernels


class TextPrediction(NamedTuple):
    """Summed cross entropy of the text tokens (scalar, nats), the number of tokens, and how many were right.

    A tuple, in which FSDP2 finds the tensors that go backward; in a dataclass torch 2.11 does not.
    """

    loss_sum: Tensor
    num_tokens: int
    num_correct: Tensor


class TextLM(nn.Module):
    """A decoder-only LM that reads `[task tag][states after the quantizer][text]` and predicts the text alone.

    Args:
        latent_dim: width of the states.
        text: text encoder (`ByteText` or `PretrainedText`); its vocabulary sizes a model from scratch.
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
        self.language_model = self._language_model(config, pretrained)
        vocab_size = self.language_model.config.vocab_size
        if vocab_size < text.vocab_size:
            raise ValueError(f"the LM has {vocab_size} tokens, the text encoder needs {text.vocab_size}")
        hidden_size = self.language_model.config.hidden_size
        self.projection = nn.Linear(latent_dim, hidden_size)
        self.task_tags = nn.Embedding(len(TASKS), hidden_size)
        nn.init.normal_(self.task_tags.weight, std=self.language_model.config.initializer_range)

    def _language_model(self, config: Mapping[str, Any] | None, pretrained: str | None) -> Any:
        if pretrained is not None:
            # It comes in eval mode, without the dropout that its configuration may have.
            return from_pretrained(AutoModelForCausalLM, pretrained, dtype=torch.float32).train()
        refuse_kernels(config or {}, "semantic.config")
        return Qwen2ForCausalLM(Qwen2Config(**{"vocab_size": self.text.vocab_size, **(config or {})}))

    def forward(
        self, states: Tensor, num_frames: Tensor, text_tokens: Tensor, text_lengths: Tensor, task_ids: Tensor
    ) -> TextPrediction:
        """Cross entropy of each clip's text given its states; every clip must come with text.

        Args:
            states: [B, F, D] after the quantizer.
            num_frames: [B] valid frames; these and the lengths of texts are best on the CPU, where they are read.
            text_tokens: [B, L] token ids, the end token last.
            text_lengths: [B], at least 1.
            task_ids: [B] index into TASKS.
        """
        lengths = list(zip(num_frames.tolist(), text_lengths.tolist(), strict=True))
        inputs = self._sequences(states, text_tokens, task_ids, lengths)
        hidden = self.language_model.model(
            inputs_embeds=inputs, use_cache=False, attention_mask=self._causal_mask(inputs.shape[1])
        ).last_hidden_state
        # The last state predicts the first token, so text starts one position early.
        predicting = torch.cat([hidden[b, frames : frames + text] for b, (frames, text) in enumerate(lengths)])
        targets = torch.cat([text_tokens[b, :text] for b, (_, text) in enumerate(lengths)])
        logits = self.language_model.lm_head(predicting).float()
        return TextPrediction(
            loss_sum=F.cross_entropy(logits, targets, reduction="sum"),
            num_tokens=len(targets),
            num_correct=(logits.argmax(dim=-1) == targets).sum(),
        )

    def _causal_mask(self, length: int) -> dict[str, None] | None:
        """Masks for every kind of layer: none, as all attention is causal. None leaves them to transformers.

        It would look for packed sequences in the positions, and so wait for the GPU in every micro-batch.
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
        """The most likely text of one clip, token by token, up to the end token or `max_tokens`.

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

    def _sequences(
        self, states: Tensor, text_tokens: Tensor, task_ids: Tensor, lengths: list[tuple[int, int]]
    ) -> Tensor:
        """Embeddings of `[tag][states][text without its last token]`, right-padded: causality hides the padding."""
        tags = self.task_tags(task_ids)
        audio = self.projection(states.to(self.projection.weight.dtype))
        text = self.language_model.get_input_embeddings()(text_tokens)
        return pad_sequence(
            [
                torch.cat((tags[b, None], audio[b, :frames], text[b, : length - 1].to(audio.dtype)))
                for b, (frames, length) in enumerate(lengths)
            ],
            batch_first=True,
        )
