"""Semantic supervision: a causal language model reads the quantized states and predicts text."""

from .text_encoder import ByteText, PretrainedText
from .text_lm import TextLM

__all__ = ["ByteText", "PretrainedText", "TextLM"]
