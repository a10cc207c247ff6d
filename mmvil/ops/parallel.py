# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The parallel form of the mLSTM: attention with gate weights instead of a softmax.

The functions work on one segment of L tokens. With L = N they are the whole parallel form
(quadratic in N); :mod:`mmvil.ops.chunkwise` adds the contribution of the preceding chunks. Batch
and heads are flattened to G: features are (G, L, DH), scalars (G, L).
"""

import torch
from torch import Tensor


def decay_weights(
    log_weight: Tensor, running_max: Tensor, reverse: bool, dtype: torch.dtype
) -> Tensor:
    r"""Weights :math:`D_{tj} = \exp(g_j - M_t)` of tokens already read, 0 for the others.

    Args:
        log_weight (Tensor): g of every token, shape (G, L), see :mod:`mmvil.ops.gates`.
        running_max (Tensor): M of every token, shape (G, L).
        reverse (bool): Whether tokens are read from last to first.
        dtype (torch.dtype): Dtype of the weights.

    Returns:
        Tensor: Shape (G, L, L), rows t, columns j, all values in [0, 1].
    """
    weights = log_weight.new_empty(*log_weight.shape, log_weight.shape[-1], dtype=dtype)
    # Rounded after the subtraction: a logarithm of 1000, reached after a few hundred tokens, has an
    # error of 1e-4 in float32, and so would the weight.
    torch.sub(log_weight.unsqueeze(-2), running_max.unsqueeze(-1), out=weights)
    # exp may overflow beyond the diagonal; tril_ and triu_ write zeros there and do not multiply.
    weights.exp_()
    return weights.triu_() if reverse else weights.tril_()


def causal_mask(length: int, reverse: bool, like: Tensor) -> Tensor:
    """1 for tokens already read and 0 for the others, shape (L, L), rows t, columns j."""
    mask = like.new_ones(length, length)
    return mask.triu_() if reverse else mask.tril_()


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute ``scale * a @ b`` in one product, for shapes (G, L, K) and (G, K, M)."""
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=scale)


def parallel_forward(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    r"""Compute the sums over one segment of tokens (ViL, arXiv 2406.04303, appendix A).

    Args:
        q, k, v (Tensor): Shape (G, L, DH). If the weight of token j in the sums of token t is a
            product, k may include the factor of j, and the factor of t may be applied to the sums
            later.
        weights (Tensor): Shape (G, L, L) or (L, L): :func:`decay_weights` or :func:`causal_mask`.
        scale (float): Factor of the scores, 1 / sqrt(DH).

    Returns:
        tuple[Tensor, Tensor]: Numerator (G, L, DH) and signed normalizer (G, L, 1) before division.
    """
    scores = scaled_product(q, k.transpose(1, 2), scale).mul_(weights)
    return torch.bmm(scores, v), scores.sum(-1, keepdim=True)


def parallel_backward(
    numerator_grad: Tensor,
    normalizer_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`parallel_forward` for q, k and v, recomputing the scores.

    Args:
        numerator_grad (Tensor): Shape (G, L, DH).
        normalizer_grad (Tensor): Shape (G, L, 1).
        q, k, v, weights, scale: As in the forward pass.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Gradients of q, k and v, each (G, L, DH).
    """
    scores = scaled_product(q, k.transpose(1, 2), scale).mul_(weights)
    v_grad = torch.bmm(scores.transpose(1, 2), numerator_grad)
    scores_grad = scores.copy_(normalizer_grad.expand_as(scores))  # reuses their memory
    scores_grad = scores_grad.baddbmm_(numerator_grad, v.transpose(1, 2)).mul_(weights)
    return (
        scaled_product(scores_grad, k, scale),
        scaled_product(scores_grad.transpose(1, 2), q, scale),
        v_grad,
    )
