# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Deterministic sums over tokens: each program accumulates its tokens in registers and writes one
partial sum, and all partial sums of a backward pass are added in a fixed order, in one launch.

torch's own sum over the first dimension launches few warps, and took 10 to 40 us on an H100.
"""

from collections.abc import Sequence
from itertools import zip_longest

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cdiv, launch, on_input_device


def split_tokens(tokens: int, tile: int, programs_beside: int, programs: int) -> tuple[int, int]:
    """Distribute tokens over programs.

    Args:
        tokens (int): B * N.
        tile (int): Tokens that a program processes in one step.
        programs_beside (int): Programs that process other channels of the same tokens.
        programs (int): Approximate number of programs to launch in all: a few per multiprocessor.
            Results depend on it in the last bits, so it must not depend on the device.

    Returns:
        tuple[int, int]: Tokens per program, a multiple of the tile, and number of programs.
    """
    tiles = cdiv(tokens, tile)
    share = max(4, cdiv(tiles * programs_beside, programs))
    return share * tile, cdiv(tiles, share)


@triton.jit
def _sum_rows(
    x, y, scale, first, end, column,
    WIDTH: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sum rows of x (rows, WIDTH), for C columns, and scale and convert them on the way if there is
    a place y for the result.
    """
    present = column < WIDTH
    total = tl.zeros((T, C), tl.float32)
    for start in tl.range(first, end, T, num_stages=3):
        row = start + tl.arange(0, T)
        at = tl.cast(row, tl.int64)[:, None] * WIDTH + column[None, :]
        inside = (row < end)[:, None] & present[None, :]
        value = tl.load(x + at, mask=inside, other=0)
        if y is not None:
            value = (value.to(tl.float32) * scale).to(y.dtype.element_ty)
            tl.store(y + at, value, mask=inside)
        total += value.to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=['rows', 'share'])
def convert_and_sum_kernel(
    x, y, scale, sums, rows, share,
    WIDTH: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Scale and convert ``share`` rows of x (rows, WIDTH), for one tile of columns, and store their
    sum.
    """
    program, column = tl.program_id(0), tl.program_id(1) * C + tl.arange(0, C)
    end = tl.minimum((program + 1) * share, rows)
    total = _sum_rows(x, y, scale, program * share, end, column, WIDTH, T, C)
    tl.store(sums + program * WIDTH + column, total, mask=column < WIDTH)


@triton.jit(do_not_specialize=['rows', 'rows2', 'rows3', 'rows4'])
def add_partial_sums_kernel(
    x, x2, x3, x4, sums, rows, rows2, rows3, rows4,
    WIDTH: tl.constexpr, WIDTH2: tl.constexpr, WIDTH3: tl.constexpr, WIDTH4: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sum the rows of one tile of columns of up to four matrices, each (rows, WIDTH)."""
    tile = tl.program_id(0)
    tile = _sum_tile(x, sums, rows, tile, WIDTH, T, C)
    sums += WIDTH
    tile = _sum_tile(x2, sums, rows2, tile, WIDTH2, T, C)
    sums += WIDTH2
    tile = _sum_tile(x3, sums, rows3, tile, WIDTH3, T, C)
    sums += WIDTH3
    _sum_tile(x4, sums, rows4, tile, WIDTH4, T, C)


@triton.jit
def _sum_tile(
    x, sums, rows, tile,
    WIDTH: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sum the rows of a tile of columns if it is one of x, and return its number in the next
    matrix.
    """
    TILES: tl.constexpr = (WIDTH + C - 1) // C
    if TILES > 0:
        if (tile >= 0) & (tile < TILES):
            column = tile * C + tl.arange(0, C)
            total = _sum_rows(x, None, None, 0, rows, column, WIDTH, T, C)
            tl.store(sums + column, total, mask=column < WIDTH)
    return tile - TILES


@on_input_device
def convert_and_sum(x: Tensor, dtype: torch.dtype, scale: float = 1) -> tuple[Tensor, Tensor]:
    """Multiply tokens by a number, convert them to a dtype, and sum the result.

    Args:
        x (Tensor): Shape (B, N, C).
        dtype (torch.dtype): Dtype of the result.
        scale (float): The number. Default: 1.

    Returns:
        tuple[Tensor, Tensor]: The result (B, N, C), and its partial sums (programs, C) in float32.
    """
    x = x.contiguous()
    batch, tokens, width = x.shape
    y = torch.empty_like(x, dtype=dtype)
    share, sums = token_sums(x)
    launch(
        convert_and_sum_kernel,
        len(sums),
        cdiv(width, 32),
        x=x,
        y=y,
        scale=float(scale),
        sums=sums,
        rows=batch * tokens,
        share=share,
        WIDTH=width,
        T=64,
        C=32,
    )
    return y, sums


def token_sums(x: Tensor) -> tuple[int, Tensor]:
    """Tokens per program of :func:`convert_and_sum`, and memory for its sums."""
    batch, tokens, width = x.shape
    share, programs = split_tokens(batch * tokens, 64, 1, programs=128)
    return share, x.new_empty(programs, width, dtype=torch.float32)


@on_input_device
def add_partial_sums(first: Tensor, others: Sequence[Tensor] = ()) -> Tensor:
    """Sum matrices over their rows.

    Args:
        first (Tensor): Contiguous float32, shape (programs, width).
        others (Sequence[Tensor]): Up to three more, of other programs and widths.

    Returns:
        Tensor: All sums side by side, of the total width.
    """
    matrices = [first, *others]
    widths = [x.shape[1] for x in matrices]
    sums = first.new_empty(sum(widths))
    arguments = {}
    for x, suffix in zip_longest(matrices, ('', '2', '3', '4')):
        rows, width = x.shape if x is not None else (0, 0)
        arguments |= {f'x{suffix}': x, f'rows{suffix}': rows, f'WIDTH{suffix}': width}
    programs = sum(cdiv(width, 32) for width in widths)
    launch(add_partial_sums_kernel, programs, **arguments, sums=sums, T=64, C=32)
    return sums
