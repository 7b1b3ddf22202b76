"""Training of causal neural audio tokenizers; the model classes are imported on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel

__version__ = "0.1.0"
__all__ = ["MossAudioTokenizerConfig", "MossAudioTokenizerModel", "__version__"]


def __getattr__(name: str) -> Any:
    """Import a model class when it is asked for, so that `import moss_train` stays fast.

    Raises:
        AttributeError: the package has no such public name.
    """
    if name in ("MossAudioTokenizerConfig", "MossAudioTokenizerModel"):
        from moss_train import model

        return getattr(model, name)
    raise AttributeError(f"module 'moss_train' has no attribute {name!r}")
