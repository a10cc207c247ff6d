# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""Convolution, projections to q, k and v, and gates of the ViL layer as fused kernels.

.. math::
    a = \mathrm{conv}(x), \quad c = \mathrm{SiLU}(a), \quad q = W_q c, \quad k = W_k c, \quad
    v = W_v x, \quad (\tilde i, \tilde f) = W_g [q, k, v] + b_g

All of this is memory-bound, so features are read and written as rarely as possible: one kernel
reads x and writes a, q, k, v, and a small sum adds the heads' parts of the gates. This moves 5
tensors of shape (B, N, E). The backward pass (:mod:`mmvil.ops.triton.conv_qkv_gates_backward`) runs
the same kernel again, without gates, and moves 12 more.

Storing a costs one tensor in the forward pass, and saves later kernels the convolution to get c.

How this maps to the hardware:

- Tokens of all images form one axis of length B * N, so only the last tile is padded. The position
  of a token in its image determines its neighbours.
- The 4 x 4 blocks are applied as (32, 32) block-diagonal matrices to (tokens, 32) tiles on tensor
  cores. 7 of 8 multiplications are with zeros, which is still the cheapest way.
- Gates need float32 weights. Tensor cores get each as the sum of two half-precision numbers, which
  fill columns that the tile has anyway.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous, split_heads, token_rows
from . import cdiv, launch, limited_registers, next_power_of_2, on_input_device
from .activation import sigmoid
from .tiles import dot, dot_precision, load_row


class BeforeCellWeights(NamedTuple):
    """Parameters between up-projection and cell, E channels in NH heads, the convolution's in the
    memory layout of tokens. Biases may be None.
    """

    conv_weight: Tensor  # (1, 3, 3, E) or (1, K, E)
    conv_bias: Tensor | None
    q_weight: Tensor  # (E / 4, 4, 4)
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    igate_weight: Tensor  # (NH, 3E)
    igate_bias: Tensor
    fgate_weight: Tensor  # (NH, 3E)
    fgate_bias: Tensor


# -- Kernels ---------------------------------------------------------------------------------------


@triton.jit
def rows(pointer, first, stride, channel, T: tl.constexpr):
    """Pointers to channels of T tokens; only the step to the first token may exceed 32 bits."""
    token = tl.arange(0, T)
    first = tl.cast(first, tl.int64)
    return pointer + first * stride + (token[:, None] * stride + channel[None, :])


@triton.jit
def neighbour(
    row, column, height, width, tap,
    SIGN: tl.constexpr, KERNEL_WIDTH: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """Offset in tokens to the neighbour under a tap of the convolution kernel, and its presence.

    (ROW, COLUMN) is the tap on the token itself; SIGN -1 rotates the kernel by 180 degrees.
    """
    down = SIGN * (tap // KERNEL_WIDTH - ROW)
    right = SIGN * (tap % KERNEL_WIDTH - COLUMN)
    there = (row + down >= 0) & (row + down < height)
    there &= (column + right >= 0) & (column + right < width)
    return down * width + right, there


@triton.jit
def block_diagonal(weight, channel, present, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Load blocks (E / WIDTH, WIDTH, WIDTH) as a dense matrix (in, out) of a tile's channels."""
    block = channel // WIDTH
    inside = (block[:, None] == block[None, :]) & present[None, :]
    index = channel[None, :] * WIDTH + channel[:, None] % WIDTH
    return tl.load(weight + index, mask=inside, other=0).to(dtype)


@triton.jit
def both_gates(igate, fgate, gate, i_offset, f_offset, present, NH: tl.constexpr):
    """Load igate where gate < NH, fgate where gate < 2 NH, else zero."""
    i_part = tl.load(igate + i_offset, mask=present & (gate < NH), other=0)
    f_part = tl.load(fgate + f_offset, mask=present & (gate >= NH) & (gate < 2 * NH), other=0)
    return i_part.to(tl.float32) + f_part.to(tl.float32)


@triton.jit
def gate_weights(igate, fgate, gate, column, present, NH: tl.constexpr, E: tl.constexpr):
    """Load weights (NH, 3E) of both gates at gates and columns that broadcast to a tile."""
    i_offset = gate * (3 * E) + column
    return both_gates(igate, fgate, gate, i_offset, i_offset - NH * 3 * E, present, NH)


@triton.jit
def high_and_low(x, dtype: tl.constexpr):
    """Split a float32 (ROWS, GATES) into two terms of a dtype, side by side."""
    high = x.to(dtype)
    low = (x - high.to(tl.float32)).to(dtype)
    return tl.reshape(tl.join(high, low), (x.shape[0], 2 * x.shape[1]))


@triton.jit(do_not_specialize=['tokens', 'length', 'height', 'width'])
def before_cell_kernel(
    x, x_stride, conv_weight, conv_bias, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias,
    igate_weight, igate_bias, fgate_weight, fgate_bias, a_out, q_out, k_out, v_out, gates_out,
    tokens, length, height, width,
    E: tl.constexpr, NH: tl.constexpr, WIDTH: tl.constexpr, SIGN: tl.constexpr, SIZE: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, WITH_GATES: tl.constexpr,
    GATES: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute a, q, k, v (B * N, E) and the head's part of all gates, gates_out[head] of shape
    (2, B, NH, N), for one tile of tokens and one head.
    """
    DH: tl.constexpr = E // NH
    dtype: tl.constexpr = a_out.dtype.element_ty
    head = tl.program_id(0) % NH  # heads of the same tokens at the same time
    start = tl.program_id(0) // NH * T
    token = start + tl.arange(0, T)
    in_batch = token < tokens
    position = token % length
    row, column = position // width, position % width

    gate = tl.arange(0, GATES)
    gates = tl.zeros((T, 2 * GATES), tl.float32)
    zero = tl.zeros((T, C), tl.float32)
    for first in range(0, DH, C):
        channel = head * DH + first + tl.arange(0, C)
        present = first + tl.arange(0, C) < DH
        inside = in_batch[:, None] & present[None, :]

        a = tl.zeros((T, C), tl.float32) + load_row(conv_bias, channel, present)
        x_at = rows(x, start, x_stride, channel, T)
        for tap in tl.static_range(SIZE):
            step, there = neighbour(
                row, column, height, width, tap, SIGN, KERNEL_WIDTH, ROW, COLUMN
            )
            x_tap = tl.load(x_at + step * x_stride, mask=inside & there[:, None], other=0)
            weight = load_row(conv_weight, tap * E + channel, present)
            a += x_tap.to(tl.float32) * weight
        a = a.to(dtype)
        tl.store(rows(a_out, start, E, channel, T), a, mask=inside)
        c = (a.to(tl.float32) * sigmoid(a.to(tl.float32))).to(dtype)

        x_m = tl.load(x_at, mask=inside, other=0).to(dtype)
        q_map = block_diagonal(q_weight, channel, present, WIDTH, dtype)
        k_map = block_diagonal(k_weight, channel, present, WIDTH, dtype)
        v_map = block_diagonal(v_weight, channel, present, WIDTH, dtype)
        q = dot(c, q_map, zero + load_row(q_bias, channel, present), PRECISION)
        k = dot(c, k_map, zero + load_row(k_bias, channel, present), PRECISION)
        v = dot(x_m, v_map, zero + load_row(v_bias, channel, present), PRECISION)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        tl.store(rows(q_out, start, E, channel, T), q, mask=inside)
        tl.store(rows(k_out, start, E, channel, T), k, mask=inside)
        tl.store(rows(v_out, start, E, channel, T), v, mask=inside)

        if WITH_GATES:
            at = channel[:, None]
            here = present[:, None]
            wq = gate_weights(igate_weight, fgate_weight, gate[None, :], at, here, NH, E)
            wk = gate_weights(igate_weight, fgate_weight, gate[None, :], at + E, here, NH, E)
            wv = gate_weights(igate_weight, fgate_weight, gate[None, :], at + 2 * E, here, NH, E)
            gates = dot(q, high_and_low(wq, dtype), gates, PRECISION)
            gates = dot(k, high_and_low(wk, dtype), gates, PRECISION)
            gates = dot(v, high_and_low(wv, dtype), gates, PRECISION)

    if WITH_GATES:
        total = tl.sum(tl.reshape(gates, (T, GATES, 2)), axis=2)
        bias = both_gates(igate_bias, fgate_bias, gate, gate, gate - NH, gate < 2 * NH, NH)
        total += tl.where(head == 0, bias, 0)[None, :]
        batch = token // length
        # gates_out[head, gate // NH, batch, gate % NH, position]
        images = tokens // length
        index = (head * 2 + gate[None, :] // NH) * images + batch[:, None]
        index = index * NH + gate[None, :] % NH
        index = index.to(tl.int64) * length + position[:, None]
        tl.store(gates_out + index, total, mask=in_batch[:, None] & (gate < 2 * NH)[None, :])


# -- Launches --------------------------------------------------------------------------------------


@on_input_device
def before_cell(
    x: Tensor,
    weights: Sequence[Tensor | None],
    grid: Sequence[int],
    heads: int,
    reverse: bool,
    with_gates: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute convolution, SiLU, projections to q, k and v, and gates.

    Args:
        x (Tensor): Half of the up-projection's output, shape (B, N, E), any strides; copied unless
            channels are adjacent. Float16, bfloat16 or float32, also the dtype of the results;
            accumulated in float32.
        weights (Sequence[Tensor, optional]): Fields of :class:`BeforeCellWeights`, of any floating
            dtype.
        grid (tuple[int, int]): Rows and columns of the token grid, N in all.
        heads (int): NH.
        reverse (bool): Reading direction, as for :func:`mmvil.ops.projections.token_conv`.
        with_gates (bool): Whether to compute the gates, which backward gets from the forward pass.
            Default: True.

    Returns:
        tuple: a (B, N, E), the convolution's output; q, k and v, of shape (B, NH, N, DH) in the
        memory layout of (B, N, E); gates (2, B, NH, N) in float32, igate before fgate, or an empty
        tensor.
    """
    batch, length, channels = x.shape
    tile = channel_tile(x.dtype)
    x_rows, weights = token_rows(x), BeforeCellWeights(*map(contiguous, weights))
    a, q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(4))
    shape = (heads, 2, batch, heads, length) if with_gates else (1, 0)
    gates_by_head = torch.empty(shape, dtype=torch.float32, device=x.device)
    launch(
        before_cell_kernel,
        cdiv(len(x_rows), 64) * heads,
        x=x_rows,
        x_stride=x_rows.stride(0),
        **weights._asdict(),
        a_out=a,
        q_out=q,
        k_out=k,
        v_out=v,
        gates_out=gates_by_head,
        tokens=len(x_rows),
        length=length,
        **convolution_arguments(weights, grid, length, reverse),
        E=channels,
        NH=heads,
        WIDTH=weights.q_weight.shape[-1],
        WITH_GATES=with_gates,
        GATES=gate_columns(heads),
        PRECISION=dot_precision(x.dtype),
        T=64,  # larger tiles take more registers, so that fewer blocks fit
        C=tile,
        num_warps=4,
        num_stages=2 if channels // heads > 4 * tile else 1,  # prefetching pays in long loops
        **limited_registers(x.dtype, blocks=3),
    )
    q, k, v = (split_heads(y, heads) for y in (q, k, v))
    return a, q, k, v, gates_by_head.sum(0) if with_gates else gates_by_head[0]


def channel_tile(dtype: torch.dtype) -> int:
    """Channels per tile of the kernels with matrix products.

    Products need 16, but Triton 3.9 does not compile 16 of half precision for Hopper and Blackwell.
    """
    return 16 if dtype == torch.float32 else 32


def gate_columns(heads: int) -> int:
    """Columns for the 2 NH gates; a matrix product needs at least twice as many."""
    return max(8, next_power_of_2(2 * heads))


def convolution_arguments(
    weights: BeforeCellWeights, grid: Sequence[int], length: int, reverse: bool
):
    """Grid and kernel arguments of the convolution; a causal one sees a single row."""
    *kernel_rows, columns = weights.conv_weight.shape[1:-1]
    kernel_height = kernel_rows[0] if kernel_rows else 1
    height, width = grid if kernel_rows else (1, length)
    return dict(
        height=height,
        width=width,
        SIGN=-1 if reverse else 1,
        SIZE=kernel_height * columns,
        KERNEL_WIDTH=columns,
        ROW=kernel_height // 2,
        COLUMN=columns // 2 if kernel_rows else columns - 1,
    )
