"""Initial weights, decided here: the transformers default (normal, 0.02) makes the whole model silent.

With it every mel value lies under the log floor of the reconstruction loss, its gradient is exactly zero, and nothing
ever moves.
"""

from typing import Any

import torch
from torch import nn

from .transformer import LayerScale


@torch.no_grad()
def initialize_weights(module: nn.Module) -> None:
    """Set a module's own parameters: Xavier linears, N(0, 1) codebooks, weight-norm gains equal to their norms."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, LayerScale):
        nn.init.constant_(module.scale, module.init)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)
    elif isinstance(module, nn.Conv1d):
        initialize_weight_norm(module)


def initialize_weight_norm(module: Any) -> None:
    """Xavier directions, gains equal to their norms, zero bias."""
    weight = module.parametrizations.weight
    nn.init.xavier_normal_(weight.original1)
    weight.original0.copy_(weight.original1.flatten(1).norm(dim=1)[:, None, None])
    nn.init.zeros_(module.bias)
