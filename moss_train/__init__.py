"""Training of causal neural audio tokenizers. Names are imported on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_train.cli.compose import load_config
    from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
    from moss_train.training.run.fit import fit

__version__ = "0.1.0"
__all__ = ["MossAudioTokenizerConfig", "MossAudioTokenizerModel", "__version__", "fit", "load_config"]

_HOMES = {
    "MossAudioTokenizerConfig": "moss_train.model",
    "MossAudioTokenizerModel": "moss_train.model",
    "fit": "moss_train.training.run.fit",
    "load_config": "moss_train.cli.compose",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, so that `import moss_train` stays fast.

    Raises:
        AttributeError: the package has no such public name.
    """
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moss_train' has no attribute {name!r}")
