# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Matrix products of the chunkwise mLSTM (equations in :mod:`mmvil.ops.triton.mlstm_launch`).

A program processes one tile of tokens or of a state, of one sample and head. Positions are in
reading order: a reversed cell has negative strides, so the kernels implement one direction only.

The logarithms g and M are base 2, so that a weight is one exp2. Each is the sum of ``base``, in
float64 for every tile of ROWS tokens, and a float32 offset from it: only differences enter a
weight, and those that matter are between nearby tokens. Rows of scalars are padded to whole tiles,
with g = -inf and M = inf.

On Hopper, matrix products overlap with other instructions only if the assembler can track their
accumulators. It cannot across a branch, so absent states make loops of zero steps instead.
"""

import triton
import triton.language as tl

from .gate_kernels import EPS
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


@triton.jit(do_not_specialize=['heads', 'length', 'span'])
def chunk_sums_kernel(
    k, v, q, h_grad, k_strides, v_strides, q_strides, h_grad_strides, log_weight, running_max, base,
    inverse, normalizer_grad, states, state_vectors, states_grad, state_vectors_grad,
    heads, length, span, chunk, scale,
    DH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum up one (WIDTH, WIDTH) tile of the state, or WIDTH entries of its vector, over ``span``
    chunks, and (GRAD), in every second program, of their gradients, and store the sums at each
    bound between chunks, relative to M there.

    The state is a sum of k times v from the first token on, its gradient a sum of q times the
    gradient of h from the last token back. With span 1, programs store the parts of the chunks.
    ``states`` is (B * NH, chunks - 1, DH, DH), ``state_vectors`` (B * NH, chunks - 1, DH).
    """
    place, role = tl.program_id(0), 0
    if GRAD:
        place, role = place // 2, place % 2
    if role == 0:
        _chunk_sum(
            k, v, k_strides, v_strides, log_weight, running_max, base, None, None, states,
            state_vectors, place, heads, length, span, chunk, scale,
            DH, WIDTH, ROWS, STEP, False, PRECISION,
        )  # fmt: skip
    if GRAD:
        if role == 1:
            _chunk_sum(
                q, h_grad, q_strides, h_grad_strides, log_weight, running_max, base, inverse,
                normalizer_grad, states_grad, state_vectors_grad,
                place, heads, length, span, chunk, scale,
                DH, WIDTH, ROWS, STEP, True, PRECISION,
            )  # fmt: skip


@triton.jit
def _chunk_sum(
    a, b, a_strides, b_strides, log_weight, running_max, base, inverse, normalizer_grad, states,
    state_vectors, place, heads, length, span, chunk, scale,
    DH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = (DH + WIDTH - 1) // WIDTH
    bounds = tl.cdiv(length, chunk) - 1
    groups = tl.cdiv(bounds, span)
    index, tile = place // (across * across + across), place % (across * across + across)
    program, bound = index // groups, index % groups * span
    a = matrix(a, a_strides, program, heads)
    b = matrix(b, b_strides, program, heads)
    row = tl.cast(program, tl.int64) * tl.cdiv(length, ROWS) * ROWS
    base += row // ROWS
    log_weight, running_max = log_weight + row, running_max + row
    first, last = bound * chunk, tl.minimum(bound + span, bounds) * chunk
    if GRAD:  # the chunks after the bounds
        first, last = first + chunk, tl.minimum(last + chunk, length)
        inverse, normalizer_grad = inverse + row, normalizer_grad + row
    steps = tl.cdiv(last - first, STEP)
    tl.assume(steps > 0)
    states += tl.cast(program, tl.int64) * bounds * DH * DH
    state_vectors += tl.cast(program, tl.int64) * bounds * DH
    if tile < across * across:
        _sum_products(
            a, b, a_strides, b_strides, log_weight, running_max, base, inverse, states,
            first, steps, tile // across * WIDTH, tile % across * WIDTH, length, chunk, scale,
            DH, WIDTH, ROWS, STEP, GRAD, PRECISION,
        )  # fmt: skip
    else:
        _sum_rows(
            a, a_strides, log_weight, running_max, base, normalizer_grad, state_vectors,
            first, steps, (tile - across * across) * WIDTH, length, chunk, scale,
            DH, WIDTH, ROWS, STEP, GRAD,
        )  # fmt: skip


@triton.jit
def _sum_products(
    a, b, a_strides, b_strides, log_weight, running_max, base, inverse, states,
    first, steps, top, left, length, chunk, scale,
    DH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum up the tile of the state with upper left corner (top, left), in ``steps`` steps."""
    STATE: tl.constexpr = states.dtype.element_ty
    row, column = top + tl.arange(0, WIDTH), left + tl.arange(0, WIDTH)
    to = states + row[:, None] * DH + column[None, :]
    total = tl.zeros((WIDTH, WIDTH), tl.float32)
    before = tl.zeros((), tl.float64)
    ahead = _maxima(running_max, base, first, steps, 0, ROWS, STEP, GRAD)
    for step in range(0, steps):
        start, maxima = _first_token(first, steps, step, STEP, GRAD), ahead
        # They take as long as a step to load.
        ahead = _maxima(running_max, base, first, steps, step + 1, ROWS, STEP, GRAD)
        weight, decay, before = _step_weights(
            log_weight, running_max, inverse, maxima, before, start, scale, STEP, GRAD
        )
        a_tile = load_tile(a, a_strides, start, length, top, STEP, DH, WIDTH).to(tl.float32)
        b_tile = load_tile(b, b_strides, start, length, left, STEP, DH, WIDTH)
        weighted = (a_tile * weight[:, None]).to(STATE)
        total = dot(tl.trans(weighted), b_tile.to(STATE), total * decay, PRECISION)
        # A mask, because products overlap with nothing if there is a branch.
        bound = _bound(start, chunk, STEP, GRAD)
        inside = (row < tl.where(bound >= 0, DH, 0))[:, None] & (column < DH)[None, :]
        tl.store(to + tl.cast(bound, tl.int64) * DH * DH, total.to(STATE), mask=inside)


@triton.jit
def _sum_rows(
    a, a_strides, log_weight, running_max, base, normalizer_grad, state_vectors,
    first, steps, left, length, chunk, scale,
    DH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    GRAD: tl.constexpr,
):  # fmt: skip
    """Sum up entries of the state's vector, from ``left`` on."""
    column = left + tl.arange(0, WIDTH)
    total = tl.zeros((STEP, WIDTH), tl.float32)
    before = tl.zeros((), tl.float64)
    for step in range(0, steps):
        start = _first_token(first, steps, step, STEP, GRAD)
        maxima = _maxima(running_max, base, first, steps, step, ROWS, STEP, GRAD)
        weight, decay, before = _step_weights(
            log_weight, running_max, normalizer_grad, maxima, before, start, scale, STEP, GRAD
        )
        a_tile = load_tile(a, a_strides, start, length, left, STEP, DH, WIDTH)
        total = total * decay + a_tile.to(tl.float32) * weight[:, None]
        bound = _bound(start, chunk, STEP, GRAD)
        if bound >= 0:
            tl.store(state_vectors + bound * DH + column, tl.sum(total, 0), mask=column < DH)


@triton.jit
def _first_token(first, steps, step, STEP: tl.constexpr, GRAD: tl.constexpr):
    """First token of a step; those for gradients begin with the last tokens."""
    return first + (steps - 1 - step if GRAD else step) * STEP


@triton.jit
def _maxima(
    running_max, base, first, steps, step,
    ROWS: tl.constexpr, STEP: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Load M after a step of STEP tokens, or (GRAD) before it, as base and offset, and the base of
    its tokens.
    """
    start = _first_token(first, steps, tl.minimum(step, steps - 1), STEP, GRAD)
    end = start - 1 if GRAD else start + STEP - 1
    return tl.load(base + end // ROWS), tl.load(running_max + end), tl.load(base + start // ROWS)


@triton.jit
def _step_weights(
    log_weight, running_max, factor, maxima, before, start, scale,
    STEP: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Weights of a step's tokens relative to M at its end, (GRAD) times a factor; the decay of
    earlier sums since M was ``before``; and M at the end.
    """
    token = start + tl.arange(0, STEP)
    end_base, end_max, own_base = maxima
    at_end = end_max - (own_base - end_base).to(tl.float32)
    if GRAD:
        weight = tl.exp2(at_end - tl.load(running_max + token)) * scale
        weight *= tl.load(factor + token)
    else:
        weight = tl.exp2(tl.load(log_weight + token) - at_end)
    now = end_base + end_max
    return weight, tl.exp2(-tl.abs(now - before).to(tl.float32)), now  # M never falls


@triton.jit
def _bound(start, chunk, STEP: tl.constexpr, GRAD: tl.constexpr):
    """Number of the bound between chunks at the end of a step, or -1."""
    end = start if GRAD else start + STEP
    return tl.where(end % chunk == 0, end // chunk - 1, -1)


@triton.jit(do_not_specialize=['length'])
def sum_states_kernel(
    states, state_vectors, states_grad, state_vectors_grad, running_max, base, length, chunk,
    DH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Turn the chunks' parts into states, which are sums from the first chunk on, and (GRAD), in
    every second program, into gradients of states, which are sums from the last chunk back.
    """
    blocks: tl.constexpr = (DH * DH + BLOCK - 1) // BLOCK
    place, backward = tl.program_id(0), False
    if GRAD:
        place, backward = place // 2, place % 2 == 1
        states = tl.where(backward, states_grad, states)
        state_vectors = tl.where(backward, state_vectors_grad, state_vectors)
    program, block = place // (blocks + 1), place % (blocks + 1)
    running_max += tl.cast(program, tl.int64) * tl.cdiv(length, ROWS) * ROWS
    base += program * tl.cdiv(length, ROWS)
    bounds = tl.cdiv(length, chunk) - 1
    gates = (running_max, base, bounds, chunk)
    if block < blocks:
        _sum_states(states, program, block, gates, backward, DH * DH, BLOCK, ROWS)
    else:
        _sum_states(state_vectors, program, 0, gates, backward, DH, BLOCK, ROWS)


@triton.jit
def _sum_states(
    parts, program, block, gates, backward,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    running_max, base, bounds, chunk = gates
    element = block * BLOCK + tl.arange(0, BLOCK)
    parts += tl.cast(program, tl.int64) * bounds * SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    before = tl.zeros((), tl.float64)
    for step in tl.range(0, bounds, num_stages=4):
        bound = tl.where(backward, bounds - 1 - step, step)
        end = (bound + 1) * chunk - 1
        now = tl.load(base + end // ROWS) + tl.load(running_max + end)
        decay = tl.exp2(-tl.abs(now - before).to(tl.float32))  # M never falls
        at = parts + tl.cast(bound, tl.int64) * SIZE + element
        part = tl.load(at, mask=element < SIZE, other=0.0).to(tl.float32)
        total = total * decay + part
        tl.store(at, total.to(parts.dtype.element_ty), mask=element < SIZE)
        before = now


@triton.jit
def _add_state(
    totals, a, a_strides, start, length, state, left, present,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, DH: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the product of rows of a and a state (DH, DH), or its transpose, if present."""
    strides = (0, 0, 1, DH) if TRANSPOSED else (0, 0, DH, 1)
    for middle in range(0, tl.where(present, DH, 0), STEP):
        a_tile = load_tile(a, a_strides, start, length, middle, ROWS, DH, STEP)
        state_rows = load_tiles(state, strides, middle, DH, left, STEP, DH, WIDTH, TILES)
        totals = add_product(
            totals, a_tile.to(state.dtype.element_ty), state_rows, TILES, PRECISION
        )
    return totals


@triton.jit
def _state_vector(vector, left, present, DH: tl.constexpr, WIDTH: tl.constexpr):
    """Load a part of a vector (DH, ) as a row; zero if it is not present."""
    column = left + tl.arange(0, WIDTH)
    inside = column < tl.where(present, DH, 0)
    return tl.load(vector + column, mask=inside, other=0.0)[None, :]


@triton.jit
def _row_products(
    a, a_strides, start, length, left, tiles,
    ROWS: tl.constexpr, DH: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Compute the scalar products of rows of a matrix (length, DH) and of tiles, from column
    ``left`` on.
    """
    products = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(TILES):
        tile = load_tile(a, a_strides, start, length, left + i * WIDTH, ROWS, DH, WIDTH)
        products += tl.sum(tile.to(tl.float32) * tiles[i], 1)
    return products


@triton.jit(do_not_specialize=['heads', 'length'])
def query_side_kernel(
    a, b, c, out, a_strides, b_strides, c_strides, out_strides, log_weight, running_max, base,
    min_denom, normalizer, normalizer_strides, inverse, normalizer_grad, states, state_vectors,
    q, q_strides, row_grad, place, places, heads, length, chunk, scale,
    DH: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
    GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum over the keys of a tile of queries t: h, or (GRAD) dq, in one of PARTS of its columns.

    With (a, b, c) = (q, k, v) it computes h and the normalizer, at one of as many places as there
    are programs. With (dh, v, k) it computes dq, at one of ``places``, and the scalar product of q
    and dq, which is the sum over the keys of the gradients of the weights' logarithms.
    """
    OWN: tl.constexpr = TILES // PARTS
    if place is None:
        place = tl.program_id(0)
    place, part = place // PARTS, place % PARTS
    own = part * OWN * WIDTH
    tiles = tl.cdiv(length, ROWS)
    program, start = place // tiles, place % tiles * ROWS
    a = matrix(a, a_strides, program, heads)
    b = matrix(b, b_strides, program, heads)
    c = matrix(c, c_strides, program, heads)
    row = tl.cast(program, tl.int64) * tiles * ROWS
    base += program * tiles
    index, column_index = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    token = start + index
    own_base = tl.load(base + start // ROWS)
    m = tl.load(running_max + row + token) - tl.log2(scale)
    n = tl.zeros((ROWS,), tl.float32)
    if GRAD:
        inv = tl.load(inverse + row + token)
        n = tl.load(normalizer_grad + row + token)

    a_tiles = load_tiles(a, a_strides, start, length, 0, ROWS, DH, WIDTH, TILES)
    totals = zero_tiles(ROWS, WIDTH, OWN)
    chunk_start = start // chunk * chunk
    if STATES:  # the chunks before, through the incoming state
        present = chunk_start > 0
        end = tl.maximum(chunk_start, 1) - 1
        shift = (tl.load(base + end // ROWS) - own_base).to(tl.float32)
        decay = tl.exp2(tl.load(running_max + row + end) + shift - m)
        bounds = tl.cdiv(length, chunk) - 1
        state = tl.cast(program, tl.int64) * bounds + tl.maximum(chunk_start // chunk, 1) - 1
        vector, state = state_vectors + state * DH, states + state * DH * DH
        totals = _add_state(
            totals, a, a_strides, start, length, state, own, present,
            GRAD, ROWS, STEP, DH, WIDTH, OWN, PRECISION,
        )  # fmt: skip
        if GRAD:
            totals = scaled(totals, decay * inv, OWN)
            sums = ()
            for i in tl.static_range(OWN):
                of_n = _state_vector(vector, own + i * WIDTH, present, DH, WIDTH)
                sums = sums + (totals[i] + (decay * n)[:, None] * of_n,)
            totals = sums
        else:
            totals = scaled(totals, decay, OWN)
            for left in range(0, tl.where(present, DH, 0), STEP):
                of_n = _state_vector(vector, left, present, DH, STEP)
                a_tile = load_tile(a, a_strides, start, length, left, ROWS, DH, STEP)
                n += tl.sum(a_tile.to(tl.float32) * of_n, 1)
            n *= decay

    scale_of_row = tl.full((ROWS,), 1, tl.float32)
    edge = tl.minimum(start + ROWS, length)
    for DIAGONAL in tl.static_range(2):  # masks in the second loop alone
        first, last = (start, edge) if DIAGONAL else (chunk_start, start)
        for left in range(first, last, COLUMNS):
            column = left + column_index
            shift = (tl.load(base + left // ROWS) - own_base).to(tl.float32)
            g = tl.load(log_weight + row + column)
            b_tiles = load_tiles(b, b_strides, left, length, 0, COLUMNS, DH, WIDTH, TILES)
            c_tiles = load_tiles(c, c_strides, left, length, own, COLUMNS, DH, WIDTH, OWN)
            weight = scores(a_tiles, b_tiles, ROWS, COLUMNS, TILES, PRECISION)
            if GRAD:
                weight = weight * inv[:, None] + n[:, None]
            logarithm = g[None, :] - (m - shift)[:, None]
            if DIAGONAL:
                read = (index - (left - start))[:, None] >= column_index[None, :]
                logarithm = tl.where(read, logarithm, float('-inf'))
            weight *= tl.exp2(logarithm)
            if not GRAD:
                n += tl.sum(weight, 1)
            totals, scale_of_row = add_product_in_range(
                totals, scale_of_row, weight, c_tiles, OWN, PRECISION
            )

    totals = scaled(totals, 1 / scale_of_row, OWN)
    if not GRAD:
        smallest = tl.load(min_denom + row + token)
        totals = scaled(totals, 1.0 / (tl.maximum(tl.abs(n), smallest) + EPS), OWN)
        to = matrix(normalizer, normalizer_strides, program, heads)
        to += tl.cast(token, tl.int64) * normalizer_strides[2]
        tl.store(to, n, mask=token < tl.where(own == 0, length, 0))
    else:
        q = matrix(q, q_strides, program, heads)
        to = row_grad + tl.cast(part, tl.int64) * (places // PARTS) * ROWS + row + token
        tl.store(to, _row_products(q, q_strides, start, length, own, totals, ROWS, DH, WIDTH, OWN))
    out = matrix(out, out_strides, program, heads)
    store_tiles(out, out_strides, start, length, own, totals, ROWS, DH, WIDTH, OWN)


@triton.jit(do_not_specialize=['heads', 'length'])
def gradients_kernel(
    q, k, v, h_grad, q_grad, k_grad, v_grad, q_strides, k_strides, v_strides, h_grad_strides,
    q_grad_strides, k_grad_strides, v_grad_strides, log_weight, running_max, base, inverse,
    normalizer_grad, row_grad, log_weight_grad, states, state_vectors, states_grad,
    state_vectors_grad, heads, length, chunk, scale,
    DH: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
    TOGETHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk, dv, and the gradients of the weights' logarithms, of a tile of tokens in one
    of PARTS of its columns.

    Neighbouring programs each compute one of these at the same time, so that inputs are read from
    memory once. dk and dv are computed TOGETHER where both fit into registers. The gradients of
    logarithms, summed over rows and over columns, are sums of PARTS, (PARTS, B * NH, N).
    """
    ROLES: tl.constexpr = 2 if TOGETHER else 3
    role, place = tl.program_id(0) % ROLES, tl.program_id(0) // ROLES
    places = tl.num_programs(0) // ROLES
    if role == 0:
        query_side_kernel(
            h_grad, v, k, q_grad, h_grad_strides, v_strides, k_strides, q_grad_strides, log_weight,
            running_max, base, None, None, None, inverse, normalizer_grad, states, state_vectors,
            q, q_strides, row_grad, place, places, heads, length, chunk, scale,
            DH, WIDTH, TILES, PARTS, STEP, ROWS, COLUMNS, STATES, True, PRECISION,
        )  # fmt: skip
    for ROLE in tl.static_range(1, ROLES):
        if role == ROLE:
            _key_side(
                q, k, v, h_grad, k_grad, v_grad, q_strides, k_strides, v_strides, h_grad_strides,
                k_grad_strides, v_grad_strides, log_weight, running_max, base, inverse,
                normalizer_grad, log_weight_grad, states_grad, state_vectors_grad,
                place, places, heads, length, chunk, scale,
                DH, WIDTH, TILES, PARTS, STEP, ROWS, COLUMNS, STATES,
                TOGETHER or ROLE == 1, TOGETHER or ROLE == 2, PRECISION,
            )  # fmt: skip


@triton.jit
def _key_side(
    q, k, v, h_grad, k_grad, v_grad, q_strides, k_strides, v_strides, h_grad_strides,
    k_grad_strides, v_grad_strides, log_weight, running_max, base, inverse, normalizer_grad,
    log_weight_grad, states, state_vectors,
    place, places, heads, length, chunk, scale,
    DH: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum over the queries of a tile of keys j: dk and the gradient of g (KEYS), and dv (VALUES),
    at one of ``places``. States are gradients.
    """
    OWN: tl.constexpr = TILES // PARTS
    part, own = place % PARTS, place % PARTS * OWN * WIDTH
    tiles = tl.cdiv(length, ROWS)
    program, start = place // PARTS // tiles, place // PARTS % tiles * ROWS
    q = matrix(q, q_strides, program, heads)
    k = matrix(k, k_strides, program, heads)
    v = matrix(v, v_strides, program, heads)
    h_grad = matrix(h_grad, h_grad_strides, program, heads)
    row = tl.cast(program, tl.int64) * tiles * ROWS
    base += program * tiles
    index, column_index = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    own_base = tl.load(base + start // ROWS)
    g = tl.load(log_weight + row + start + index)

    dk, dv = zero_tiles(ROWS, WIDTH, OWN), zero_tiles(ROWS, WIDTH, OWN)
    chunk_end = tl.minimum((start // chunk + 1) * chunk, length)
    if STATES:  # the chunks after, through the state's gradient
        present = chunk_end < length
        shift = (tl.load(base + (chunk_end - 1) // ROWS) - own_base).to(tl.float32)
        decay = tl.exp2(g - (tl.load(running_max + row + chunk_end - 1) + shift))
        bounds = tl.cdiv(length, chunk) - 1
        state = tl.cast(program, tl.int64) * bounds + tl.minimum(start // chunk, bounds - 1)
        vector, state = state_vectors + state * DH, states + state * DH * DH
        if VALUES:
            dv = _add_state(
                dv, k, k_strides, start, length, state, own, present,
                False, ROWS, STEP, DH, WIDTH, OWN, PRECISION,
            )  # fmt: skip
            dv = scaled(dv, decay, OWN)
        if KEYS:
            dk = _add_state(
                dk, v, v_strides, start, length, state, own, present,
                True, ROWS, STEP, DH, WIDTH, OWN, PRECISION,
            )  # fmt: skip
            sums = ()
            for i in tl.static_range(OWN):
                of_n = _state_vector(vector, own + i * WIDTH, present, DH, WIDTH)
                sums = sums + ((dk[i] + of_n) * decay[:, None],)
            dk = sums

    g += tl.log2(scale)
    dk_scale, dv_scale = tl.full((ROWS,), 1, tl.float32), tl.full((ROWS,), 1, tl.float32)
    if VALUES:
        k_tiles = load_tiles(k, k_strides, start, length, 0, ROWS, DH, WIDTH, TILES)
    if KEYS:
        v_tiles = load_tiles(v, v_strides, start, length, 0, ROWS, DH, WIDTH, TILES)
    edge = tl.minimum(start + ROWS, chunk_end)
    for DIAGONAL in tl.static_range(2):
        first, last = (start, edge) if DIAGONAL else (edge, chunk_end)
        for left in range(first, last, COLUMNS):
            column = left + column_index
            shift = (tl.load(base + left // ROWS) - own_base).to(tl.float32)
            m = tl.load(running_max + row + column)
            inv = tl.load(inverse + row + column)
            logarithm = (g - shift)[:, None] - m[None, :]
            if DIAGONAL:
                read = (index - (left - start))[:, None] <= column_index[None, :]
                logarithm = tl.where(read, logarithm, float('-inf'))
            gated = tl.exp2(logarithm)
            # With both, the compiler loads the same tiles once.
            if VALUES:
                b = load_tiles(q, q_strides, left, length, 0, COLUMNS, DH, WIDTH, TILES)
                c = load_tiles(h_grad, h_grad_strides, left, length, own, COLUMNS, DH, WIDTH, OWN)
                weight = scores(k_tiles, b, ROWS, COLUMNS, TILES, PRECISION)
                weight *= inv[None, :] * gated
                dv, dv_scale = add_product_in_range(dv, dv_scale, weight, c, OWN, PRECISION)
            if KEYS:
                n = tl.load(normalizer_grad + row + column)
                b = load_tiles(h_grad, h_grad_strides, left, length, 0, COLUMNS, DH, WIDTH, TILES)
                c = load_tiles(q, q_strides, left, length, own, COLUMNS, DH, WIDTH, OWN)
                weight = scores(v_tiles, b, ROWS, COLUMNS, TILES, PRECISION)
                weight = (weight * inv[None, :] + n[None, :]) * gated
                dk, dk_scale = add_product_in_range(dk, dk_scale, weight, c, OWN, PRECISION)

    if VALUES:
        dv = scaled(dv, 1 / dv_scale, OWN)
        v_grad = matrix(v_grad, v_grad_strides, program, heads)
        store_tiles(v_grad, v_grad_strides, start, length, own, dv, ROWS, DH, WIDTH, OWN)
    if KEYS:
        dk = scaled(dk, 1 / dk_scale, OWN)
        dg = _row_products(k, k_strides, start, length, own, dk, ROWS, DH, WIDTH, OWN)
        to = log_weight_grad + tl.cast(part, tl.int64) * (places // PARTS) * ROWS + row
        tl.store(to + start + index, dg)
        k_grad = matrix(k_grad, k_grad_strides, program, heads)
        store_tiles(k_grad, k_grad_strides, start, length, own, dk, ROWS, DH, WIDTH, OWN)
