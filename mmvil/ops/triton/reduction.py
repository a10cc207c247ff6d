# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Deterministic sums over tokens: each program accumulates its tokens in registers and writes one
partial sum, and these are added in a fixed order.

torch's own sum over the first dimension launches few warps, and took 10 to 40 us on an H100.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cdiv, launch


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


@triton.jit(do_not_specialize=['rows', 'share'])
def sum_rows_kernel(
    x, sums, rows, share,
    WIDTH: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute the sum of ``share`` rows of x (rows, WIDTH), for one tile of columns."""
    program, column = tl.program_id(0), tl.program_id(1) * C + tl.arange(0, C)
    present = column < WIDTH
    total = tl.zeros((T, C), tl.float32)
    end = tl.minimum((program + 1) * share, rows)
    for first in tl.range(program * share, end, T, num_stages=3):
        row = first + tl.arange(0, T)
        at = x + tl.cast(row, tl.int64)[:, None] * WIDTH + column[None, :]
        inside = (row < end)[:, None] & present[None, :]
        total += tl.load(at, mask=inside, other=0).to(tl.float32)
    tl.store(sums + program * WIDTH + column, tl.sum(total, axis=0), mask=present)


def sum_rows(x: Tensor) -> Tensor:
    """Sum a matrix over its rows, in float32, on the current GPU.

    Args:
        x (Tensor): Shape (rows, width).

    Returns:
        Tensor: Shape (width, ).
    """
    x = x.contiguous()
    rows, width = x.shape
    share = 1024 if rows <= 1024 else 256  # partial sums are summed in one go
    programs = max(1, cdiv(rows, share))
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    launch(
        sum_rows_kernel,
        programs,
        cdiv(width, 32),
        x=x,
        sums=sums,
        rows=rows,
        share=share,
        WIDTH=width,
        T=64,
        C=32,
    )
    return sums[0] if programs == 1 else sum_rows(sums)
