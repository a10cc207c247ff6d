# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""Gate statistics of an mLSTM: a few scalars per token and head.

With :math:`F_t = \sum_{s \le t} \log\sigma(\tilde f_s)` the weight of token j in the output of
token t is :math:`\exp(a_{tj} - m_t)`, where :math:`a_{tj} = F_t - F_j + \tilde i_j` and :math:`m_t
= \max_{j \le t} a_{tj}`. As :math:`F_t` is in both, it cancels. What remains is a difference of two
vectors,

.. math:: \exp(g_j - M_t), \qquad g_j = \tilde i_j - F_j, \qquad M_t = \max_{j \le t} g_j,

so the stabilizer costs O(N), and :math:`F_t` is needed only for :math:`m_t = F_t + M_t`. F grows
with the sequence while only differences between neighbours matter, so these scalars (never the
features) are kept in float64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GateStatistics(NamedTuple):
    """Scalars per token, each of shape (B, NH, N) (or with B and NH flattened) and in natural token
    order.
    """

    log_weight: Tensor
    """g: input gate minus cumulative log forget gate; the unnormalized log weight of a token."""
    running_max: Tensor
    """M: the largest g among the tokens read so far."""
    argmax: Tensor
    """Index of the token at which the running maximum is taken."""
    stabilizer: Tensor
    """m = F + M, the paper's stabilizer state."""


def cumsum(x: Tensor, reverse: bool) -> Tensor:
    """Inclusive cumulative sum over the last dimension, in reading direction."""
    return x.flip(-1).cumsum(-1).flip(-1) if reverse else x.cumsum(-1)


def gate_statistics(igate: Tensor, fgate: Tensor, reverse: bool = False) -> GateStatistics:
    """Compute the gate scalars of a sequence.

    Args:
        igate (Tensor): Input gate pre-activations, shape (..., N).
        fgate (Tensor): Forget gate pre-activations, shape (..., N).
        reverse (bool): Read from last to first. Default: False.

    Returns:
        GateStatistics: Scalars in float64 (float32 on devices without it), each of shape (..., N).
    """
    dtype = torch.float32 if igate.device.type == 'mps' else torch.float64
    cumulative = cumsum(F.logsigmoid(fgate.to(dtype)), reverse)
    log_weight = igate.to(dtype) - cumulative
    if reverse:
        running_max, argmax = log_weight.flip(-1).cummax(-1)
        running_max, argmax = running_max.flip(-1), log_weight.shape[-1] - 1 - argmax.flip(-1)
    else:
        running_max, argmax = log_weight.cummax(-1)
    return GateStatistics(log_weight, running_max, argmax, cumulative + running_max)


def gate_gradients(
    log_weight_grad: Tensor,
    stabilizer_grad: Tensor,
    row_grad: Tensor,
    fgate: Tensor,
    stats: GateStatistics,
    reverse: bool,
):
    r"""Propagate gradients from the weights' logarithms :math:`a_{tj}` to the gate pre-activations.

    Args:
        log_weight_grad (Tensor): :math:`\sum_t \partial a_{tj}` without the stabilizer's part,
            shape (..., N).
        stabilizer_grad (Tensor): Gradient of m_t, shape (..., N).
        row_grad (Tensor): :math:`\sum_j \partial a_{tj}`, the stabilizer's part included, shape
            (..., N).
        fgate (Tensor): Forget gate pre-activations, shape (..., N).
        stats (GateStatistics): Statistics of the same gates.
        reverse (bool): The reading direction of the forward pass.

    Returns:
        tuple[Tensor, Tensor]: Gradients of igate and fgate, shape (..., N), in the dtype of
        ``stats``.
    """
    dtype = stats.log_weight.dtype
    # m_t is the largest a_tj: its gradient goes to that token j.
    igate_grad = log_weight_grad.to(dtype).scatter_add(-1, stats.argmax, stabilizer_grad.to(dtype))
    # F_t appears in row t with a plus and in column t with a minus, and log f_s in every F_t from s
    # on.
    log_forget_grad = cumsum(row_grad.to(dtype) - igate_grad, not reverse)
    return igate_grad, log_forget_grad * torch.sigmoid(-fgate.to(dtype))
