# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""The mLSTM for exporters, in a few plain operations without loops or in-place updates.

The chunkwise form passes states from chunk to chunk in a loop, whose length is unknown in a graph
with dynamic shapes. But the state that a chunk receives is again a weighted sum over the chunks
before it, so the parallel form is used twice: between the tokens of a chunk, and between the n
chunks. With g, M and m as in :mod:`mmvil.ops.gates`, T the largest g in a chunk and :math:`M^-_c`
the largest before chunk c,

.. math:: C_c = \sum_{b < c} e^{T_b - M^-_c} \sum_{j \in b} e^{g_j - T_b} k_j v_j^\top

is the incoming memory of the chunk, and token t sees it with the weight :math:`e^{M^-_c - M_t}`.
This costs :math:`n^2` products of a weight with a (DH, DH) memory, little as long as n is well
below the chunk length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import static_shape
from .gates import cumsum
from .reference import EPS

LOG_ZERO = -1e30
"""Logarithm of a weight of zero. Unlike minus infinity it can be subtracted from itself."""


def mlstm_traceable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    reverse: bool,
    chunk_size: int,
    gate_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Compute ``torch.ops.mmvil.mlstm`` for any number of tokens in one graph.

    Args:
        q, k, v (Tensor): Shape (B, NH, N, DH); half precision is computed in float32.
        igate, fgate (Tensor): Gate pre-activations, shape (B, NH, N).
        reverse (bool): Read from last to first.
        chunk_size (int): Tokens in a chunk.
        gate_dtype (torch.dtype): Dtype of the gates' cumulative sums and maxima. Default: float64.

    Returns:
        tuple[Tensor, Tensor]: h, shape (B, NH, N, DH), and the signed normalizer, shape (B, NH, N).
    """
    shape, out_dtype = q.shape, q.dtype
    tokens, head_width = static_shape(q)[2:]
    dtype = torch.promote_types(out_dtype, torch.float32)
    chunks = (tokens + chunk_size - 1) // chunk_size
    padding = chunks * chunk_size - tokens
    is_padded = not isinstance(padding, int) or padding > 0

    # Batch and heads are flattened to G: runtimes are slow with five-dimensional tensors.
    def to_chunks(x: Tensor) -> Tensor:  # (B, NH, N, DH) -> (G, n, L, DH)
        x = x.to(dtype)
        x = F.pad(x, (0, 0, 0, padding)) if is_padded else x
        return x.reshape(-1, chunks, chunk_size, x.shape[3])

    cumulative = cumsum(F.logsigmoid(fgate.to(gate_dtype)), reverse)
    log_weight = F.pad(igate.to(gate_dtype) - cumulative, (0, padding), value=LOG_ZERO)
    log_weight = log_weight.reshape(-1, chunks, chunk_size)  # (G, n, L)

    # Logarithms of the largest weight read so far, in the chunk and before it.
    chunk_max = log_weight.amax(-1)  # (G, n)
    causal = _causal_mask(chunks, chunks, reverse, q.device, strict=True)
    earlier_max = torch.where(causal, chunk_max.unsqueeze(-2), LOG_ZERO)  # (G, n, n)
    max_before = earlier_max.amax(-1, keepdim=True)  # (G, n, 1)
    running_max = _running_max(log_weight, chunk_size, reverse)
    running_max = torch.maximum(running_max, max_before)  # (G, n, L)
    logarithms = (log_weight.unsqueeze(-2) - running_max.unsqueeze(-1)).to(dtype)
    causal = _causal_mask(chunk_size, chunk_size, reverse, q.device)
    mask = torch.where(causal, 0.0, LOG_ZERO).to(dtype)  # a constant
    weights = torch.exp(logarithms + mask)  # (G, n, L, L)
    chunk_weights = torch.exp((earlier_max - max_before).to(dtype))  # (G, n, n)
    write_weight = torch.exp((log_weight - chunk_max.unsqueeze(-1)).to(dtype)).unsqueeze(-1)
    read_weight = torch.exp((max_before - running_max).to(dtype)).unsqueeze(-1)

    q, k, v = to_chunks(q), to_chunks(k), to_chunks(v)
    scores = torch.matmul(q, k.transpose(-1, -2)) * weights
    numerator, normalizer = torch.matmul(scores, v), scores.sum(-1, keepdim=True)
    if not isinstance(chunks, int) or chunks > 1:
        k, q = k * write_weight, q * read_weight
        memory = torch.matmul(k.transpose(-1, -2), v)  # (G, n, DH, DH)
        memory = torch.matmul(chunk_weights, memory.flatten(-2)).reshape(memory.shape)
        numerator = numerator + torch.matmul(q, memory)
        keys = torch.matmul(chunk_weights, k.sum(-2))  # (G, n, DH)
        normalizer = normalizer + (q * keys.unsqueeze(-2)).sum(-1, keepdim=True)

    def to_tokens(x: Tensor) -> Tensor:  # (G, n, L, ...) -> (B, NH, N, ...)
        x = x.reshape(*shape[:2], chunks * chunk_size, *x.shape[3:])
        return x[:, :, :tokens] if is_padded else x

    numerator, normalizer = to_tokens(numerator), to_tokens(normalizer)
    stabilizer = cumulative + to_tokens(running_max)
    # Of exp(-m), infinity would do for the output, but not for gradients.
    stabilizer = stabilizer.clamp(min=-math.log(torch.finfo(gate_dtype).max))
    # Numerator and normalizer lack the factor 1 / sqrt(DH) of the queries.
    unit = head_width**0.5
    min_denom = torch.exp(-stabilizer).to(dtype).unsqueeze(-1) * unit
    h = numerator / (torch.maximum(normalizer.abs(), min_denom) + EPS * unit)
    return h.to(out_dtype), normalizer.squeeze(-1) / unit


def _running_max(x: Tensor, length: int, reverse: bool) -> Tensor:
    """Maximum of the entries read so far, along the last dimension of a length: every step doubles
    the number of entries that are compared.
    """
    step = 1
    while step < length:
        if reverse:
            shifted = F.pad(x[..., step:], (0, step), value=LOG_ZERO)
        else:
            shifted = F.pad(x[..., :-step], (step, 0), value=LOG_ZERO)
        x = torch.maximum(x, shifted)
        step *= 2
    return x


def _causal_mask(rows: int, columns: int, reverse: bool, device, strict: bool = False) -> Tensor:
    """Whether row t has read column j, shape (rows, columns)."""
    t = torch.arange(rows, device=device).unsqueeze(-1)
    j = torch.arange(columns, device=device)
    if strict:
        return j > t if reverse else j < t
    return j >= t if reverse else j <= t
