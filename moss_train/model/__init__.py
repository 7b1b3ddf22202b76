"""The inference model: what trains, streams and ships is this one implementation."""

from .configuration_moss_audio_tokenizer import MossAudioTokenizerConfig
from .modeling_moss_audio_tokenizer import MossAudioTokenizerModel

__all__ = ["MossAudioTokenizerConfig", "MossAudioTokenizerModel"]
