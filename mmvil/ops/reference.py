# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The mLSTM cell as in the paper, one token at a time.

Every other form is tested against this reference, which is slow but clear; run it in float64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
"""Added to the normalizer, as in the published model."""


def mlstm_reference(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool = False
) -> Tensor:
    r"""Recurrent mLSTM (xLSTM, arXiv 2405.04517, section 2.3 and appendix A.3).

    With the input gate :math:`\exp(\tilde i_t)` and the forget gate :math:`\sigma(\tilde f_t)`, the
    stabilizer :math:`m_t = \max(\log\sigma(\tilde f_t) + m_{t-1}, \tilde i_t)` is factored out of
    memory and normalizer:

    .. math::
        C_t &= f_t C_{t-1} + i_t\, k_t v_t^\top, \qquad n_t = f_t n_{t-1} + i_t\, k_t \\
        h_t &= \frac{C_t^\top q_t / \sqrt d}{\max(|n_t^\top q_t / \sqrt d|,\, e^{-m_t}) + 10^{-6}}

    Args:
        q (Tensor): Queries, shape (B, NH, N, DH).
        k (Tensor): Keys, shape (B, NH, N, DH).
        v (Tensor): Values, shape (B, NH, N, DH).
        igate (Tensor): Input gate pre-activations, shape (B, NH, N).
        fgate (Tensor): Forget gate pre-activations, shape (B, NH, N).
        reverse (bool): Read the tokens from last to first. Default: False.

    Returns:
        Tensor: Hidden states h, shape (B, NH, N, DH), in the order of the tokens.
    """
    batch, heads, length, width = q.shape
    q = q / math.sqrt(width)
    log_f = F.logsigmoid(fgate)
    memory = q.new_zeros(batch, heads, width, width)
    normalizer = q.new_zeros(batch, heads, width)
    m: Tensor | None = None
    # Up to here exp(-m) is finite and has a gradient; beyond, h is 0 to all digits anyway.
    highest = math.log(torch.finfo(igate.dtype).max) - 1
    outputs = [None] * length
    for t in reversed(range(length)) if reverse else range(length):
        m_new = igate[:, :, t] if m is None else torch.maximum(log_f[:, :, t] + m, igate[:, :, t])
        i = torch.exp(igate[:, :, t] - m_new)[..., None]
        # Before the first token the memory is empty: its stabilizer is minus infinity, its decay
        # zero.
        f = torch.zeros_like(i) if m is None else torch.exp(log_f[:, :, t] + m - m_new)[..., None]
        m = m_new
        memory = f[..., None] * memory + i[..., None] * k[:, :, t, :, None] * v[:, :, t, None, :]
        normalizer = f * normalizer + i * k[:, :, t]
        numerator = torch.einsum('bhde,bhd->bhe', memory, q[:, :, t])
        denominator = (normalizer * q[:, :, t]).sum(-1, keepdim=True)
        min_denominator = torch.exp((-m).clamp(max=highest))[..., None]
        outputs[t] = numerator / (torch.maximum(denominator.abs(), min_denominator) + EPS)
    return torch.stack(outputs, dim=2)
