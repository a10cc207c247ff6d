# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""How the fused kernels want tensors: channels side by side, parameters contiguous."""

from typing import Optional

from torch import Tensor


def unit_stride(x: Tensor) -> Tensor:
    """The tensor, copied if its channels are not side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_rows(x: Tensor) -> Tensor:
    """Tokens (B, N, C) of all images as rows (B * N, C) with one stride between them; copied only
    if they are not.
    """
    return unit_stride(x).flatten(0, 1)


def token_rows_to_write(x: Tensor) -> Tensor:
    """The same as a view.

    Raises:
        ValueError: If it would be a copy, or rows overlap.
    """
    rows = token_rows(x)
    if rows.data_ptr() != x.data_ptr() or (len(rows) > 1 and rows.stride(0) < x.shape[2]):
        raise ValueError(
            'a gradient can only be written to (B, N, C) with channels side by side and one stride '
            f'between tokens, but its shape is {tuple(x.shape)} and its strides are {x.stride()}.'
        )
    return rows


def contiguous(parameter: Optional[Tensor]) -> Optional[Tensor]:
    """A parameter, or None where there is none."""
    return None if parameter is None else parameter.contiguous()
