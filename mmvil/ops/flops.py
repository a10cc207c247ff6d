# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""FLOP formulas for ``torch.utils.flop_counter``, which cannot look into custom operators.

    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        model(image)
    counter.get_total_flops() / 2  # multiply-adds

As everywhere in that counter, only matrix products and convolutions count, and a multiply-add
counts as two.
"""

from collections.abc import Callable, Sequence
from math import ceil, prod
from typing import Any

import torch

from .chunkwise import chunk_length


def mlstm_flops(
    shape: Sequence[int], chunk_size: int, backward: bool = False, visible_only: bool = False
) -> int:
    """Count the FLOPs of the mLSTM operator.

    Args:
        shape (Sequence[int]): Shape of the queries, (B, NH, N, DH).
        chunk_size (int): As given to the operator; N or more is the parallel form.
        backward (bool): Count the backward pass instead of the forward pass. Default: False.
        visible_only (bool): Count only unmasked pairs of tokens and no padding; the PyTorch forms
            compute full matrices. Default: False.

    Returns:
        int: Twice the number of multiply-adds.
    """
    batch, heads, tokens, head_width = shape
    length = chunk_length(tokens, chunk_size) if tokens else 1
    chunks, rest = ceil(tokens / length), tokens % length
    if visible_only:
        pairs = (tokens // length) * (length * (length + 1) // 2) + rest * (rest + 1) // 2
    else:
        pairs = chunks * length**2
    # Forward: q with k and scores with v, and as many products with the state. Backward: the scores
    # again and the gradients of two products; likewise for the state, whose normalizer adds a
    # vector. The last chunk writes no state that is read, and the first reads none.
    products = 5 if backward else 2
    with_state = (chunks - 1) * length * (products * head_width + backward)
    return 2 * batch * heads * head_width * (products * pairs + with_state)


def flop_formulas(visible_only: bool = False) -> dict[Any, Callable[..., int]]:
    """Formulas to pass to ``FlopCounterMode`` as ``custom_mapping``.

    Args:
        visible_only (bool): See :func:`mlstm_flops`. Default: False.

    Returns:
        dict: Formulas of both mLSTM operators, and of the backward pass of convolutions, where
        torch's own formula counts depthwise ones as dense.
    """

    def forward(q, k, v, igate, fgate, reverse, chunk_size, triton=False, **_):
        return mlstm_flops(q, chunk_size, visible_only=visible_only)

    def backward(
        h_grad, q, k, v, igate, fgate, h, normalizer, reverse, chunk_size, triton=False, **_
    ):
        return mlstm_flops(q, chunk_size, backward=True, visible_only=visible_only)

    return {
        torch.ops.mmvil.mlstm: forward,
        torch.ops.mmvil.mlstm_backward: backward,
        torch.ops.aten.convolution_backward: _convolution_backward_flops,
    }


def _convolution_backward_flops(
    y_grad, x, weight, _bias, _stride, _padding, _dilation, transposed, _out, _groups, mask, **_
):
    """The gradients of input and weight each cost as much as the forward pass."""
    positions = prod((x if transposed else y_grad)[2:])
    return 2 * (mask[0] + mask[1]) * x[0] * positions * prod(weight)
