# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Sums over all tokens without atomics: each program adds up its share of the tokens in registers
and writes one partial sum, and these are added in a fixed order.
"""

from typing import Tuple

import torch
from torch import Tensor

PROGRAMS = 2048
"""About as many programs are launched: several for each multiprocessor, so that none is idle for
long, and not so many that partial sums become much memory. The number does not depend on the
device, so results do not either.
"""


def split_tokens(tokens: int, tile: int, programs_beside: int) -> Tuple[int, int]:
    """Share tokens out to programs.

    Args:
        tokens (int): B * N.
        tile (int): Tokens that a program takes in one step.
        programs_beside (int): Programs that work on the same tokens, on other channels.

    Returns:
        tuple[int, int]: Tokens of a program, a multiple of the tile, and number of programs.
    """
    tiles = -(-tokens // tile)
    share = max(4, -(-tiles * programs_beside // PROGRAMS))
    return share * tile, -(-tiles // share)


def partial_sums(programs: int, size: int, like: Tensor) -> Tensor:
    """Room for the programs' sums (programs, size), to be added by ``.sum(0)``."""
    return torch.empty((programs, size), dtype=torch.float32, device=like.device)
