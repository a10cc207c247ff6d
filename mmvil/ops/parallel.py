# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The parallel form of the mLSTM: attention with gate weights instead of a softmax.

The functions work on one stretch of L tokens. Taken alone, with L = N, they are the whole parallel form (quadratic in N);
:mod:`mmvil.ops.chunkwise` adds to them what a chunk receives from the chunks read before it.
Batch and heads are flattened to G: features are (G, L, DH), scalars (G, L). Results are written into views of the caller's tensors.
"""
from typing import Tuple

import torch
from torch import Tensor


def decay_weights(source: Tensor, running_max: Tensor, reverse: bool) -> Tensor:
    r"""Weights :math:`D_{tj} = \exp(g_j - M_t)` of tokens already read, 0 for the others.

    Args:
        source (Tensor): g of every token, shape (G, L), see :mod:`mmvil.ops.gates`.
        running_max (Tensor): M of every token, shape (G, L).
        reverse (bool): Tokens are read from last to first.

    Returns:
        Tensor: Shape (G, L, L), rows t, columns j, all values in [0, 1].
    """
    # exp may overflow on the far side of the diagonal; tril_ and triu_ write zeros there, they do not multiply.
    weights = torch.exp_(source.unsqueeze(-2) - running_max.unsqueeze(-1))
    return weights.triu_() if reverse else weights.tril_()


def scaled_scores(q: Tensor, k: Tensor, weights: Tensor, scale: float) -> Tensor:
    r"""Gated scores :math:`S_{tj} = D_{tj}\, q_t \cdot k_j\, scale`, shape (G, L, L)."""
    scores = q.new_empty(weights.shape)
    return scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=scale).mul_(weights)


def parallel_forward(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float, out: Tensor) -> Tensor:
    """Sums over one stretch of tokens (ViL, arXiv 2406.04303, appendix A).

    Args:
        q, k, v (Tensor): Shape (G, L, DH).
        weights (Tensor): Of :func:`decay_weights`, shape (G, L, L).
        scale (float): Factor of the scores, 1 / sqrt(DH).
        out (Tensor): Receives the numerator, before division, shape (G, L, DH).

    Returns:
        Tensor: The signed normalizer, shape (G, L).
    """
    scores = scaled_scores(q, k, weights, scale)
    out.baddbmm_(scores, v, beta=0)
    return scores.sum(-1)


def parallel_backward(numerator_grad: Tensor, normalizer_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor,
                      scale: float, out: Tuple[Tensor, Tensor, Tensor]) -> None:
    """Gradients of :func:`parallel_forward` with respect to q, k and v; the scores are computed again.

    Args:
        numerator_grad (Tensor): Shape (G, L, DH).
        normalizer_grad (Tensor): Shape (G, L).
        q, k, v, weights, scale: As in the forward pass.
        out (tuple[Tensor, Tensor, Tensor]): Receive the gradients of q, k and v, each (G, L, DH).
    """
    q_grad, k_grad, v_grad = out
    scores = scaled_scores(q, k, weights, scale)
    v_grad.baddbmm_(scores.transpose(1, 2), numerator_grad, beta=0)
    scores_grad = scores.copy_(normalizer_grad.unsqueeze(-1))  # the scores are not needed any more
    scores_grad.baddbmm_(numerator_grad, v.transpose(1, 2)).mul_(weights)
    q_grad.baddbmm_(scores_grad, k, beta=0, alpha=scale)
    k_grad.baddbmm_(scores_grad.transpose(1, 2), q, beta=0, alpha=scale)
