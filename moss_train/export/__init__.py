"""From a run to an ordinary Hugging Face model folder, and back."""

from .load import load_tokenizer
from .write import export

__all__ = ["export", "load_tokenizer"]
