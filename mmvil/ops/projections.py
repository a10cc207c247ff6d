# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Block-diagonal projections and token convolutions of the ViL layer: functions and their
explicit gradients.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import is_compiling, is_exporting, is_transforming

DENSE_BLOCK_WIDTH = 32
"""Width up to which small diagonal blocks are joined into one dense block. Matrix units need that
width, and multiplying zeros costs less than many tiny products."""

ROW_TILE = 1024
"""Tokens per block-diagonal product on a CPU."""


def dense_blocks(weight: Tensor, head_width: int) -> Tensor:
    """Join diagonal blocks, so that a block-diagonal product becomes a batch of larger products.

    Args:
        weight (Tensor): Shape (blocks, out, in), with out = in = block size. Several weights may be
            concatenated.
        head_width (int): DH, a multiple of the block size; joined blocks do not cross heads.

    Returns:
        Tensor: Shape (groups, width, width), rows are inputs and columns outputs, zero outside the
            blocks.
    """
    size = weight.shape[1]
    width = dense_block_width(size, head_width)
    grouped = weight.view(-1, width // size, size, size).permute(0, 3, 2, 1)
    # (groups, in, out, joined) to (groups, joined, in, joined, out)
    return torch.diag_embed(grouped).permute(0, 3, 1, 4, 2).reshape(-1, width, width)


def diagonal_blocks(dense: Tensor, size: int) -> Tensor:
    """The transpose of :func:`dense_blocks`: (groups, width, width) to (blocks, size, size)."""
    groups, width, _ = dense.shape
    joined = width // size
    blocks = dense.view(groups, joined, size, joined, size).diagonal(dim1=1, dim2=3)
    return blocks.permute(0, 3, 2, 1).reshape(-1, size, size)  # from (groups, in, out, joined)


def dense_block_width(size: int, head_width: int) -> int:
    """Width of the blocks that :func:`dense_blocks` makes from blocks of width ``size``."""
    width = size
    while head_width % (2 * width) == 0 and 2 * width <= DENSE_BLOCK_WIDTH:
        width *= 2
    return width


def _groups(x: Tensor, width: int) -> Tensor:
    """View (..., E) as (groups, tokens, width)."""
    return x.reshape(-1, x.shape[-1] // width, width).transpose(0, 1)


def _row_tiles(x: Tensor) -> Sequence[Tensor]:
    """View (B, N, E) as rows; on a CPU in tiles that fit into its cache, because every group of
    channels reads all rows.
    """
    rows = x.flatten(0, 1)
    fit = len(rows) <= ROW_TILE or x.device.type != 'cpu'
    return (rows,) if fit else rows.split(ROW_TILE)


def headwise_linear(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    """Block-diagonal linear map.

    Args:
        x (Tensor): Tokens, shape (B, N, E).
        dense (Tensor): Weight of :func:`dense_blocks`, shape (groups, width, width) with groups *
            width = E.
        bias (Tensor, optional): Shape (E, ).

    Returns:
        Tensor: Shape (B, N, E).
    """
    width = dense.shape[1]
    # Autograd, compilers and transforms do not support ``out``.
    if torch.is_grad_enabled() or is_compiling() or is_transforming():
        y = torch.bmm(_groups(x, width), dense).transpose(0, 1).reshape(x.shape)
        return y if bias is None else y + bias
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows, target in zip(_row_tiles(x), _row_tiles(y)):
        torch.bmm(_groups(rows, width), dense, out=_groups(target, width))
        if bias is not None:
            target.add_(bias)
    return y


def headwise_linear_backward(
    y_grad: Tensor, x: Tensor, dense: Tensor, with_bias: bool, x_grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`headwise_linear`.

    Args:
        y_grad (Tensor): Shape (B, N, E).
        x (Tensor): The tokens of the forward pass, shape (B, N, E).
        dense (Tensor): Shape (groups, width, width).
        with_bias (bool): Whether there is a bias.
        x_grad (Tensor): Shape (B, N, E), contiguous; the gradient of x is added to it.

    Returns:
        tuple[Tensor, Tensor | None]: Gradients of dense and of the bias (E, ).
    """
    width = dense.shape[1]
    y_grad_groups = _groups(y_grad, width)
    if is_compiling():
        x_part = torch.bmm(y_grad_groups, dense.transpose(1, 2))
        x_grad += x_part.transpose(0, 1).reshape(x_grad.shape)
        dense_grad = torch.bmm(_groups(x, width).transpose(1, 2), y_grad_groups)
    else:
        dense_grad = torch.zeros_like(dense)
        for rows, y_rows, target in zip(*map(_row_tiles, (x, y_grad, x_grad))):
            y_rows = _groups(y_rows, width)
            _groups(target, width).baddbmm_(y_rows, dense.transpose(1, 2))
            dense_grad.baddbmm_(_groups(rows, width).transpose(1, 2), y_rows)
    return dense_grad, y_grad.sum((0, 1)) if with_bias else None


class GateWeights(NamedTuple):
    """Both gates as linear maps of the tokens before the projections; input gates come first."""

    c: Tensor  # (2 NH, E), of the convolved tokens, which make q and k
    x: Tensor  # (2 NH, E), of the tokens before the convolution, which make v
    bias: Tensor  # (2 NH, )


def _by_group(gates: Tensor, width: int) -> Tensor:
    """View (2 NH, 3E) as (groups of q, k and v, 2 NH, width)."""
    return gates.unflatten(1, (-1, width)).transpose(0, 1)


def fold_gates(
    gates: Tensor, gates_bias: Tensor, dense: Tensor, biases: Tensor | None
) -> GateWeights:
    """Fold the projections into the gates' weights for [q, k, v].

    The gates are linear in q, k and v, and these in the convolved tokens c and in x. So the gates
    are linear in c and x, and two narrow matrix products suffice.

    Args:
        gates (Tensor): Weights for the concatenation of q, k and v, shape (2 NH, 3E).
        gates_bias (Tensor): Shape (2 NH, ).
        dense (Tensor): Weights of the projections to q, k, v, from :func:`dense_blocks`.
        biases (Tensor, optional): Their biases, shape (3, E).

    Returns:
        GateWeights: Weights for :func:`gate_preactivations`.
    """
    folded = torch.bmm(_by_group(gates, dense.shape[1]), dense.transpose(1, 2))
    q, k, v = folded.unflatten(0, (3, -1)).transpose(1, 2).flatten(2).unbind()
    if biases is not None:
        gates_bias = torch.addmv(gates_bias, gates, biases.flatten())
    return GateWeights(q + k, v, gates_bias)


def fold_gates_backward(
    grads: GateWeights, gates: Tensor, dense: Tensor, biases: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`fold_gates`.

    Args:
        grads (GateWeights): Gradients of its result.
        gates, dense, biases: As in the forward pass.

    Returns:
        tuple[Tensor, Tensor, Tensor | None]: Gradients of the gates' weights (2 NH, 3E), of dense,
        and of the projections' biases (3, E).
    """
    width = dense.shape[1]
    folded_grad = _by_group(torch.cat([grads.c, grads.c, grads.x], dim=1), width)
    gates_grad = torch.bmm(folded_grad, dense).transpose(0, 1).flatten(1)
    dense_grad = torch.bmm(folded_grad.transpose(1, 2), _by_group(gates, width))
    if biases is None:
        return gates_grad, dense_grad, None
    gates_grad = torch.addr(gates_grad, grads.bias, biases.flatten())
    return gates_grad, dense_grad, torch.mv(gates.t(), grads.bias).view(3, -1)


def gate_preactivations(c: Tensor, x: Tensor, weights: GateWeights) -> tuple[Tensor, Tensor]:
    """Compute both gates without q, k, v and their concatenation.

    Args:
        c (Tensor): Convolved tokens, shape (B, N, E); computed in the dtype of the weights.
        x (Tensor): Tokens before the convolution, shape (B, N, E).
        weights (GateWeights): Result of :func:`fold_gates`.

    Returns:
        tuple[Tensor, Tensor]: igate and fgate, shape (B, NH, N).
    """
    c_flat, x_flat = (tokens.flatten(0, 1).to(weights.bias.dtype) for tokens in (c, x))
    gates = torch.addmm(weights.bias.unsqueeze(1), weights.c, c_flat.t())  # (2 NH, B * N)
    gates = torch.addmm(gates, weights.x, x_flat.t())
    heads = len(weights.bias) // 2
    igate, fgate = gates.view(2, heads, *c.shape[:2]).transpose(1, 2).contiguous()
    return igate, fgate


def gate_preactivations_backward(
    gates_grad: Tensor, tokens: Tensor, weight: Tensor, tokens_grad: Tensor
) -> Tensor:
    """Gradients of :func:`gate_preactivations` with respect to one of its two operands.

    Args:
        gates_grad (Tensor): Gradients of both gates, shape (B * N, 2 NH), at least float32.
        tokens (Tensor): The operand, shape (B, N, E).
        weight (Tensor): Its weight, shape (2 NH, E).
        tokens_grad (Tensor): Shape (B, N, E), contiguous; the operand's gradient is added to it.

    Returns:
        Tensor: Gradient of the weight.
    """
    dtype = tokens_grad.dtype
    tokens_grad.view(-1, tokens_grad.shape[2]).addmm_(gates_grad.to(dtype), weight.to(dtype))
    return torch.mm(gates_grad.t(), tokens.flatten(0, 1).to(gates_grad.dtype))


def _conv_layout(x: Tensor, weight: Tensor, grid: Sequence[int]):
    """View tokens (B, N, E) as a channels-last map, with kernel and padding to match.

    Kernels (E, 1, KH, KW) see the grid, kernels (E, 1, K) a single column of N tokens, padded for
    both directions.
    """
    if weight.dim() == 4:
        height, width, padding = grid[0], grid[1], [weight.shape[2] // 2, weight.shape[3] // 2]
    else:
        height, width, padding = x.shape[1], 1, [weight.shape[2] - 1, 0]
        weight = weight.unsqueeze(-1)
    return x.view(x.shape[0], height, width, x.shape[2]).permute(0, 3, 1, 2), weight, padding


def token_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int], reverse: bool
) -> Tensor:
    """Depthwise convolution over tokens, in their own layout (channels last).

    In the reverse direction the kernel is rotated by 180 degrees; the tokens are not moved.

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
    if is_exporting():  # the strides of a view would tie the graph to a batch size
        maps = maps.contiguous()
        if causal:  # padded on one side, so that tracing sees N tokens in and N out
            before, padding = padding[0], [0, 0]
            maps = F.pad(maps, (0, 0, 0, before) if reverse else (0, 0, before, 0))
    if reverse:
        weight = weight.flip(2, 3)
    y = F.conv2d(maps, weight, bias, padding=padding, groups=x.shape[-1])
    y = y.permute(0, 2, 3, 1).flatten(1, 2)
    if is_exporting():
        return y.reshape(x.shape)
    if not causal:
        return y
    # Padding on both sides gives K - 1 extra outputs, after the last token in reading order.
    return y[:, -x.shape[1] :] if reverse else y[:, : x.shape[1]]


def token_conv_backward(
    y_grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool, grid: Sequence[int], reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`token_conv`.

    Args:
        y_grad (Tensor): Shape (B, N, E).
        x, weight, grid, reverse: As in the forward pass.
        with_bias (bool): Whether there is a bias.

    Returns:
        tuple[Tensor, Tensor, Tensor | None]: Gradients of x (B, N, E), weight and bias.
    """
    shape = weight.shape
    if weight.dim() == 3:  # the outputs that were cropped have no gradient
        extra = weight.shape[2] - 1
        y_grad = F.pad(y_grad, (0, 0, extra, 0) if reverse else (0, 0, 0, extra))
    maps, weight, padding = _conv_layout(x, weight, grid)
    height = maps.shape[2] + 2 * padding[0] - weight.shape[2] + 1
    y_grad = y_grad.view(x.shape[0], height, maps.shape[3], x.shape[2]).permute(0, 3, 1, 2)
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
