# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Block-diagonal projections and token convolutions of the ViL layer: differentiable functions and
their explicit gradients.
"""

from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_BLOCK = 32
"""Width up to which small diagonal blocks are joined into one dense block. Matrix units want that
much, and multiplying the zeros costs less than many tiny products."""


def dense_blocks(weight: Tensor, head_width: int) -> Tensor:
    """Join diagonal blocks, so that a block-diagonal product becomes a batch of decent matrix
    products.

    Args:
        weight (Tensor): Shape (blocks, out, in), with out = in = block size. Several weights may
            follow each other.
        head_width (int): DH, a multiple of the block size; joined blocks do not cross heads.

    Returns:
        Tensor: Shape (groups, width, width), rows are inputs and columns outputs, zero outside the
            blocks.
    """
    blocks, size, _ = weight.shape
    joined = _joined_blocks(size, head_width)
    grouped = weight.view(blocks // joined, joined, size, size).permute(
        0, 3, 2, 1
    )  # (groups, in, out, joined)
    return (
        torch.diag_embed(grouped).permute(0, 3, 1, 4, 2).reshape(-1, joined * size, joined * size)
    )


def diagonal_blocks(dense: Tensor, size: int) -> Tensor:
    """The transpose of :func:`dense_blocks`: (groups, width, width) to (blocks, size, size)."""
    groups, width, _ = dense.shape
    joined = width // size
    blocks = dense.view(groups, joined, size, joined, size).diagonal(
        dim1=1, dim2=3
    )  # (groups, in, out, joined)
    return blocks.permute(0, 3, 2, 1).reshape(-1, size, size)


def _joined_blocks(size: int, head_width: int) -> int:
    joined = 1
    while head_width % (2 * joined * size) == 0 and 2 * joined * size <= DENSE_BLOCK:
        joined *= 2
    return joined


def _tokens_to_groups(x: Tensor, width: int) -> Tensor:
    """View (B, N, E) as (groups, B * N, width)."""
    return x.reshape(-1, x.shape[-1] // width, width).transpose(0, 1)


def _heads_to_groups(x: Tensor, width: int) -> Tensor:
    """(B, NH, N, DH) to (groups, B * N, width)."""
    batch, heads, tokens, head_width = x.shape
    x = x.view(batch, heads, tokens, head_width // width, width).permute(1, 3, 0, 2, 4)
    return x.reshape(-1, batch * tokens, width)


def _groups_to_heads(x: Tensor, batch: int, heads: int) -> Tensor:
    """(groups, B * N, width) to (B, NH, N, DH), contiguous."""
    groups, tokens, width = x.shape
    x = x.view(heads, groups // heads, batch, tokens // batch, width).permute(2, 0, 3, 1, 4)
    return x.reshape(batch, heads, tokens // batch, -1).contiguous()


def headwise_linear(x: Tensor, dense: Tensor, bias: Optional[Tensor], heads: int) -> Tensor:
    """Block-diagonal linear map whose result comes out by head.

    Args:
        x (Tensor): Tokens, shape (B, N, E).
        dense (Tensor): Weight of :func:`dense_blocks`, shape (groups, width, width) with groups *
            width = E.
        bias (Tensor, optional): Shape (E, ).
        heads (int): NH; E / NH is a multiple of the width.

    Returns:
        Tensor: Shape (B, NH, N, DH), contiguous, DH = E / NH.
    """
    groups, width, _ = dense.shape
    x_groups = _tokens_to_groups(x, width)
    if bias is None:
        y = torch.bmm(x_groups, dense)
    else:
        y = torch.baddbmm(bias.view(groups, 1, width), x_groups, dense)
    return _groups_to_heads(y, x.shape[0], heads)


def headwise_linear_backward(
    y_grad: Tensor, x: Tensor, dense: Tensor, with_bias: bool
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """Gradients of :func:`headwise_linear`.

    Args:
        y_grad (Tensor): Shape (B, NH, N, DH).
        x (Tensor): The tokens of the forward pass, shape (B, N, E).
        dense (Tensor): Shape (groups, width, width).
        with_bias (bool): Whether there is a bias.

    Returns:
        tuple[Tensor, Tensor, Tensor | None]: Gradients of x (a view of shape (B, N, groups, width),
        not contiguous), of dense and of the bias (E, ).
    """
    groups, width, _ = dense.shape
    y_grad = _heads_to_groups(y_grad, width)
    x_grad = (
        torch.bmm(y_grad, dense.transpose(1, 2))
        .view(groups, *x.shape[:2], width)
        .permute(1, 2, 0, 3)
    )
    dense_grad = torch.bmm(_tokens_to_groups(x, width).transpose(1, 2), y_grad)
    return x_grad, dense_grad, y_grad.sum(1).view(-1) if with_bias else None


def gate_weights(igate_weight: Tensor, fgate_weight: Tensor, heads: int) -> Tensor:
    """Both gates' weights (NH, 3E) by operand (q, k, v) and head: (3, NH, DH, 2 NH)."""
    both = torch.cat([igate_weight, fgate_weight])
    return both.view(2 * heads, 3, heads, -1).permute(1, 2, 3, 0)


def gate_preactivations(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, bias: Tensor
) -> Tuple[Tensor, Tensor]:
    """Linear map of the concatenation [q, k, v] to one scalar per gate, head and token, without
    concatenating.

    Args:
        q, k, v (Tensor): Shape (B, NH, N, DH); computed in the dtype of the weights.
        weights (Tensor): Of :func:`gate_weights`, shape (3, NH, DH, 2 NH).
        bias (Tensor): Input gate, then forget gate, shape (2 NH, ).

    Returns:
        tuple[Tensor, Tensor]: igate and fgate, shape (B, NH, N).
    """
    gates = sum(torch.matmul(x.to(weights.dtype), weight) for x, weight in zip((q, k, v), weights))
    gates = gates.sum(1) + bias  # over the heads that are read: (B, N, 2 NH)
    igate, fgate = gates.transpose(1, 2).contiguous().chunk(2, dim=1)
    return igate, fgate


def _conv_layout(x: Tensor, weight: Tensor, grid: Sequence[int]):
    """View tokens (B, N, E) as a channels-last map, with the kernel and padding to match.

    Three by three kernels see the grid, kernels (E, 1, K) a single column of N tokens, padded for
    both directions.
    """
    if weight.dim() == 4:
        height, width, padding = grid[0], grid[1], [weight.shape[2] // 2, weight.shape[3] // 2]
    else:
        height, width, padding = x.shape[1], 1, [weight.shape[2] - 1, 0]
        weight = weight.unsqueeze(-1)
    return x.view(x.shape[0], height, width, -1).permute(0, 3, 1, 2), weight, padding


def token_conv(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], grid: Sequence[int], reverse: bool
) -> Tensor:
    """Depthwise convolution over tokens, in the layout that they have (channels last).

    For a reader that goes from last to first the kernel is rotated by 180 degrees; the tokens stay
    where they are.

    Args:
        x (Tensor): Tokens in row-major order, shape (B, N, E).
        weight (Tensor): Shape (E, 1, KH, KW), odd sizes, over the token grid (ViL v2); or (E, 1,
            K), causal in reading direction (ViL v1).
        bias (Tensor, optional): Shape (E, ).
        grid (tuple[int, int]): Rows and columns of the token grid, their product is N.
        reverse (bool): Reading direction.

    Returns:
        Tensor: Shape (B, N, E).
    """
    causal = weight.dim() == 3
    maps, weight, padding = _conv_layout(x, weight, grid)
    if reverse:
        weight = weight.flip(2, 3)
    y = F.conv2d(maps, weight, bias, padding=padding, groups=x.shape[-1])
    y = y.permute(0, 2, 3, 1).flatten(1, 2)
    # The causal kernel, padded on both sides, gives K - 1 outputs too many, on the side it is read
    # towards.
    return _read_part(y, x.shape[1], reverse) if causal else y


def _read_part(y: Tensor, length: int, reverse: bool) -> Tensor:
    return y[:, -length:] if reverse else y[:, :length]


def token_conv_backward(
    y_grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool, grid: Sequence[int], reverse: bool
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """Gradients of :func:`token_conv`.

    Args:
        y_grad (Tensor): Shape (B, N, E).
        x, weight, grid, reverse: As in the forward pass.
        with_bias (bool): Whether there is a bias.

    Returns:
        tuple[Tensor, Tensor, Tensor | None]: Gradients of x (B, N, E), weight and bias.
    """
    shape = weight.shape
    if weight.dim() == 3:  # the outputs that were cut away have no gradient
        extra = weight.shape[2] - 1
        y_grad = F.pad(y_grad, (0, 0, extra, 0) if reverse else (0, 0, 0, extra))
    maps, weight, padding = _conv_layout(x, weight, grid)
    height = maps.shape[2] + 2 * padding[0] - weight.shape[2] + 1
    y_grad = y_grad.view(x.shape[0], height, maps.shape[3], -1).permute(0, 3, 1, 2)
    channels = x.shape[-1]
    x_grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        y_grad,
        maps,
        weight.flip(2, 3) if reverse else weight,
        [channels],
        [1, 1],
        padding,
        [1, 1],
        False,
        [0, 0],
        channels,
        [True, True, with_bias],
    )
    if reverse:
        weight_grad = weight_grad.flip(2, 3)
    return x_grad.permute(0, 2, 3, 1).flatten(1, 2), weight_grad.view(shape), bias_grad
