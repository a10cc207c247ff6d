# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""From images to tokens with a place."""

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.compat import is_exporting


class PatchEmbed(nn.Module):
    """Cut an image into patches and project them.

    Args:
        in_channels (int): Channels of the image.
        embed_dims (int): D.
        patch_size (int): Side of a patch in pixels.
        stride (int): Pixels between patches; smaller than the patch size they overlap.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, embed_dims, kernel_size=patch_size, stride=stride)
        nn.init.xavier_uniform_(self.projection.weight.view(embed_dims, -1))
        nn.init.zeros_(self.projection.bias)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[int, int]]:
        """Embed an image.

        Where the patches do not tile the image, zeros are added on the right and at the bottom.

        Args:
            x (Tensor): Shape (B, C, H, W).

        Returns:
            tuple[Tensor, tuple[int, int]]: Tokens in row-major order (B, N, D), and the token grid.
        """
        patch_size, stride = self.projection.kernel_size[0], self.projection.stride[0]
        bottom, right = (-(size - patch_size) % stride for size in x.shape[2:])
        if is_exporting() or bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        x = self.projection(x)
        # In memory, too: what the blocks add to the tokens takes on their layout, and every norm
        # would have to transpose it.
        return x.flatten(2).transpose(1, 2).contiguous(), (x.shape[2], x.shape[3])


def resize_pos_embed(pos_embed: Tensor, grid: Tuple[int, int]) -> Tensor:
    """Resize a learned position embedding bicubically (align_corners=False, no antialiasing).

    Args:
        pos_embed (Tensor): Shape (1, gh, gw, D).
        grid (tuple[int, int]): Wanted rows and columns.

    Returns:
        Tensor: Shape (1, rows, columns, D).
    """
    if not is_exporting() and tuple(pos_embed.shape[1:3]) == tuple(grid):
        return pos_embed
    maps = pos_embed.permute(0, 3, 1, 2)
    dtype = torch.promote_types(maps.dtype, torch.float32)
    maps = F.interpolate(maps.to(dtype), size=tuple(grid), mode='bicubic', align_corners=False)
    return maps.permute(0, 2, 3, 1).to(pos_embed.dtype)


def tokens_to_map(x: Tensor, grid: Tuple[int, int]) -> Tensor:
    """View tokens (B, N, D) as a map (B, D, gh, gw), channels last in memory."""
    maps = x.view(x.shape[0], *grid, x.shape[2]).permute(0, 3, 1, 2)
    return maps.contiguous() if is_exporting() else maps
