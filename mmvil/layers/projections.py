# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Modules that hold the parameters of the layer's sparse linear maps."""

from typing import Tuple

import torch
from torch import Tensor, nn

from ..ops.projections import by_head, dense_blocks, headwise_linear, token_conv


class HeadwiseLinear(nn.Module):
    """Linear map with a block-diagonal weight, handed out by head.

    Args:
        channels (int): E, input and output width.
        num_heads (int): NH, heads of the output.
        block_size (int): Width of a diagonal block. Default: 4.
        bias (bool): Default: True.
    """

    def __init__(
        self, channels: int, num_heads: int, block_size: int = 4, bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.empty(channels // block_size, block_size, block_size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, E) to (B, NH, N, E / NH)."""
        dense = dense_blocks(self.weight, x.shape[-1] // self.num_heads)
        return by_head(headwise_linear(x, dense, self.bias), self.num_heads)

    def extra_repr(self) -> str:
        blocks, size, _ = self.weight.shape
        bias = self.bias is not None
        return f'{blocks * size}, heads={self.num_heads}, block_size={size}, bias={bias}'


class TokenConv(nn.Module):
    """Depthwise convolution of tokens: 3x3 over the token grid (ViL v2) or causal along the
    sequence (ViL v1).

    Args:
        channels (int): E.
        causal (bool): One-dimensional and causal in reading direction, kernel size 4. Default:
            False.
    """

    def __init__(self, channels: int, causal: bool = False) -> None:
        super().__init__()
        # Parameters and their default initialization are those of the convolutions of torch.
        conv = (
            nn.Conv1d(channels, channels, 4, groups=channels)
            if causal
            else nn.Conv2d(channels, channels, 3, groups=channels)
        )
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor, grid: Tuple[int, int], reverse: bool) -> Tensor:
        """Convolve (B, N, E); tokens stay in row-major order whatever the direction."""
        return token_conv(x, self.weight, self.bias, grid, reverse)

    def extra_repr(self) -> str:
        return f'{len(self.weight)}, kernel_size={tuple(self.weight.shape[2:])}'
