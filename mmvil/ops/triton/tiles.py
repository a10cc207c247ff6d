# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Loads, stores and products of tiles: a head of any width as a row of tiles.

Tensor sizes in Triton are powers of two, and matrix units need at least 16. ViL's head widths are
96, 192 and 384, so a row of features is held as a tuple of TILES tensors, each WIDTH columns wide:
3 x 32, 3 x 64, 3 x 128. Columns beyond the head's width are masked.
"""

import torch
import triton
import triton.language as tl

from ..compat import tf32_is_allowed
from . import is_interpreted

# The interpreter treats bfloat16 as integers in matrix products.
INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Compute total + a @ b in float32; PRECISION is for float32 operands."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


def dot_precision(dtype: torch.dtype) -> str:
    """PRECISION of :func:`dot` by the dtype of the features."""
    # TF32 suffices next to half precision: it is as precise as float16.
    exact = dtype == torch.float32 and not tf32_is_allowed()
    return 'tf32x3' if exact else 'tf32'


@triton.jit
def load_row(pointer, index, present):
    """Load parameters with one entry per channel as a float32 row; zero where there are none."""
    if pointer is None:
        return tl.zeros(index.shape, tl.float32)[None, :]
    else:
        return tl.load(pointer + index, mask=present, other=0).to(tl.float32)[None, :]


@triton.jit
def zero_tiles(ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr):
    """Accumulators for rows of features."""
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles = tiles + (tl.zeros((ROWS, WIDTH), tl.float32),)
    return tiles


@triton.jit
def load_tiles(
    first, strides, start, length, left,
    ROWS: tl.constexpr, DH: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Load rows start, start + 1, ... of a (length, DH) matrix that begins at ``first``, from
    column ``left`` on.
    """
    tiles = ()
    for i in tl.static_range(TILES):
        tile = load_tile(first, strides, start, length, left + i * WIDTH, ROWS, DH, WIDTH)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def load_tile(
    first, strides, start, length, left,
    ROWS: tl.constexpr, DH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Load the (ROWS, WIDTH) tile of a (length, DH) matrix with upper left corner (start, left)."""
    row, column = tl.arange(0, ROWS), left + tl.arange(0, WIDTH)
    # Only the step to the first row may exceed 32 bits.
    first += tl.cast(start, tl.int64) * strides[2]
    offset = row[:, None] * strides[2] + column[None, :] * strides[3]
    inside = _inside(row, length - start, column, DH, WIDTH)
    return tl.load(first + offset, mask=inside, other=0.0)


@triton.jit
def _inside(row, rows, column, DH: tl.constexpr, WIDTH: tl.constexpr):
    """Mask of entries inside a matrix (rows, DH); all columns are inside if WIDTH divides DH."""
    inside = (row < rows)[:, None]
    if DH % WIDTH != 0:
        inside = inside & (column < DH)[None, :]
    return inside


@triton.jit
def store_tiles(
    first, strides, start, length, left, tiles,
    ROWS: tl.constexpr, DH: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store tiles where :func:`load_tiles` loads them, in the dtype of the matrix."""
    row = tl.arange(0, ROWS)
    first += tl.cast(start, tl.int64) * strides[2]
    for i in tl.static_range(TILES):
        column = left + i * WIDTH + tl.arange(0, WIDTH)
        offset = row[:, None] * strides[2] + column[None, :] * strides[3]
        inside = _inside(row, length - start, column, DH, WIDTH)
        tl.store(first + offset, tiles[i].to(first.dtype.element_ty), mask=inside)


@triton.jit
def scores(
    a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr
):
    """Compute a @ b^T of two tuples of tiles, (ROWS, COLUMNS) in float32."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(TILES):
        total = dot(a[i], tl.trans(b[i]), total, PRECISION)
    return total


@triton.jit
def add_product(totals, weights, tiles, TILES: tl.constexpr, PRECISION: tl.constexpr):
    """Compute totals + weights @ tiles, for every tile."""
    sums = ()
    for i in tl.static_range(TILES):
        sums = sums + (dot(weights, tiles[i], totals[i], PRECISION),)
    return sums


@triton.jit
def scaled(tiles, factor, TILES: tl.constexpr):
    """Multiply each row by its factor."""
    products = ()
    for i in tl.static_range(TILES):
        products = products + (tiles[i] * factor[:, None],)
    return products


@triton.jit
def add_product_in_range(
    totals, scale, weights, tiles, TILES: tl.constexpr, PRECISION: tl.constexpr
):
    """Add a product like :func:`add_product`, with weights that may exceed the range of the tiles'
    dtype.

    The maximum of float16 is 65504. Rows with larger weights are scaled down, and so are their
    totals: the sum is totals / scale. Scales start at 1 and never grow.
    """
    dtype: tl.constexpr = tiles[0].dtype
    if dtype == tl.float16:
        smaller = tl.minimum(scale, 32768 / tl.max(tl.abs(weights), 1))
        totals = scaled(totals, smaller / scale, TILES)
        weights = weights * smaller[:, None]
        scale = smaller
    return add_product(totals, weights.to(dtype), tiles, TILES, PRECISION), scale


@triton.jit
def matrix(first, strides, index, heads):
    """Pointer to the (N, DH) matrix of one sample and head, given strides of (B, NH, N, DH)."""
    sample, head = index // heads, index % heads
    return first + tl.cast(sample, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
