# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Memory layouts of tokens (B, N, E), heads (B, NH, N, DH) and parameters."""

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """View tokens (B, N, E) as (B, NH, N, DH)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def empty_like_tokens(x: Tensor) -> Tensor:
    """Allocate a tensor (B, NH, N, DH) like x, in memory (B, N, NH, DH)."""
    _, heads, tokens, width = x.shape
    return x.new_empty_strided(x.shape, (tokens * heads * width, width, heads * width, 1))


def with_unit_stride(x: Tensor) -> Tensor:
    """Copy x if its channels are not adjacent in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_rows(x: Tensor) -> Tensor:
    """View tokens (B, N, C) of all images as rows (B * N, C) of one stride, or copy where there is
    no such view.
    """
    return with_unit_stride(x).flatten(0, 1)


def writable_token_rows(x: Tensor) -> Tensor:
    """View tokens as :func:`token_rows` does, without a copy.

    Raises:
        ValueError: If that needs a copy, or rows overlap.
    """
    rows = token_rows(x)
    if rows.data_ptr() != x.data_ptr() or (len(rows) > 1 and rows.stride(0) < x.shape[2]):
        raise ValueError(
            'a gradient can only be written to (B, N, C) with adjacent channels and one stride '
            f'between tokens, but its shape is {tuple(x.shape)} and its strides are {x.stride()}.'
        )
    return rows


def contiguous(x: Tensor | None) -> Tensor | None:
    """Copy x if it is not contiguous; None stays None."""
    return None if x is None else x.contiguous()
