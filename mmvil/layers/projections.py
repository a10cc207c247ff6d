# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Modules that hold the parameters of the layer's sparse linear maps."""

import math
from typing import Tuple

import torch
from torch import Tensor, nn

from ..ops.compat import is_tracing
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
        if is_tracing():  # small blocks as such: who counts a trace counts no zeros between them
            size = self.weight.shape[-1]
            y = torch.einsum('bngi,goi->bngo', x.unflatten(2, (-1, size)), self.weight).flatten(2)
            return by_head(y if self.bias is None else y + self.bias, self.num_heads)
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
        self.weight = nn.Parameter(torch.empty(channels, 1, *((4,) if causal else (3, 3))))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as the convolutions of torch do."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, grid: Tuple[int, int], reverse: bool) -> Tensor:
        """Convolve (B, N, E); tokens stay in row-major order whatever the direction."""
        return token_conv(x, self.weight, self.bias, grid, reverse)

    def extra_repr(self) -> str:
        return f'{len(self.weight)}, kernel_size={tuple(self.weight.shape[2:])}'
