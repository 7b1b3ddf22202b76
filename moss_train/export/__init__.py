"""From a run to an ordinary Hugging Face model folder, and back."""

from .loading import load_tokenizer
from .writing import export

__all__ = ["export", "load_tokenizer"]
