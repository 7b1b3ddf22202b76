"""Write a run as a Hugging Face model folder, and load one."""

from .load import load_tokenizer
from .write import export

__all__ = ["export", "load_tokenizer"]
