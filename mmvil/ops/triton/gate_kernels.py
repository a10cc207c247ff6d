# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Kernels of the gate scalars (see :mod:`mmvil.ops.gates`) and their gradients.

One program per sample and head scans its sequence, in blocks if it is very long. Sums run in a
fixed order without atomics, so results are bitwise reproducible. All scalars are in reading order,
(B * NH, N padded to whole tiles). The logarithms g and M are base 2 and relative to ``base``, the M
of the first token of every tile of ROWS tokens.
"""

import math

import triton
import triton.language as tl

from .tiles import matrix

EPS = tl.constexpr(1e-6)  # of mmvil.ops.reference
LOG2_E = tl.constexpr(1 / math.log(2))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _add_within_run(total_a, starts_a, total_b, starts_b):
    """Combine two segments of a sum that restarts wherever ``starts`` is 1."""
    return tl.where(starts_b != 0, total_b, total_a + total_b), starts_a | starts_b


@triton.jit
def _last(x, index, BLOCK: tl.constexpr):
    """Last element of a block, as a scalar."""
    return tl.sum(tl.where(index == BLOCK - 1, x, 0.0), 0)


@triton.jit(do_not_specialize=['heads', 'length'])
def gate_statistics_kernel(
    igate, fgate, igate_strides, fgate_strides, log_weight, running_max, base, min_denom,
    delta, normalizer, delta_strides, normalizer_strides, inverse, normalizer_grad, stabilizer_grad,
    heads, length,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Compute g and M of every token (float32), and the base of every tile (float64).

    The forward pass needs exp(-m), the smallest denominator, too, and the backward pass (GRAD) 1 /
    denominator and the gradients that need no matrix product: those of the normalizer, and of m as
    a part of the denominator.
    """
    program = tl.program_id(0)
    igate = matrix(igate, igate_strides, program, heads)
    fgate = matrix(fgate, fgate_strides, program, heads)
    if GRAD:
        delta = matrix(delta, delta_strides, program, heads)
        normalizer = matrix(normalizer, normalizer_strides, program, heads)
    padded = tl.cdiv(length, ROWS) * ROWS
    row = tl.cast(program, tl.int64) * padded
    base += row // ROWS
    index, tile = tl.arange(0, BLOCK), tl.arange(0, BLOCK // ROWS)
    log_forget_before = tl.zeros((), tl.float64)
    max_before = tl.full((), float('-inf'), tl.float64)
    for start in range(0, length, BLOCK):
        token = start + index
        inside = token < length
        step = tl.cast(token, tl.int64)
        i = tl.load(igate + step * igate_strides[2], mask=inside, other=0.0).to(tl.float64)
        f = tl.load(fgate + step * fgate_strides[2], mask=inside, other=0.0).to(tl.float64)
        log_forget = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f)))
        log_forget = tl.where(inside, log_forget, 0.0)
        cumulative = log_forget_before + tl.cumsum(log_forget, 0)
        g = tl.where(inside, i - cumulative, float('-inf'))
        largest = tl.maximum(tl.associative_scan(g, 0, _larger), max_before)
        first = tl.reshape(tl.where(index % ROWS == 0, largest, 0.0), (BLOCK // ROWS, ROWS))
        of_tile = tl.sum(first, 1)
        of_token = tl.reshape(tl.broadcast_to(of_tile[:, None], first.shape), (BLOCK,))
        stored = start + tile * ROWS < padded
        tl.store(base + start // ROWS + tile, of_tile * LOG2_E, mask=stored)
        stored = token < padded
        g = (g - of_token) * LOG2_E
        m = tl.where(inside, (largest - of_token) * LOG2_E, float('inf'))
        tl.store(log_weight + row + token, g.to(tl.float32), mask=stored)
        tl.store(running_max + row + token, m.to(tl.float32), mask=stored)
        smallest = tl.exp(-(cumulative + largest)).to(tl.float32)
        if GRAD:
            n = tl.load(normalizer + step * normalizer_strides[2], mask=inside, other=0.0)
            projection = tl.load(delta + step * delta_strides[2], mask=inside, other=0.0)
            by_normalizer = tl.abs(n) >= smallest
            inv = 1.0 / (tl.maximum(tl.abs(n), smallest) + EPS)
            n_grad = tl.where(n > 0, -projection, tl.where(n < 0, projection, 0.0)) * inv
            n_grad = tl.where(by_normalizer, n_grad, 0.0)
            tl.store(inverse + row + token, inv, mask=stored)
            tl.store(normalizer_grad + row + token, n_grad, mask=stored)
            tl.store(stabilizer_grad + row + token, -(projection * inv * EPS), mask=stored)
        else:
            tl.store(min_denom + row + token, smallest, mask=stored)
        log_forget_before = _last(cumulative, index, BLOCK)
        max_before = tl.max(largest, 0)


@triton.jit(do_not_specialize=['heads', 'length', 'padded'])
def gate_gradients_kernel(
    fgate, fgate_strides, log_weight, running_max, log_weight_grad, row_grad, stabilizer_grad,
    igate_grad, fgate_grad, igate_grad_strides, fgate_grad_strides,
    heads, length, padded,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    r"""Compute the gradients of the gates from those of the weights' logarithms.

    m_t equals one a_tj: its gradient belongs to that token j, the latest one with g_j = M_j. So the
    scan from the last token to the first sums the gradients of m, and assigns the sum at every such
    j. F_t appears in row t and in m_t with a plus and in column t with a minus, and log f_s in
    every F_t from s on: one more sum in the same direction.

    Sums over rows and over columns come from the same rounded products, so that their errors cancel
    in this sum.
    """
    program = tl.program_id(0)
    fgate = matrix(fgate, fgate_strides, program, heads)
    igate_grad = matrix(igate_grad, igate_grad_strides, program, heads)
    fgate_grad = matrix(fgate_grad, fgate_grad_strides, program, heads)
    row = tl.cast(program, tl.int64) * padded
    index = tl.arange(0, BLOCK)
    run_before = tl.zeros((), tl.float64)
    sum_before = tl.zeros((), tl.float64)
    for start in range(0, length, BLOCK):
        token = length - 1 - start - index  # the last token comes first
        inside = token >= 0
        at = row + token
        g = tl.load(log_weight + at, mask=inside, other=0.0)
        is_max = g == tl.load(running_max + at, mask=inside, other=0.0)
        next_inside = inside & (token + 1 < length)
        next_g = tl.load(log_weight + at + 1, mask=next_inside, other=0.0)
        next_max = tl.load(running_max + at + 1, mask=next_inside, other=0.0)
        starts = (next_g == next_max).to(tl.int32)
        of_m = tl.load(stabilizer_grad + at, mask=inside, other=0.0).to(tl.float64)
        run, any_start = tl.associative_scan((of_m, starts), 0, _add_within_run)
        run += tl.where(any_start != 0, 0.0, run_before)
        of_i = tl.where(is_max, run, 0.0)
        of_row = of_m
        for part in tl.static_range(PARTS):
            first = tl.cast(part * tl.num_programs(0), tl.int64) * padded
            of_i += tl.load(log_weight_grad + first + at, mask=inside, other=0.0).to(tl.float64)
            of_row += tl.load(row_grad + first + at, mask=inside, other=0.0).to(tl.float64)
        of_log_forget = sum_before + tl.cumsum(tl.where(inside, of_row - of_i, 0.0), 0)

        step = tl.cast(token, tl.int64)
        f = tl.load(fgate + step * fgate_strides[2], mask=inside, other=0.0).to(tl.float64)
        of_f = of_log_forget * (1.0 / (1.0 + tl.exp(f)))
        to = igate_grad + step * igate_grad_strides[2]
        tl.store(to, of_i.to(igate_grad.dtype.element_ty), mask=inside)
        to = fgate_grad + step * fgate_grad_strides[2]
        tl.store(to, of_f.to(fgate_grad.dtype.element_ty), mask=inside)
        run_before = _last(run, index, BLOCK)
        sum_before = _last(of_log_forget, index, BLOCK)
