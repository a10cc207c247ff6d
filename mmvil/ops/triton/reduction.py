# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Deterministic sums over tokens: each program accumulates its tokens in registers and writes one
partial sum, and these are added in a fixed order.
"""

PROGRAMS = 1024
"""Approximate number of programs to launch: several per multiprocessor, so that none is idle for
long, but few enough that partial sums take little memory and traffic. Being independent of the
device, it keeps results independent of it, too.
"""


def split_tokens(tokens: int, tile: int, programs_beside: int) -> tuple[int, int]:
    """Distribute tokens over programs.

    Args:
        tokens (int): B * N.
        tile (int): Tokens that a program processes in one step.
        programs_beside (int): Programs that process other channels of the same tokens.

    Returns:
        tuple[int, int]: Tokens per program, a multiple of the tile, and number of programs.
    """
    tiles = -(-tokens // tile)
    share = max(4, -(-tiles * programs_beside // PROGRAMS))
    return share * tile, -(-tiles // share)
