"""Patchify: consecutive samples or frames become channels, a reshape without parameters."""

from torch import Tensor, nn


class PatchedPretransform(nn.Module):
    """Join (encoder) or split (decoder) `patch_size` consecutive frames.

    Channel order is that of the released code: channel c, sample k of a patch become channel c * patch_size + k.
    """

    def __init__(self, patch_size: int, is_downsample: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.is_downsample = is_downsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, T * p, C] -> [B, T, C * p] when downsampling, the inverse otherwise."""
        batch, frames, channels = x.shape
        patch = self.patch_size
        if self.is_downsample:
            x = x.reshape(batch, frames // patch, patch, channels)
            return x.transpose(2, 3).reshape(batch, frames // patch, channels * patch)
        x = x.reshape(batch, frames, channels // patch, patch)
        return x.transpose(2, 3).reshape(batch, frames * patch, channels // patch)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, is_downsample={self.is_downsample}"
