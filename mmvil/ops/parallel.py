# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The parallel form of the mLSTM: attention with gate weights instead of a softmax.

The functions work on one stretch of L tokens. Taken alone, with L = N, they are the whole parallel form (quadratic in N);
:mod:`mmvil.ops.chunkwise` adds to them what a chunk receives from the chunks read before it.
Batch and heads are flattened to G: features are (G, L, DH), scalars (G, L).
"""
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


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * a @ b`` with the factor inside the matrix product; shapes (G, L, K) and (G, K, M)."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale)


def parallel_forward(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float):
    """Sums over one stretch of tokens (ViL, arXiv 2406.04303, appendix A).

    Args:
        q, k, v (Tensor): Shape (G, L, DH).
        weights (Tensor): Of :func:`decay_weights`, shape (G, L, L).
        scale (float): Factor of the scores, 1 / sqrt(DH).

    Returns:
        tuple[Tensor, Tensor]: Numerator (G, L, DH) and signed normalizer (G, L) before division.
    """
    scores = scaled_product(q, k.transpose(1, 2), scale).mul_(weights)
    return torch.bmm(scores, v), scores.sum(-1)


def parallel_backward(numerator_grad: Tensor, normalizer_grad: Tensor, q: Tensor, k: Tensor, v: Tensor,
                      weights: Tensor, scale: float):
    """Gradients of :func:`parallel_forward` with respect to q, k and v; the scores are computed again.

    Args:
        numerator_grad (Tensor): Shape (G, L, DH).
        normalizer_grad (Tensor): Shape (G, L).
        q, k, v, weights, scale: As in the forward pass.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Gradients of q, k, v, each (G, L, DH).
    """
    scores = scaled_product(q, k.transpose(1, 2), scale).mul_(weights)
    v_grad = torch.bmm(scores.transpose(1, 2), numerator_grad)
    scores_grad = torch.baddbmm(normalizer_grad.unsqueeze(-1), numerator_grad, v.transpose(1, 2)).mul_(weights)
    q_grad = scaled_product(scores_grad, k, scale)
    k_grad = scaled_product(scores_grad.transpose(1, 2), q, scale)
    return q_grad, k_grad, v_grad
