# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Matrix products of the chunkwise mLSTM (equations in :mod:`mmvil.ops.triton.mlstm_launch`).

A program works on one tile of tokens or of a state, of one sample and head. Positions count in
reading order: a reversed cell gets negative strides, so that the kernels know one direction only.
Gate scalars g and M come in float64 and are rounded as differences from the M of a token nearby.
"""

import triton
import triton.language as tl

from .tiles import (
    add_product,
    add_product_in_range,
    dot,
    load_tile,
    load_tiles,
    matrix,
    scaled,
    scores,
    store_tiles,
    zero_tiles,
)

EPS = tl.constexpr(1e-6)  # of mmvil.ops.reference


@triton.jit(do_not_specialize=['heads', 'length'])
def denominators_kernel(
    h_grad,
    h,
    normalizer,
    h_grad_strides,
    h_strides,
    normalizer_strides,
    floor,
    inverse,
    normalizer_grad,
    row_grad,
    stabilizer_grad,
    heads,
    length,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute 1 / denominator of every token, and the gradients that need no matrix product."""
    tiles = tl.cdiv(length, ROWS)
    program, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    projection = tl.zeros((ROWS,), tl.float32)
    h_grad = matrix(h_grad, h_grad_strides, program, heads)
    h = matrix(h, h_strides, program, heads)
    for left in range(0, DH, WIDTH):
        grad_tile = load_tile(h_grad, h_grad_strides, start, length, left, ROWS, DH, WIDTH)
        h_tile = load_tile(h, h_strides, start, length, left, ROWS, DH, WIDTH)
        projection += tl.sum(grad_tile.to(tl.float32) * h_tile.to(tl.float32), 1)
    token = start + tl.arange(0, ROWS)
    inside = token < length
    at = tl.cast(program, tl.int64) * length + token
    n = matrix(normalizer, normalizer_strides, program, heads)
    n = tl.load(n + tl.cast(token, tl.int64) * normalizer_strides[2], mask=inside, other=0.0)
    smallest = tl.load(floor + at, mask=inside, other=1.0)
    by_normalizer = tl.abs(n) >= smallest
    inv = 1.0 / (tl.maximum(tl.abs(n), smallest) + EPS)
    eps_part = projection * inv * EPS
    n_grad = tl.where(n > 0, -projection, tl.where(n < 0, projection, 0.0)) * inv
    tl.store(inverse + at, inv, mask=inside)
    tl.store(normalizer_grad + at, tl.where(by_normalizer, n_grad, 0.0), mask=inside)
    tl.store(row_grad + at, tl.where(by_normalizer, 0.0, projection - eps_part), mask=inside)
    tl.store(stabilizer_grad + at, -eps_part, mask=inside)


@triton.jit(do_not_specialize=['heads', 'length'])
def states_kernel(
    a,
    b,
    a_strides,
    b_strides,
    source,
    running_max,
    inverse,
    normalizer_grad,
    states,
    state_vectors,
    heads,
    length,
    chunk,
    scale,
    DH: tl.constexpr,
    A_WIDTH: tl.constexpr,
    B_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one (A_WIDTH, B_WIDTH) tile of the incoming state of each chunk but the first, or
    (GRAD) of its gradient.

    The state is the sum of k times v from the first token on. Its gradient is the sum of q times
    the gradient of h from the last token back. ``states`` is (B * NH, chunks - 1, DH, DH),
    ``state_vectors`` (B * NH, chunks - 1, DH).
    """
    across: tl.constexpr = (DH + B_WIDTH - 1) // B_WIDTH
    down: tl.constexpr = (DH + A_WIDTH - 1) // A_WIDTH
    program = tl.program_id(0) // (across * down)
    tile = tl.program_id(0) % (across * down)
    top, left = tile // across * A_WIDTH, tile % across * B_WIDTH
    a = matrix(a, a_strides, program, heads)
    b = matrix(b, b_strides, program, heads)
    row = tl.cast(program, tl.int64) * length
    bounds = tl.cdiv(length, chunk) - 1
    STATE = states.dtype.element_ty

    total = tl.zeros((A_WIDTH, B_WIDTH), tl.float32)
    vector = tl.zeros((A_WIDTH,), tl.float32)
    # From the first token to the last bound between chunks, or from the last token back to the
    # first bound. The running sum is always relative to M at its front.
    first = chunk if GRAD else 0
    last = length if GRAD else bounds * chunk
    steps = tl.cdiv(last - first, ROWS)
    front = tl.load(running_max + row + (length - 1 if GRAD else 0))
    for step in range(0, steps):
        start = first + (steps - 1 - step if GRAD else step) * ROWS
        bound = start if GRAD else start + ROWS
        new_front = tl.load(running_max + row + bound - 1)
        token = start + tl.arange(0, ROWS)
        inside = token < last
        if GRAD:
            m = tl.load(running_max + row + token, mask=inside, other=float('inf'))
            weight = tl.exp((new_front - m).to(tl.float32)) * scale
            of_n = weight * tl.load(normalizer_grad + row + token, mask=inside, other=0.0)
            weight *= tl.load(inverse + row + token, mask=inside, other=0.0)
            decay = tl.exp((new_front - front).to(tl.float32))
        else:
            g = tl.load(source + row + token)
            weight = tl.exp((g - new_front).to(tl.float32))
            of_n = weight
            decay = tl.exp((front - new_front).to(tl.float32))
        a_tile = load_tile(a, a_strides, start, last, top, ROWS, DH, A_WIDTH).to(tl.float32)
        b_tile = load_tile(b, b_strides, start, last, left, ROWS, DH, B_WIDTH)
        weighted = (a_tile * weight[:, None]).to(STATE)
        total = dot(tl.trans(weighted), b_tile.to(STATE), total * decay, PRECISION)
        vector = vector * decay + tl.sum(a_tile * of_n[:, None], 0)
        front = new_front
        # Written at the bounds only: by a mask, as a branch would end the pipelining.
        width_if_bound = tl.where(bound % chunk == 0, DH, 0)
        index = tl.cast(program, tl.int64) * bounds + (bound // chunk - 1)
        down_index, across_index = top + tl.arange(0, A_WIDTH), left + tl.arange(0, B_WIDTH)
        to = states + index * DH * DH + down_index[:, None] * DH + across_index[None, :]
        mask = (down_index < width_if_bound)[:, None] & (across_index < DH)[None, :]
        tl.store(to, total.to(STATE), mask=mask)
        to = state_vectors + index * DH + down_index
        tl.store(to, vector, mask=down_index < tl.where(left == 0, width_if_bound, 0))


@triton.jit
def _read_state(
    a,
    a_strides,
    start,
    length,
    state,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply rows of a by a state (DH, DH) or its transpose, into a tuple of tiles."""
    strides = (0, 0, 1, DH) if TRANSPOSED else (0, 0, DH, 1)
    totals = zero_tiles(ROWS, WIDTH, TILES)
    for left in range(0, DH, STEP):
        a_tile = load_tile(a, a_strides, start, length, left, ROWS, DH, STEP)
        state_rows = load_tiles(state, strides, left, DH, STEP, DH, WIDTH, TILES)
        totals = add_product(
            totals, a_tile.to(state.dtype.element_ty), state_rows, TILES, PRECISION
        )
    return totals


@triton.jit
def _times_vector(
    a, a_strides, start, length, vector, ROWS: tl.constexpr, STEP: tl.constexpr, DH: tl.constexpr
):
    """Multiply rows of a by a vector (DH, )."""
    total = tl.zeros((ROWS,), tl.float32)
    for left in range(0, DH, STEP):
        a_tile = load_tile(a, a_strides, start, length, left, ROWS, DH, STEP)
        column = left + tl.arange(0, STEP)
        part = tl.load(vector + column, mask=column < DH, other=0.0)
        total += tl.sum(a_tile.to(tl.float32) * part[None, :], 1)
    return total


@triton.jit
def _plus_outer(tiles, factor, vector, DH: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr):
    """Add factor (ROWS, ) times vector (DH, )."""
    sums = ()
    for i in tl.static_range(TILES):
        column = i * WIDTH + tl.arange(0, WIDTH)
        part = tl.load(vector + column, mask=column < DH, other=0.0)
        sums = sums + (tiles[i] + factor[:, None] * part[None, :],)
    return sums


@triton.jit(do_not_specialize=['heads', 'length'])
def query_side_kernel(
    a,
    b,
    c,
    out,
    a_strides,
    b_strides,
    c_strides,
    out_strides,
    source,
    running_max,
    floor,
    normalizer,
    normalizer_strides,
    inverse,
    normalizer_grad,
    states,
    state_vectors,
    heads,
    length,
    chunk,
    scale,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum over the keys of a tile of queries t: h, or (GRAD) dq.

    With (a, b, c) = (q, k, v) it computes h and the normalizer, with (dh, v, k) it computes dq.
    """
    tiles = tl.cdiv(length, ROWS)
    program, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    a = matrix(a, a_strides, program, heads)
    b = matrix(b, b_strides, program, heads)
    c = matrix(c, c_strides, program, heads)
    out = matrix(out, out_strides, program, heads)
    row = tl.cast(program, tl.int64) * length
    token = start + tl.arange(0, ROWS)
    inside = token < length
    base = tl.load(running_max + row + start)
    m = tl.load(running_max + row + token, mask=inside, other=float('inf'))
    m = (m - base).to(tl.float32)
    if GRAD:
        inv = tl.load(inverse + row + token, mask=inside, other=0.0)
        n = tl.load(normalizer_grad + row + token, mask=inside, other=0.0)
    else:
        n = tl.zeros((ROWS,), tl.float32)

    chunk_start = start // chunk * chunk
    totals = zero_tiles(ROWS, WIDTH, TILES)
    if chunk_start > 0:  # the chunks before, through the incoming state
        before = (tl.load(running_max + row + chunk_start - 1) - base).to(tl.float32)
        weight = tl.exp(before - m) * scale
        bounds = tl.cdiv(length, chunk) - 1
        index = tl.cast(program, tl.int64) * bounds + (chunk_start // chunk - 1)
        state, vector = states + index * DH * DH, state_vectors + index * DH
        totals = _read_state(
            a, a_strides, start, length, state, GRAD, ROWS, STEP, DH, WIDTH, TILES, PRECISION
        )
        if GRAD:
            totals = scaled(totals, weight * inv, TILES)
            totals = _plus_outer(totals, weight * n, vector, DH, WIDTH, TILES)
        else:
            totals = scaled(totals, weight, TILES)
            n = weight * _times_vector(a, a_strides, start, length, vector, ROWS, STEP, DH)

    scale_of_row = tl.full((ROWS,), 1, tl.float32)
    a_tiles = load_tiles(a, a_strides, start, length, ROWS, DH, WIDTH, TILES)
    for left in range(chunk_start, tl.minimum(start + ROWS, length), COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        g = tl.load(source + row + column, mask=column < length, other=float('-inf'))
        g = (g - base).to(tl.float32)
        b_tiles = load_tiles(b, b_strides, left, length, COLUMNS, DH, WIDTH, TILES)
        c_tiles = load_tiles(c, c_strides, left, length, COLUMNS, DH, WIDTH, TILES)
        weight = scores(a_tiles, b_tiles, ROWS, COLUMNS, TILES, PRECISION)
        if GRAD:
            weight = weight * inv[:, None] + n[:, None]
        read = token[:, None] >= column[None, :]
        logarithm = tl.where(read, g[None, :] - m[:, None], float('-inf'))
        weight *= tl.exp(logarithm) * scale
        if not GRAD:
            n += tl.sum(weight, 1)
        totals, scale_of_row = add_product_in_range(
            totals, scale_of_row, weight, c_tiles, TILES, PRECISION
        )

    totals = scaled(totals, 1 / scale_of_row, TILES)
    if not GRAD:
        smallest = tl.load(floor + row + token, mask=inside, other=1.0)
        totals = scaled(totals, 1.0 / (tl.maximum(tl.abs(n), smallest) + EPS), TILES)
        to = matrix(normalizer, normalizer_strides, program, heads)
        tl.store(to + tl.cast(token, tl.int64) * normalizer_strides[2], n, mask=inside)
    store_tiles(out, out_strides, start, length, totals, ROWS, DH, WIDTH, TILES)


@triton.jit(do_not_specialize=['heads', 'length'])
def key_side_kernel(
    a,
    b,
    c,
    out,
    k,
    a_strides,
    b_strides,
    c_strides,
    out_strides,
    k_strides,
    source,
    running_max,
    inverse,
    normalizer_grad,
    source_grad,
    states,
    state_vectors,
    heads,
    length,
    chunk,
    scale,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum over the queries of a tile of keys j: dv, or (KEYS) dk and the gradient of g.

    With (a, b, c) = (k, q, dh) it computes dv, with (v, dh, q) it computes dk. ``states`` are
    gradients. The two share no product, and their sums would not fit into registers at once.
    """
    tiles = tl.cdiv(length, ROWS)
    program, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    a = matrix(a, a_strides, program, heads)
    b = matrix(b, b_strides, program, heads)
    c = matrix(c, c_strides, program, heads)
    out = matrix(out, out_strides, program, heads)
    row = tl.cast(program, tl.int64) * length
    token = start + tl.arange(0, ROWS)
    inside = token < length
    base = tl.load(running_max + row + start)
    g = tl.load(source + row + token, mask=inside, other=float('-inf'))
    g = (g - base).to(tl.float32)

    chunk_end = tl.minimum((start // chunk + 1) * chunk, length)
    totals = zero_tiles(ROWS, WIDTH, TILES)
    if chunk_end < length:  # the chunks after, through the state's gradient
        end = (tl.load(running_max + row + chunk_end - 1) - base).to(tl.float32)
        weight = tl.exp(g - end)
        bounds = tl.cdiv(length, chunk) - 1
        index = tl.cast(program, tl.int64) * bounds + (chunk_end // chunk - 1)
        state, vector = states + index * DH * DH, state_vectors + index * DH
        totals = _read_state(
            a, a_strides, start, length, state, KEYS, ROWS, STEP, DH, WIDTH, TILES, PRECISION
        )
        totals = scaled(totals, weight, TILES)
        if KEYS:
            totals = _plus_outer(totals, weight, vector, DH, WIDTH, TILES)

    scale_of_row = tl.full((ROWS,), 1, tl.float32)
    a_tiles = load_tiles(a, a_strides, start, length, ROWS, DH, WIDTH, TILES)
    for left in range(start, chunk_end, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        column_inside = column < chunk_end
        m = tl.load(running_max + row + column, mask=column_inside, other=float('inf'))
        m = (m - base).to(tl.float32)
        inv = tl.load(inverse + row + column, mask=column_inside, other=0.0)
        b_tiles = load_tiles(b, b_strides, left, length, COLUMNS, DH, WIDTH, TILES)
        c_tiles = load_tiles(c, c_strides, left, length, COLUMNS, DH, WIDTH, TILES)
        weight = scores(a_tiles, b_tiles, ROWS, COLUMNS, TILES, PRECISION) * inv[None, :]
        if KEYS:
            n = tl.load(normalizer_grad + row + column, mask=column_inside, other=0.0)
            weight += n[None, :]
        read = token[:, None] <= column[None, :]
        logarithm = tl.where(read, g[:, None] - m[None, :], float('-inf'))
        weight *= tl.exp(logarithm) * scale
        totals, scale_of_row = add_product_in_range(
            totals, scale_of_row, weight, c_tiles, TILES, PRECISION
        )

    totals = scaled(totals, 1 / scale_of_row, TILES)
    if KEYS:
        k = matrix(k, k_strides, program, heads)
        of_source = tl.zeros((ROWS,), tl.float32)
        for i in tl.static_range(TILES):
            k_tile = load_tile(k, k_strides, start, length, i * WIDTH, ROWS, DH, WIDTH)
            of_source += tl.sum(k_tile.to(tl.float32) * totals[i], 1)
        tl.store(source_grad + row + token, of_source, mask=inside)
    store_tiles(out, out_strides, start, length, totals, ROWS, DH, WIDTH, TILES)
