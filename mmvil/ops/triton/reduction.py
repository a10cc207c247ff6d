# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Deterministic sums over tokens: each program adds up its share of the tokens in registers and
writes one partial sum, and these are added in a fixed order.
"""

PROGRAMS = 1024
"""Approximate number of programs to launch: several for each multiprocessor, so that none is idle
for long, but so few that partial sums take little memory and traffic. It does not depend on the
device, so results do not either.
"""


def split_tokens(tokens: int, tile: int, programs_beside: int) -> tuple[int, int]:
    """Distribute tokens over programs.

    Args:
        tokens (int): B * N.
        tile (int): Tokens that a program processes in one step.
        programs_beside (int): Programs for other channels of the same tokens.

    Returns:
        tuple[int, int]: Tokens per program, a multiple of the tile, and number of programs.
    """
    tiles = -(-tokens // tile)
    share = max(4, -(-tiles * programs_beside // PROGRAMS))
    return share * tile, -(-tiles // share)
