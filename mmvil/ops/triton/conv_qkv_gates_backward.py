# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Gradients of convolution, projections and gates (see :mod:`mmvil.ops.triton.conv_qkv_gates`).

Three launches move 5 + 3 + 4 tensors of shape (B, N, E): the part of q and k reads the gradients of
q, k and c, and a, and writes the gradient of a; the part of v reads its gradient and x, and writes
the gradient of x; the part of the convolution reads the gradient of a, x and its gradient, and
writes the latter. Fusing the last two would take twice the registers.

Sums over tokens (gradients of weights) are matrix products, too. They are accumulated in registers
over many tiles; each program writes one partial sum, and these are added in a fixed order. Without
atomics, results are bitwise reproducible.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous, token_rows, writable_token_rows
from . import cdiv, launch, limited_registers, next_power_of_2, on_input_device
from .activation import sigmoid
from .conv_qkv_gates import (
    BeforeCellWeights,
    block_diagonal,
    channel_tile,
    convolution_arguments,
    gate_columns,
    gate_weights,
    high_and_low,
    neighbour,
    rows,
)
from .reduction import split_tokens
from .tiles import dot, dot_precision, load_row

# -- Kernels ---------------------------------------------------------------------------------------


@triton.jit
def _gates_grad(
    igate_grad, fgate_grad, first,
    tokens, length,
    NH: tl.constexpr, GATES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Load float32 gradients (B, NH, N) of both gates as (T, GATES)."""
    token, gate = first + tl.arange(0, T), tl.arange(0, GATES)
    image = tl.cast(token // length, tl.int64)
    index = (image * ((NH - 1) * length) + token)[:, None]
    pointer = tl.where(gate < NH, igate_grad, fgate_grad) + gate % NH * length
    pointer = pointer[None, :] + index
    present = (token < tokens)[:, None] & (gate < 2 * NH)[None, :]
    return tl.load(pointer, mask=present, other=0)


@triton.jit(do_not_specialize=['tokens', 'length', 'tokens_per_program'])
def projections_backward_kernel(
    source, source_stride, y_grad, y2_grad, c_grad, igate_grad, fgate_grad, weight, bias, weight2,
    bias2, igate_weight, fgate_weight, source_grad, source_grad_stride, sums, sums_stride,
    tokens, length, tokens_per_program,
    OPERAND: tl.constexpr, E: tl.constexpr, NH: tl.constexpr, WIDTH: tl.constexpr,
    GATES: tl.constexpr, GATE_DTYPE: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a projection's source and partial sums of its weight gradients, for
    some tiles of tokens and one tile of a head's channels.

    Either OPERAND is 0, source is a, y and y2 are q and k, or OPERAND is 2, source is x, y is v,
    and there are no y2 and c. Features are (B * N, E); sums are in the order of
    :func:`gradient_sizes`.
    """
    TILES: tl.constexpr = (E // NH + C - 1) // C
    dtype: tl.constexpr = source_grad.dtype.element_ty
    # Programs of the same tokens run at the same time.
    program, tile = tl.program_id(0) // (NH * TILES), tl.program_id(0) % (NH * TILES)
    head, in_head = tile // TILES, tile % TILES * C + tl.arange(0, C)
    present, channel = in_head < E // NH, head * (E // NH) + in_head
    both = tl.arange(0, 2 * GATES)[:, None] // 2

    # Gates are linear in the source, or its SiLU, too: their part needs no q, k and v.
    column = OPERAND * E + channel[None, :]
    gate_weight = gate_weights(igate_weight, fgate_weight, both, column, present[None, :], NH, E)
    by_y = tl.trans(block_diagonal(weight, channel, present, WIDTH, dtype))
    gates_by_source_grad = tl.zeros((2 * GATES, C), tl.float32)
    gates_by_source = dot(gate_weight, by_y.to(tl.float32), gates_by_source_grad, PRECISION)
    weight_grad = tl.zeros((C, C), tl.float32)  # (in, out)
    bias_grad = tl.zeros((16, C), tl.float32)
    gate_bias_grad = tl.zeros((16, 2 * GATES), tl.float32)
    if OPERAND == 0:
        column += E
        gate_weight = gate_weights(
            igate_weight, fgate_weight, both, column, present[None, :], NH, E
        )
        by_y2 = tl.trans(block_diagonal(weight2, channel, present, WIDTH, dtype))
        gates_by_source = dot(gate_weight, by_y2.to(tl.float32), gates_by_source, PRECISION)
        weight2_grad = tl.zeros((C, C), tl.float32)
        bias2_grad = tl.zeros((16, C), tl.float32)
    gates_by_source = gates_by_source.to(GATE_DTYPE)
    # A sum over tokens, spread over 16 rows. The interpreter of Triton 3.5 fills no bfloat16.
    average = tl.full((16, T), 1 / 16, tl.float32).to(dtype)

    begin = program * tokens_per_program
    for first in range(begin, tl.minimum(begin + tokens_per_program, tokens), T):
        inside = (first + tl.arange(0, T) < tokens)[:, None] & present[None, :]
        x = tl.load(rows(source, first, source_stride, channel, T), mask=inside, other=0)
        if OPERAND == 0:
            a = x.to(tl.float32)
            is_open = sigmoid(a)
            slope = is_open * (1 + a * (1 - is_open))
            x = a * is_open
        x = x.to(dtype)
        dy = tl.load(rows(y_grad, first, E, channel, T), mask=inside, other=0).to(dtype)
        gates_grad = _gates_grad(igate_grad, fgate_grad, first, tokens, length, NH, GATES, T)
        gates_grad = high_and_low(gates_grad, GATE_DTYPE)

        weight_grad = dot(tl.trans(x), dy, weight_grad, PRECISION)
        bias_grad = dot(average, dy, bias_grad, PRECISION)
        gate_bias_grad = dot(average.to(GATE_DTYPE), gates_grad, gate_bias_grad, PRECISION)
        dx = dot(dy, by_y, tl.zeros((T, C), tl.float32), PRECISION)
        if OPERAND == 0:
            dy = tl.load(rows(y2_grad, first, E, channel, T), mask=inside, other=0).to(dtype)
            weight2_grad = dot(tl.trans(x), dy, weight2_grad, PRECISION)
            bias2_grad = dot(average, dy, bias2_grad, PRECISION)
            dx = dot(dy, by_y2, dx, PRECISION)
        dx = dot(gates_grad, gates_by_source, dx, PRECISION)
        # The last product of a loop decides how warps share all of them: here by columns.
        gates_by_source_grad = dot(
            tl.trans(gates_grad), x.to(GATE_DTYPE), gates_by_source_grad, PRECISION
        )
        if OPERAND == 0:
            dc = tl.load(rows(c_grad, first, E, channel, T), mask=inside, other=0)
            dx = (dx + dc.to(tl.float32)) * slope
        to = rows(source_grad, first, source_grad_stride, channel, T)
        tl.store(to, dx.to(dtype), mask=inside)

    sums += tl.cast(program, tl.int64) * sums_stride
    gate_bias_grad = tl.sum(gate_bias_grad, axis=0)
    _store_gradients(
        sums, OPERAND,
        weight=weight, bias=bias, weight_grad=weight_grad, bias_grad=bias_grad,
        igate_weight=igate_weight, fgate_weight=fgate_weight,
        gates_by_source_grad=gates_by_source_grad, gate_bias_grad=gate_bias_grad,
        channel=channel, present=present, E=E, NH=NH, WIDTH=WIDTH, PRECISION=PRECISION,
    )  # fmt: skip
    if OPERAND == 0:
        _store_gradients(
            sums, 1,
            weight=weight2, bias=bias2, weight_grad=weight2_grad, bias_grad=bias2_grad,
            igate_weight=igate_weight, fgate_weight=fgate_weight,
            gates_by_source_grad=gates_by_source_grad, gate_bias_grad=gate_bias_grad,
            channel=channel, present=present, E=E, NH=NH, WIDTH=WIDTH, PRECISION=PRECISION,
        )  # fmt: skip
    elif tile == 0:
        gate = tl.arange(0, GATES)
        total = tl.sum(tl.reshape(gate_bias_grad, (GATES, 2)), axis=1)
        tl.store(sums + (3 * WIDTH + 3 + 6 * NH) * E + gate, total, mask=gate < 2 * NH)


@triton.jit
def _store_gradients(
    sums,
    operand: tl.constexpr,
    weight, bias, weight_grad, bias_grad, igate_weight, fgate_weight, gates_by_source_grad,
    gate_bias_grad, channel, present,
    E: tl.constexpr, NH: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the part of the gates, and store a program's sums for one of q, k and v.

    Over all tokens, let G be the sum of gate gradients times sources, and s that of gate gradients.
    With W and b of the projection, the gates' weight W_g has the gradient W G + b s; through the
    gates, W has the gradient W_g G and b has W_g s.
    """
    GATES: tl.constexpr = gate_bias_grad.shape[0] // 2
    gate, column = tl.arange(0, 2 * GATES)[:, None] // 2, operand * E + channel[None, :]
    gate_weight = gate_weights(igate_weight, fgate_weight, gate, column, present[None, :], NH, E)
    weight_grad = dot(tl.trans(gates_by_source_grad), gate_weight, weight_grad, PRECISION)
    block = channel // WIDTH
    tl.store(
        sums + operand * WIDTH * E + channel[None, :] * WIDTH + channel[:, None] % WIDTH,
        weight_grad,
        mask=(block[:, None] == block[None, :]) & present[None, :],
    )
    bias_grad = tl.sum(bias_grad, axis=0) + tl.sum(gate_weight * gate_bias_grad[:, None], axis=0)
    tl.store(sums + (3 * WIDTH + operand) * E + channel, bias_grad, mask=present)

    projection = block_diagonal(weight, channel, present, WIDTH, tl.float32)
    shift = load_row(bias, channel, present)
    gate_weight_grad = dot(
        gates_by_source_grad, projection, gate_bias_grad[:, None] * shift, PRECISION
    )
    gate_weight_grad = tl.sum(tl.reshape(gate_weight_grad, (GATES, 2, channel.shape[0])), axis=1)
    gate = tl.arange(0, GATES)[:, None]
    tl.store(
        sums + (3 * WIDTH + 3) * E + gate * (3 * E) + column,
        gate_weight_grad,
        mask=(gate < 2 * NH) & present[None, :],
    )


@triton.jit(do_not_specialize=['tokens', 'length', 'height', 'width', 'tokens_per_program'])
def convolution_backward_kernel(
    a_grad, x, x_stride, conv_weight, x_grad, x_grad_stride, sums, sums_stride,
    tokens, length, height, width, tokens_per_program,
    E: tl.constexpr, SIGN: tl.constexpr, SIZE: tl.constexpr, KERNEL_WIDTH: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Add the convolution's part to the gradient of x in place, for some tiles of tokens and one of
    channels, and store partial sums of the gradients of bias (E, ) and weight (E, taps), and of
    that of x (E, ).
    """
    program = tl.program_id(0)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    present = channel < E
    x_grad_sum = tl.zeros((T, C), tl.float32)
    bias_grad = tl.zeros((T, C), tl.float32)
    weights, weight_grads = (), ()
    for tap in tl.static_range(SIZE):
        weights = weights + (load_row(conv_weight, tap * E + channel, present),)
        weight_grads = weight_grads + (tl.zeros((T, C), tl.float32),)

    begin = program * tokens_per_program
    for first in range(begin, tl.minimum(begin + tokens_per_program, tokens), T):
        token = first + tl.arange(0, T)
        inside = (token < tokens)[:, None] & present[None, :]
        position = token % length
        row, column = position // width, position % width
        x_m = tl.load(rows(x, first, x_stride, channel, T), mask=inside, other=0).to(tl.float32)
        dx_at = rows(x_grad, first, x_grad_stride, channel, T)
        dx = tl.zeros((T, C), tl.float32)
        da_at = rows(a_grad, first, E, channel, T)
        sums_before, weight_grads = weight_grads, ()
        for tap in tl.static_range(SIZE):
            # The outputs that a token contributes to are on its other side.
            step, there = neighbour(
                row, column, height, width, tap, -SIGN, KERNEL_WIDTH, ROW, COLUMN
            )
            da = tl.load(da_at + step * E, mask=inside & there[:, None], other=0).to(tl.float32)
            if tap == ROW * KERNEL_WIDTH + COLUMN:  # on the token itself
                bias_grad += da
            dx += da * weights[tap]
            weight_grads = weight_grads + (sums_before[tap] + da * x_m,)
        dx += tl.load(dx_at, mask=inside, other=0).to(tl.float32)
        x_grad_sum += dx
        tl.store(dx_at, dx.to(x_grad.dtype.element_ty), mask=inside)

    sums += tl.cast(program, tl.int64) * sums_stride
    tl.store(sums + channel, tl.sum(bias_grad, axis=0), mask=present)
    for tap in tl.static_range(SIZE):
        to = sums + E + channel * SIZE + tap
        tl.store(to, tl.sum(weight_grads[tap], axis=0), mask=present)
    tl.store(sums + (1 + SIZE) * E + channel, tl.sum(x_grad_sum, axis=0), mask=present)


# -- Launches --------------------------------------------------------------------------------------


@on_input_device
def before_cell_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
    igate_grad: Tensor,
    fgate_grad: Tensor,
    c_grad: Tensor,
    a: Tensor,
    x: Tensor,
    weights: Sequence[Tensor | None],
    grid: Sequence[int],
    reverse: bool,
    x_grad: Tensor,
) -> Tensor:
    """Compute the gradients of :func:`before_cell`.

    Args:
        q_grad, k_grad, v_grad (Tensor): Shape (B, NH, N, DH), any strides; copied unless their
            memory is (B, N, E).
        igate_grad, fgate_grad (Tensor): Shape (B, NH, N).
        c_grad (Tensor): Gradient of c = SiLU(a) except through q and k, shape (B, N, E).
        a (Tensor): The convolution's output, shape (B, N, E).
        x, weights, grid, reverse: As in the forward pass.
        x_grad (Tensor): Output for the gradient of x, shape (B, N, E), any token stride.

    Returns:
        Tensor: Partial sums of the gradients of the weights and of that of x, (programs, sum of
            :func:`gradient_sizes`), in float32.

    Raises:
        ValueError: If ``x_grad`` is not a view of rows of channels.
    """
    batch, length, channels = x.shape
    heads, tokens = igate_grad.shape[1], batch * length
    q_grad, k_grad, v_grad = (
        y.transpose(1, 2).flatten(2).contiguous() for y in (q_grad, k_grad, v_grad)
    )
    w = BeforeCellWeights(*map(contiguous, weights))
    x_rows, x_grad_rows = token_rows(x), writable_token_rows(x_grad)
    a_grad = torch.empty((tokens, channels), dtype=a.dtype, device=a.device)

    single = x.dtype == torch.float32
    share, token_tile, sums = before_cell_sums(x, w)
    programs, tile, sizes = len(sums), channel_tile(x.dtype), gradient_sizes(w)
    of_convolution = sizes['conv_bias'] + sizes['conv_weight'] + sizes['x']
    shared = dict(
        sums_stride=sums.stride(0), tokens=tokens, length=length, tokens_per_program=share
    )
    queries_and_keys = dict(
        OPERAND=0,
        source=token_rows(a),
        source_grad=a_grad,
        y_grad=q_grad,
        y2_grad=k_grad,
        c_grad=c_grad.contiguous(),
        weight=w.q_weight,
        bias=w.q_bias,
        weight2=w.k_weight,
        bias2=w.k_bias,
    )
    values = dict(
        OPERAND=2,
        source=x_rows,
        source_grad=x_grad_rows,
        y_grad=v_grad,
        weight=w.v_weight,
        bias=w.v_bias,
        **dict.fromkeys(('y2_grad', 'c_grad', 'weight2', 'bias2')),
    )
    for tensors in (queries_and_keys, values):
        launch(
            projections_backward_kernel,
            programs * heads * cdiv(channels // heads, tile),
            **tensors,
            source_stride=tensors['source'].stride(0),
            source_grad_stride=tensors['source_grad'].stride(0),
            igate_grad=igate_grad.float().contiguous(),
            fgate_grad=fgate_grad.float().contiguous(),
            igate_weight=w.igate_weight,
            fgate_weight=w.fgate_weight,
            sums=sums,
            **shared,
            E=channels,
            NH=heads,
            WIDTH=w.q_weight.shape[-1],
            GATES=gate_columns(heads),
            # Here the range of float32 matters more than its last digits.
            GATE_DTYPE=tl.float32 if single else tl.bfloat16,
            PRECISION=dot_precision(x.dtype),
            T=token_tile,
            C=tile,
            # On an H100, more blocks are faster, even if a few registers spill.
            num_warps=4 if single or heads > 8 else 2 if tensors is queries_and_keys else 1,
            num_stages=1 if single else 3,
        )
    tile = min(64, next_power_of_2(channels))
    launch(
        convolution_backward_kernel,
        programs,
        cdiv(channels, tile),
        a_grad=a_grad,
        x=x_rows,
        x_stride=x_rows.stride(0),
        conv_weight=w.conv_weight,
        x_grad=x_grad_rows,
        x_grad_stride=x_grad_rows.stride(0),
        sums=sums[:, -of_convolution:],
        **shared,
        **convolution_arguments(w, grid, length, reverse),
        E=channels,
        T=8,
        C=tile,
        num_warps=4,
        num_stages=1,
        **limited_registers(x.dtype, blocks=4),
    )
    return sums


def before_cell_sums(x: Tensor, weights: BeforeCellWeights) -> tuple[int, int, Tensor]:
    """Tokens per program of the backward kernels and per tile of the projections', and memory for
    their sums.
    """
    heads, (batch, length, channels) = len(weights.igate_bias), x.shape
    # Many gates take registers, too.
    token_tile = 16 if x.dtype == torch.float32 or heads > 8 else 32
    channel_tiles = heads * cdiv(channels // heads, channel_tile(x.dtype))
    share, programs = split_tokens(batch * length, token_tile, channel_tiles, programs=1024)
    size = sum(gradient_sizes(weights).values())
    return share, token_tile, x.new_empty(programs, size, dtype=torch.float32)


def gradient_sizes(weights: BeforeCellWeights) -> dict[str, int]:
    """Sizes of the parts of :func:`before_cell_backward`'s sums, including space for biases."""
    w = weights
    channels, gates = w.q_weight.shape[0] * w.q_weight.shape[1], w.igate_weight
    return dict(
        **dict.fromkeys(('q_weight', 'k_weight', 'v_weight'), w.q_weight.numel()),
        **dict.fromkeys(('q_bias', 'k_bias', 'v_bias'), channels),
        **dict.fromkeys(('igate_weight', 'fgate_weight'), gates.numel()),
        **dict.fromkeys(('igate_bias', 'fgate_bias'), len(gates)),
        conv_bias=channels,
        conv_weight=w.conv_weight.numel(),
        x=channels,
    )


def split_gradients(sums: Tensor, weights: BeforeCellWeights) -> BeforeCellWeights:
    """Split the sums of :func:`before_cell_backward` into gradients of the parameters, whose
    convolution weight may be (E, 1, 3, 3), too; None for missing biases.
    """
    sizes = gradient_sizes(weights)
    grads = dict(zip(sizes, sums.split([*sizes.values()])))
    named = zip(BeforeCellWeights._fields, weights)
    return BeforeCellWeights(*(None if p is None else grads[n].view(p.shape) for n, p in named))
