# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Patch and position embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.compat import is_compiling, is_exporting, is_tracing, static_shape


class PatchEmbed(nn.Module):
    """Patch embedding: split images into patches and project them.

    Args:
        in_channels (int): Channels of the image.
        embed_dims (int): D.
        patch_size (int): Side of a patch in pixels.
        stride (int): Step between patches in pixels; they overlap if it is below ``patch_size``.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, embed_dims, kernel_size=patch_size, stride=stride)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the projection as a linear layer: Xavier uniform, with zero bias."""
        nn.init.xavier_uniform_(self.projection.weight.flatten(1))
        nn.init.zeros_(self.projection.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed an image.

        Images that patches do not tile are zero-padded on the right and at the bottom.

        Args:
            x (Tensor): Shape (B, C, H, W).

        Returns:
            tuple[Tensor, tuple[int, int]]: Tokens in row-major order (B, N, D), and the token grid.

        Raises:
            ValueError: If x is not a batch of images with ``in_channels`` channels, at least one
                patch large.
        """
        shape, channels = static_shape(x), self.projection.in_channels
        patch_size, stride = self.projection.kernel_size[0], self.projection.stride[0]
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(f'Expected images of shape (B, {channels}, H, W), but got {shape}.')
        height, width = shape[2:]
        if min(height, width) < patch_size:
            raise ValueError(
                f'Images must be at least one patch ({patch_size} x {patch_size}) large, '
                f'but are {height} x {width}.'
            )
        if is_tracing():
            x = check_traced_size(x, height, width)
        # Written with // because torch.compile cannot compute % of open sizes.
        bottom, right = (
            patch_size + (side - patch_size + stride - 1) // stride * stride - side
            for side in (height, width)
        )
        # Compiled by torch 2.9, a condition on open sizes alone is not evaluated again.
        if is_compiling() or bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        x = self.projection(x)
        # Contiguous: blocks inherit this layout, and every norm would transpose any other.
        return x.flatten(2).transpose(1, 2).contiguous(), static_shape(x)[2:]


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a learned position embedding bicubically (align_corners=False, no antialiasing).

    Args:
        pos_embed (Tensor): Shape (1, gh, gw, D).
        grid (tuple[int, int]): Rows and columns of the target grid.

    Returns:
        Tensor: Shape (1, rows, columns, D).
    """
    if not is_exporting() and static_shape(pos_embed)[1:3] == tuple(grid):
        return pos_embed
    maps = pos_embed.permute(0, 3, 1, 2)
    dtype = torch.promote_types(maps.dtype, torch.float32)
    maps = F.interpolate(maps.to(dtype), size=tuple(grid), mode='bicubic', align_corners=False)
    return maps.permute(0, 2, 3, 1).to(pos_embed.dtype)


def tokens_to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """View tokens (B, N, D) as a feature map (B, D, gh, gw), channels last in memory."""
    maps = x.view(x.shape[0], *grid, x.shape[2]).permute(0, 3, 1, 2)
    return maps.contiguous() if is_exporting() else maps


@torch.jit.script_if_tracing
def check_traced_size(x: Tensor, height: int, width: int) -> Tensor:
    """Return images (B, C, H, W) unchanged; raise for other sizes, even in a trace.

    torch.jit.trace records the padding and grid of one image size, but no Python checks. This one
    stays in the trace because it is scripted.
    """
    if x.shape[2] != height or x.shape[3] != width:
        raise ValueError(
            f'This Vision-LSTM was traced for images of {height} x {width} only, '
            f'but got {x.shape[2]} x {x.shape[3]}. Trace it again for this size, or use '
            'torch.export, which supports dynamic sizes.'
        )
    return x
