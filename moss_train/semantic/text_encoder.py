"""Text as token ids. An encoder is called in data workers, so it is small and picklable."""

from typing import Protocol

from transformers import AutoTokenizer

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
