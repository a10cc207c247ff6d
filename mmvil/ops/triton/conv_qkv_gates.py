# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""Convolution, projections to q, k and v, and gates of the ViL layer as fused kernels.

.. math::
    a = \mathrm{conv}(x), \quad c = \mathrm{SiLU}(a), \quad q = W_q c, \quad k = W_k c, \quad
    v = W_v x, \quad (\tilde i, \tilde f) = W_g [q, k, v] + b_g

All of it is bound by memory traffic, so features make as few trips as possible. In units of one
(B, N, E) tensor:

- Forward, 2 launches: one kernel reads x and writes a, q, k, v (5 units), and a small sum adds the
  heads' parts of the gates.
- Backward, 6 launches and 5 + 8 + 4 units: the forward kernel again without gates; the part of q
  and k reads the gradients of q, k and c, and a, and writes the gradient of a; the part of v reads
  its gradient and x, and writes the gradient of x; the part of the convolution reads the gradient
  of a, x and its gradient, and writes the latter; two small sums add up the gradients of weights.

Reading a where c is needed, instead of computing it from x again, costs one unit in the forward
pass and spares a stencil in each later kernel.

How this maps to the hardware:

- Tokens of all images form one axis, B * N long, so no tile is padded but the last. The position in
  its image tells which neighbours a token has.
- The 4 x 4 blocks are products of a (tokens, 32) tile and a (32, 32) block-diagonal matrix on the
  tensor cores: 7 of 8 products are with zeros, which is still the cheapest way.
- Gates need float32 weights. On tensor cores that is the sum of two numbers of half precision,
  which fill the columns that a tile has in any case.
- Sums over tokens (gradients of weights) are matrix products, too. They stay in registers over many
  tiles; each program writes one partial sum, and these are added in a fixed order. There are no
  atomics, and the same input gives the same bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import by_head, contiguous, token_rows, token_rows_to_write
from . import on_its_device
from .reduction import partial_sums, split_tokens
from .tiles import dot, dot_precision, load_row


class BeforeCellWeights(NamedTuple):
    """Parameters between up-projection and cell, E channels in NH heads. Biases may be None."""

    conv_weight: Tensor  # (E, 1, 3, 3) or (E, 1, K)
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


# ------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def _neighbour(
    row,
    column,
    height,
    width,
    tap,
    SIGN: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
):
    """Offset in tokens to the neighbour under a tap of the convolution kernel, and its presence.

    (ROW, COLUMN) is the tap on the token itself; SIGN -1 rotates the kernel by 180 degrees.
    """
    down = SIGN * (tap // KERNEL_WIDTH - ROW)
    right = SIGN * (tap % KERNEL_WIDTH - COLUMN)
    there = (row + down >= 0) & (row + down < height)
    there &= (column + right >= 0) & (column + right < width)
    return down * width + right, there


@triton.jit
def _block_diagonal(weight, channel, present, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Load blocks (E / WIDTH, WIDTH, WIDTH) as a dense matrix (in, out) of a tile's channels."""
    block = channel // WIDTH
    inside = (block[:, None] == block[None, :]) & present[None, :]
    index = channel[None, :] * WIDTH + channel[:, None] % WIDTH
    return tl.load(weight + index, mask=inside, other=0).to(dtype)


@triton.jit
def _both_gates(igate, fgate, gate, i_offset, f_offset, present, NH: tl.constexpr):
    """Load igate where gate < NH, fgate where gate < 2 NH, else zero."""
    i_part = tl.load(igate + i_offset, mask=present & (gate < NH), other=0)
    f_part = tl.load(fgate + f_offset, mask=present & (gate >= NH) & (gate < 2 * NH), other=0)
    return i_part.to(tl.float32) + f_part.to(tl.float32)


@triton.jit
def _gate_weights(igate, fgate, gate, column, present, NH: tl.constexpr, E: tl.constexpr):
    """Load weights (NH, 3E) of both gates at gates and columns that broadcast to a tile."""
    i_offset = gate * (3 * E) + column
    return _both_gates(igate, fgate, gate, i_offset, i_offset - NH * 3 * E, present, NH)


@triton.jit
def _high_or_low(x, low, dtype: tl.constexpr):
    """Round a float32 x to the dtype, or, where low, the rest of that rounding."""
    high = x.to(dtype).to(tl.float32)
    return tl.where(low, x - high, high).to(dtype)


@triton.jit
def before_cell_kernel(
    x,
    x_stride,
    conv_weight,
    conv_bias,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    v_weight,
    v_bias,
    igate_weight,
    igate_bias,
    fgate_weight,
    fgate_bias,
    a_out,
    q_out,
    k_out,
    v_out,
    gates_out,
    tokens,
    length,
    height,
    width,
    E: tl.constexpr,
    NH: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGN: tl.constexpr,
    SIZE: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    WITH_GATES: tl.constexpr,
    GATES: tl.constexpr,
    PRECISION: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
):
    """Compute a, q, k, v (B * N, E) and the head's part of all gates, gates_out[head] of shape
    (2, B, NH, N), for one tile of tokens and one head.
    """
    DH: tl.constexpr = E // NH
    dtype: tl.constexpr = a_out.dtype.element_ty
    head = tl.program_id(1)
    token = tl.program_id(0) * T + tl.arange(0, T)
    in_batch = token < tokens
    position = token % length
    row, column = position // width, position % width
    offset = token.to(tl.int64)[:, None]

    part = tl.arange(0, 2 * GATES)  # both halves of float32 gates, see _high_or_low
    gate, low = part % GATES, part >= GATES
    gates = tl.zeros((T, 2 * GATES), tl.float32)
    zero = tl.zeros((T, C), tl.float32)
    for first in range(0, DH, C):
        channel = head * DH + first + tl.arange(0, C)
        present = first + tl.arange(0, C) < DH
        inside = in_batch[:, None] & present[None, :]

        a = tl.zeros((T, C), tl.float32) + load_row(conv_bias, channel, present)
        for tap in range(SIZE):
            step, there = _neighbour(
                row, column, height, width, tap, SIGN, KERNEL_WIDTH, ROW, COLUMN
            )
            x_tap = tl.load(
                x + (offset + step) * x_stride + channel[None, :],
                mask=inside & there[:, None],
                other=0,
            )
            weight = load_row(conv_weight, channel * SIZE + tap, present)
            a += x_tap.to(tl.float32) * weight
        out = offset * E + channel[None, :]
        a = a.to(dtype)
        tl.store(a_out + out, a, mask=inside)
        c = (a.to(tl.float32) * tl.sigmoid(a.to(tl.float32))).to(dtype)

        x_m = tl.load(x + offset * x_stride + channel[None, :], mask=inside, other=0).to(dtype)
        q_map = _block_diagonal(q_weight, channel, present, WIDTH, dtype)
        k_map = _block_diagonal(k_weight, channel, present, WIDTH, dtype)
        v_map = _block_diagonal(v_weight, channel, present, WIDTH, dtype)
        q = dot(c, q_map, zero + load_row(q_bias, channel, present), PRECISION)
        k = dot(c, k_map, zero + load_row(k_bias, channel, present), PRECISION)
        v = dot(x_m, v_map, zero + load_row(v_bias, channel, present), PRECISION)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        tl.store(q_out + out, q, mask=inside)
        tl.store(k_out + out, k, mask=inside)
        tl.store(v_out + out, v, mask=inside)

        if WITH_GATES:
            at = channel[:, None]
            here = present[:, None]
            wq = _gate_weights(igate_weight, fgate_weight, gate[None, :], at, here, NH, E)
            wk = _gate_weights(igate_weight, fgate_weight, gate[None, :], at + E, here, NH, E)
            wv = _gate_weights(igate_weight, fgate_weight, gate[None, :], at + 2 * E, here, NH, E)
            wq = _high_or_low(wq, low[None, :], dtype)
            wk = _high_or_low(wk, low[None, :], dtype)
            wv = _high_or_low(wv, low[None, :], dtype)
            gates = dot(q, wq, gates, PRECISION)
            gates = dot(k, wk, gates, PRECISION)
            gates = dot(v, wv, gates, PRECISION)

    if WITH_GATES:
        total = tl.sum(tl.reshape(gates, (T, 2, GATES)), axis=1)
        gate = tl.arange(0, GATES)
        bias = _both_gates(igate_bias, fgate_bias, gate, gate, gate - NH, gate < 2 * NH, NH)
        total += tl.where(head == 0, bias, 0)[None, :]
        batch = token // length
        # gates_out[head, gate // NH, batch, gate % NH, position]
        images = tokens // length
        index = (head * 2 + gate[None, :] // NH) * images + batch[:, None]
        index = index * NH + gate[None, :] % NH
        index = index.to(tl.int64) * length + position[:, None]
        tl.store(gates_out + index, total, mask=in_batch[:, None] & (gate < 2 * NH)[None, :])


@triton.jit
def projections_backward_kernel(
    source,
    source_stride,
    y_grad,
    y2_grad,
    batch_stride,
    head_stride,
    position_stride,
    igate_grad,
    fgate_grad,
    c_grad,
    weight,
    bias,
    weight2,
    bias2,
    igate_weight,
    fgate_weight,
    source_grad,
    source_grad_stride,
    sums,
    sums_stride,
    tokens,
    length,
    tokens_per_program,
    OPERAND: tl.constexpr,
    E: tl.constexpr,
    NH: tl.constexpr,
    WIDTH: tl.constexpr,
    GATES: tl.constexpr,
    GATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
):
    """Compute the gradients of a projection's source, and partial sums of those of its weights, for
    some tiles of tokens and one tile of a head's channels.

    Either OPERAND is 0, source is a, y and y2 are q and k, or OPERAND is 2, source is x, y is v,
    and there are no y2 and c. Sums are in the order of :func:`split_gradients`.
    """
    DH: tl.constexpr = E // NH
    TILES: tl.constexpr = (DH + C - 1) // C
    dtype: tl.constexpr = source_grad.dtype.element_ty
    program = tl.program_id(0)
    head = tl.program_id(1) // TILES
    in_head = (tl.program_id(1) % TILES) * C + tl.arange(0, C)
    present = in_head < DH
    channel = head * DH + in_head
    part = tl.arange(0, 2 * GATES)
    gate, low = part % GATES, part >= GATES
    row = gate[:, None]
    column = OPERAND * E + channel[None, :]

    # Gates are linear in the source, or its SiLU, too: their part needs no q, k and v.
    projection = _block_diagonal(weight, channel, present, WIDTH, dtype)
    gate_weight = _gate_weights(igate_weight, fgate_weight, row, column, present[None, :], NH, E)
    gates_by_source_grad = tl.zeros((2 * GATES, C), tl.float32)
    by_projection = tl.trans(projection.to(tl.float32))
    gates_by_source = dot(gate_weight, by_projection, gates_by_source_grad, PRECISION)
    weight_grad = tl.zeros((C, C), tl.float32)  # (in, out)
    bias_grad = tl.zeros((16, C), tl.float32)
    gate_bias_grad = tl.zeros((16, 2 * GATES), tl.float32)
    if OPERAND == 0:
        projection2 = _block_diagonal(weight2, channel, present, WIDTH, dtype)
        column2 = column + E
        gate_weight = _gate_weights(
            igate_weight, fgate_weight, row, column2, present[None, :], NH, E
        )
        by_projection = tl.trans(projection2.to(tl.float32))
        gates_by_source = dot(gate_weight, by_projection, gates_by_source, PRECISION)
        weight2_grad = tl.zeros((C, C), tl.float32)
        bias2_grad = tl.zeros((16, C), tl.float32)
    gates_by_source = gates_by_source.to(GATE_DTYPE)
    average = tl.full((16, T), 1 / 16, dtype)  # a sum over tokens, spread over 16 rows

    begin = program * tokens_per_program
    for first in range(begin, tl.minimum(begin + tokens_per_program, tokens), T):
        token = first + tl.arange(0, T)
        in_batch = token < tokens
        inside = in_batch[:, None] & present[None, :]
        batch, position = token // length, token % length
        offset = token.to(tl.int64)[:, None]

        index = (batch * (NH * length) + position)[:, None] + gate[None, :] * length
        gates_grad = _both_gates(
            igate_grad, fgate_grad, gate[None, :], index, index - NH * length, in_batch[:, None], NH
        )
        gates_grad = _high_or_low(gates_grad, low[None, :], GATE_DTYPE)
        gate_bias_grad = dot(average.to(GATE_DTYPE), gates_grad, gate_bias_grad, PRECISION)

        x = tl.load(source + offset * source_stride + channel[None, :], mask=inside, other=0)
        if OPERAND == 0:
            a = x.to(tl.float32)
            is_open = tl.sigmoid(a)
            x = a * is_open
        x = x.to(dtype)
        by_channel = tl.trans(x)
        head_offset = batch.to(tl.int64) * batch_stride + position.to(tl.int64) * position_stride
        head_offset = head_offset[:, None] + head.to(tl.int64) * head_stride + in_head[None, :]
        dy = tl.load(y_grad + head_offset, mask=inside, other=0).to(dtype)
        weight_grad = dot(by_channel, dy, weight_grad, PRECISION)
        bias_grad = dot(average, dy, bias_grad, PRECISION)
        dx = dot(dy, tl.trans(projection), tl.zeros((T, C), tl.float32), PRECISION)
        if OPERAND == 0:
            dy = tl.load(y2_grad + head_offset, mask=inside, other=0).to(dtype)
            weight2_grad = dot(by_channel, dy, weight2_grad, PRECISION)
            bias2_grad = dot(average, dy, bias2_grad, PRECISION)
            dx = dot(dy, tl.trans(projection2), dx, PRECISION)
        dx = dot(gates_grad, gates_by_source, dx, PRECISION)
        gates_by_source_grad = dot(
            tl.trans(gates_grad), x.to(GATE_DTYPE), gates_by_source_grad, PRECISION
        )
        if OPERAND == 0:
            dc = tl.load(c_grad + offset * E + channel[None, :], mask=inside, other=0)
            dx = (dx + dc.to(tl.float32)) * is_open * (1 + a * (1 - is_open))
        out = source_grad + offset * source_grad_stride + channel[None, :]
        tl.store(out, dx.to(dtype), mask=inside)

    sums += program.to(tl.int64) * sums_stride
    gate_bias_grad = tl.sum(gate_bias_grad, axis=0)
    _store_gradients(
        sums,
        OPERAND,
        weight=weight,
        bias=bias,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
        igate_weight=igate_weight,
        fgate_weight=fgate_weight,
        gates_by_source_grad=gates_by_source_grad,
        gate_bias_grad=gate_bias_grad,
        channel=channel,
        present=present,
        E=E,
        NH=NH,
        WIDTH=WIDTH,
        GATES=GATES,
        PRECISION=PRECISION,
        C=C,
    )
    if OPERAND == 0:
        _store_gradients(
            sums,
            1,
            weight=weight2,
            bias=bias2,
            weight_grad=weight2_grad,
            bias_grad=bias2_grad,
            igate_weight=igate_weight,
            fgate_weight=fgate_weight,
            gates_by_source_grad=gates_by_source_grad,
            gate_bias_grad=gate_bias_grad,
            channel=channel,
            present=present,
            E=E,
            NH=NH,
            WIDTH=WIDTH,
            GATES=GATES,
            PRECISION=PRECISION,
            C=C,
        )
    elif tl.program_id(1) == 0:
        number = tl.arange(0, GATES)
        total = tl.sum(tl.reshape(gate_bias_grad, (2, GATES)), axis=0)
        tl.store(sums + (3 * WIDTH + 3 + 6 * NH) * E + number, total, mask=number < 2 * NH)


@triton.jit
def _store_gradients(
    sums,
    operand: tl.constexpr,
    weight,
    bias,
    weight_grad,
    bias_grad,
    igate_weight,
    fgate_weight,
    gates_by_source_grad,
    gate_bias_grad,
    channel,
    present,
    E: tl.constexpr,
    NH: tl.constexpr,
    WIDTH: tl.constexpr,
    GATES: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
):
    """Add the part of the gates, and store a program's sums for one of q, k and v.

    Over all tokens, let G be the sum of gate gradients times sources, and s that of gate gradients.
    The gates' weight W_g has the gradient W G + b s, where W and b are those of the projection, and
    through the gates W gets W_g G, and b gets W_g s.
    """
    part = tl.arange(0, 2 * GATES)
    column = operand * E + channel[None, :]
    gate_weight = _gate_weights(
        igate_weight, fgate_weight, (part % GATES)[:, None], column, present[None, :], NH, E
    )
    weight_grad = dot(tl.trans(gates_by_source_grad), gate_weight, weight_grad, PRECISION)
    block = channel // WIDTH
    tl.store(
        sums + operand * WIDTH * E + channel[None, :] * WIDTH + channel[:, None] % WIDTH,
        weight_grad,
        mask=(block[:, None] == block[None, :]) & present[None, :],
    )
    bias_grad = tl.sum(bias_grad, axis=0) + tl.sum(gate_weight * gate_bias_grad[:, None], axis=0)
    tl.store(sums + (3 * WIDTH + operand) * E + channel, bias_grad, mask=present)

    projection = _block_diagonal(weight, channel, present, WIDTH, tl.float32)
    shift = load_row(bias, channel, present)
    gate_weight_grad = dot(
        gates_by_source_grad, projection, gate_bias_grad[:, None] * shift, PRECISION
    )
    gate_weight_grad = tl.sum(tl.reshape(gate_weight_grad, (2, GATES, C)), axis=0)
    gate = tl.arange(0, GATES)[:, None]
    tl.store(
        sums + (3 * WIDTH + 3) * E + gate * (3 * E) + column,
        gate_weight_grad,
        mask=(gate < 2 * NH) & present[None, :],
    )


@triton.jit
def convolution_backward_kernel(
    a_grad,
    x,
    x_stride,
    conv_weight,
    x_grad,
    x_grad_stride,
    sums,
    sums_stride,
    tokens,
    length,
    height,
    width,
    tokens_per_program,
    E: tl.constexpr,
    SIGN: tl.constexpr,
    SIZE: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
):
    """Add the convolution's part to the gradient of x in place, for some tiles of tokens and one of
    channels, and store partial sums of the gradients of weight (E, taps) and bias (E, ).
    """
    program = tl.program_id(0)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    present = channel < E
    bias_grad = tl.zeros((T, C), tl.float32)
    weights, weight_grads = (), ()
    for tap in tl.static_range(SIZE):
        weights = weights + (load_row(conv_weight, channel * SIZE + tap, present),)
        weight_grads = weight_grads + (tl.zeros((T, C), tl.float32),)

    begin = program * tokens_per_program
    for first in range(begin, tl.minimum(begin + tokens_per_program, tokens), T):
        token = first + tl.arange(0, T)
        inside = (token < tokens)[:, None] & present[None, :]
        position = token % length
        row, column = position // width, position % width
        offset = token.to(tl.int64)[:, None]
        x_m = tl.load(x + offset * x_stride + channel[None, :], mask=inside, other=0)
        x_m = x_m.to(tl.float32)
        dx_at = x_grad + offset * x_grad_stride + channel[None, :]
        dx = tl.load(dx_at, mask=inside, other=0).to(tl.float32)
        sums_before, weight_grads = weight_grads, ()
        for tap in tl.static_range(SIZE):
            # The outputs that a token contributes to are on its other side.
            step, there = _neighbour(
                row, column, height, width, tap, -SIGN, KERNEL_WIDTH, ROW, COLUMN
            )
            da = tl.load(
                a_grad + (offset + step) * E + channel[None, :],
                mask=inside & there[:, None],
                other=0,
            ).to(tl.float32)
            if tap == ROW * KERNEL_WIDTH + COLUMN:  # on the token itself
                bias_grad += da
            dx += da * weights[tap]
            weight_grads = weight_grads + (sums_before[tap] + da * x_m,)
        tl.store(dx_at, dx.to(x_grad.dtype.element_ty), mask=inside)

    sums += program.to(tl.int64) * sums_stride
    for tap in tl.static_range(SIZE):
        tl.store(sums + channel * SIZE + tap, tl.sum(weight_grads[tap], axis=0), mask=present)
    tl.store(sums + SIZE * E + channel, tl.sum(bias_grad, axis=0), mask=present)


# ------------------------------------------------------------------------------------------------
# Launches


@on_its_device
def before_cell(
    x: Tensor,
    weights: BeforeCellWeights,
    grid: Sequence[int],
    heads: int,
    reverse: bool,
    with_gates: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute convolution, SiLU, projections to q, k and v, and gates.

    Args:
        x (Tensor): Half of the up-projection's output, shape (B, N, E), any strides; copied
            unless channels are side by side. Float16, bfloat16 or float32, as the results; sums
            are taken in float32.
        weights (BeforeCellWeights): Parameters, of any floating dtype.
        grid (tuple[int, int]): Rows and columns of the token grid, their product is N.
        heads (int): NH.
        reverse (bool): Reading direction, as for :func:`mmvil.ops.projections.token_conv`.
        with_gates (bool): Whether to compute gates, which are kept for backward. Default: True.

    Returns:
        tuple: a (B, N, E), the convolution's output; q, k and v, of shape (B, NH, N, DH) and with
        the memory of (B, N, E); gates (2, B, NH, N) in float32, igate before fgate, or an empty
        tensor.
    """
    batch, length, channels = x.shape
    rows, weights = token_rows(x), BeforeCellWeights(*map(contiguous, weights))
    # Larger tiles load weights less often, but should leave no multiprocessor idle.
    token_tile = 128 if len(rows) * heads >= 65536 else 64
    a, q, k, v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(4))
    shape = (heads, 2, batch, heads, length) if with_gates else (1, 0)
    gates_by_head = torch.empty(shape, dtype=torch.float32, device=x.device)
    if len(rows):
        before_cell_kernel[(triton.cdiv(len(rows), token_tile), heads)](
            x=rows,
            x_stride=rows.stride(0),
            **weights._asdict(),
            a_out=a,
            q_out=q,
            k_out=k,
            v_out=v,
            gates_out=gates_by_head,
            tokens=len(rows),
            length=length,
            **_convolution(weights, grid, length, reverse),
            E=channels,
            NH=heads,
            WIDTH=weights.q_weight.shape[-1],
            WITH_GATES=with_gates,
            GATES=_gate_columns(heads),
            PRECISION=dot_precision(x.dtype),
            T=token_tile,
            C=_channel_tile(channels // heads, x.dtype),
            num_warps=4,
            num_stages=1,
        )
    q, k, v = (by_head(y, heads) for y in (q, k, v))
    return a, q, k, v, gates_by_head.sum(0)


@on_its_device
def before_cell_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
    igate_grad: Tensor,
    fgate_grad: Tensor,
    c_grad: Tensor,
    a: Tensor,
    x: Tensor,
    weights: BeforeCellWeights,
    grid: Sequence[int],
    reverse: bool,
    x_grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of :func:`before_cell`.

    Args:
        q_grad, k_grad, v_grad (Tensor): Shape (B, NH, N, DH), any strides.
        igate_grad, fgate_grad (Tensor): Shape (B, NH, N).
        c_grad (Tensor): Gradient of c = SiLU(a) without the part of q and k, shape (B, N, E).
        a (Tensor): The convolution's output, shape (B, N, E).
        x, weights, grid, reverse: As in the forward pass.
        x_grad (Tensor): The gradient of x is written here, shape (B, N, E), any token stride.

    Returns:
        tuple[Tensor, Tensor]: Flat gradients of the parameters of the convolution and of the
        others, for :func:`split_gradients`.

    Raises:
        ValueError: If ``x_grad`` cannot be written as rows of channels.
    """
    batch, length, channels = x.shape
    heads, tokens = igate_grad.shape[1], batch * length
    qkv_grads = (q_grad, k_grad, v_grad)
    if len({y.stride() for y in qkv_grads}) > 1 or q_grad.stride(3) != 1:
        qkv_grads = [y.contiguous() for y in qkv_grads]
    weights = BeforeCellWeights(*map(contiguous, weights))
    rows, x_grad_rows = token_rows(x), token_rows_to_write(x_grad)
    a_grad = torch.empty((tokens, channels), dtype=a.dtype, device=a.device)

    width, tile = weights.q_weight.shape[-1], _channel_tile(channels // heads, x.dtype)
    channel_tiles = heads * triton.cdiv(channels // heads, tile)
    token_tile = 16 if x.dtype == torch.float32 else 32  # what registers hold
    warps = 2 if tile < token_tile else 4
    share, programs = split_tokens(tokens, token_tile, channel_tiles)
    conv_size, size = gradient_sizes(weights)
    sums = partial_sums(programs, size, like=x)
    if programs:
        q_grad, k_grad, v_grad = qkv_grads
        batch_stride, head_stride, position_stride, _ = q_grad.stride()
        queries_and_keys = dict(
            OPERAND=0,
            source=token_rows(a),
            source_grad=a_grad,
            y_grad=q_grad,
            y2_grad=k_grad,
            c_grad=c_grad.contiguous(),
            weight=weights.q_weight,
            bias=weights.q_bias,
            weight2=weights.k_weight,
            bias2=weights.k_bias,
        )
        values = dict(
            OPERAND=2,
            source=rows,
            source_grad=x_grad_rows,
            y_grad=v_grad,
            y2_grad=None,
            c_grad=None,
            weight=weights.v_weight,
            bias=weights.v_bias,
            weight2=None,
            bias2=None,
        )
        for tensors in (queries_and_keys, values):
            projections_backward_kernel[(programs, channel_tiles)](
                **tensors,
                source_stride=tensors['source'].stride(0),
                source_grad_stride=tensors['source_grad'].stride(0),
                batch_stride=batch_stride,
                head_stride=head_stride,
                position_stride=position_stride,
                igate_grad=igate_grad.contiguous(),
                fgate_grad=fgate_grad.contiguous(),
                igate_weight=weights.igate_weight,
                fgate_weight=weights.fgate_weight,
                sums=sums,
                sums_stride=sums.stride(0),
                tokens=tokens,
                length=length,
                tokens_per_program=share,
                E=channels,
                NH=heads,
                WIDTH=width,
                GATES=_gate_columns(heads),
                # The range of float32 counts more here than the last digits.
                GATE_DTYPE=tl.float32 if x.dtype == torch.float32 else tl.bfloat16,
                PRECISION=dot_precision(x.dtype),
                T=token_tile,
                C=tile,
                num_warps=warps,
                num_stages=1,
            )

    token_tile, tile = 8, min(64, triton.next_power_of_2(channels))
    channel_tiles = triton.cdiv(channels, tile)
    share, programs = split_tokens(tokens, token_tile, channel_tiles)
    conv_sums = partial_sums(programs, conv_size, like=x)
    if programs:
        convolution_backward_kernel[(programs, channel_tiles)](
            a_grad=a_grad,
            x=rows,
            x_stride=rows.stride(0),
            conv_weight=weights.conv_weight,
            x_grad=x_grad_rows,
            x_grad_stride=x_grad_rows.stride(0),
            sums=conv_sums,
            sums_stride=conv_sums.stride(0),
            tokens=tokens,
            length=length,
            tokens_per_program=share,
            **_convolution(weights, grid, length, reverse),
            E=channels,
            T=token_tile,
            C=tile,
            num_warps=4,
            num_stages=1,
        )
    return conv_sums.sum(0), sums.sum(0)


def gradient_sizes(weights: BeforeCellWeights) -> tuple[int, int]:
    """Sizes of the results of :func:`before_cell_backward`, room for biases included."""
    w = weights
    channels = len(w.conv_weight)
    projections = 3 * w.q_weight.numel() + 3 * channels
    return w.conv_weight.numel() + channels, projections + 2 * (
        w.igate_weight.numel() + len(w.igate_weight)
    )


def split_gradients(
    conv_grads: Tensor, other_grads: Tensor, weights: BeforeCellWeights
) -> BeforeCellWeights:
    """Split the results of :func:`before_cell_backward` by parameter; None for missing biases."""
    w = weights
    gates, columns = w.igate_weight.shape
    sizes = dict(
        **dict.fromkeys(('q_weight', 'k_weight', 'v_weight'), w.q_weight.numel()),
        **dict.fromkeys(('q_bias', 'k_bias', 'v_bias'), columns // 3),
        **dict.fromkeys(('igate_weight', 'fgate_weight'), gates * columns),
        **dict.fromkeys(('igate_bias', 'fgate_bias'), gates),
    )
    grads = dict(zip(sizes, other_grads.split([*sizes.values()])))
    grads['conv_weight'], grads['conv_bias'] = conv_grads.split(
        (w.conv_weight.numel(), len(w.conv_weight))
    )
    return BeforeCellWeights(
        **{n: None if p is None else grads[n].view(p.shape) for n, p in w._asdict().items()}
    )


def _channel_tile(head_width: int, dtype: torch.dtype) -> int:
    """Channels in a tile of the kernels that multiply matrices; these need at least 16."""
    return 32 if head_width > 16 and dtype != torch.float32 else 16


def _gate_columns(heads: int) -> int:
    """Columns for the 2 NH gates; a matrix product needs at least twice as many."""
    return max(8, triton.next_power_of_2(2 * heads))


def _convolution(weights: BeforeCellWeights, grid: Sequence[int], length: int, reverse: bool):
    """Arguments for grid and kernel of the convolution; a causal one sees a single row."""
    *rows, columns = weights.conv_weight.shape[2:]
    kernel_height = rows[0] if rows else 1
    height, width = grid if rows else (1, length)
    return dict(
        height=height,
        width=width,
        SIGN=-1 if reverse else 1,
        SIZE=kernel_height * columns,
        KERNEL_WIDTH=columns,
        ROW=kernel_height // 2,
        COLUMN=columns // 2 if rows else columns - 1,
    )
