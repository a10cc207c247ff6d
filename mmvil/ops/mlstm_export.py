# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""The mLSTM in a few plain operations for exporters: no loop, nothing in place.

The chunkwise form passes states from chunk to chunk in a loop, whose length a graph with dynamic
shapes does not know. But what reaches a chunk is again a weighted sum over the chunks before it, so
the parallel form is used twice: between the tokens of a chunk, and between the n chunks. With g, M
and m as in :mod:`mmvil.ops.gates`, T the largest g in a chunk and :math:`M^-_c` the largest before
chunk c,

.. math:: C_c = \sum_{b < c} e^{T_b - M^-_c} \sum_{j \in b} e^{g_j - T_b} k_j v_j^\top

is the incoming memory of the chunk, and token t sees it with the weight :math:`e^{M^-_c - M_t}`.
This costs :math:`n^2` products of a weight with a (DH, DH) memory, little as long as n is well
below the chunk length. Running maxima are those of masked matrices, as ONNX has no cumulative one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import static_shape
from .gates import cumsum
from .reference import EPS

NOTHING = -1e30
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
    tokens, out_dtype = static_shape(q)[2], q.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    chunks = (tokens + chunk_size - 1) // chunk_size
    padding = chunks * chunk_size - tokens

    def to_chunks(x: Tensor) -> Tensor:  # (B, NH, N, DH) -> (B, NH, n, L, DH)
        x = F.pad(x.to(dtype), (0, 0, 0, padding))
        return x.reshape(x.shape[0], x.shape[1], chunks, chunk_size, x.shape[3])

    cumulative = cumsum(F.logsigmoid(fgate.to(gate_dtype)), reverse)
    source = F.pad(igate.to(gate_dtype) - cumulative, (0, padding), value=NOTHING)
    source = source.reshape(source.shape[0], source.shape[1], chunks, chunk_size)  # (B, NH, n, L)

    # Logarithms of what has been written when token t is read, and of what before chunk c.
    written = _mask(source, _has_read(chunk_size, chunk_size, reverse, q.device))
    top = source.amax(-1)  # (B, NH, n)
    written_before = _mask(top, _has_read(chunks, chunks, reverse, q.device, strictly=True))
    max_before = written_before.amax(-1, keepdim=True)  # (B, NH, n, 1)
    running_max = torch.maximum(written.amax(-1), max_before)  # (B, NH, n, L)
    weights = torch.exp((written - running_max.unsqueeze(-1)).to(dtype))  # (B, NH, n, L, L)
    chunk_weights = torch.exp((written_before - max_before).to(dtype))  # (B, NH, n, n)
    to_state = torch.exp((source - top.unsqueeze(-1)).to(dtype)).unsqueeze(-1)
    from_state = torch.exp((max_before - running_max).to(dtype)).unsqueeze(-1)

    q, k, v = to_chunks(q) * q.shape[-1] ** -0.5, to_chunks(k), to_chunks(v)
    # A column of ones makes the normalizer one more channel of the values.
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # (B, NH, n, L, DH + 1)
    sums = torch.matmul(torch.matmul(q, k.transpose(-1, -2)) * weights, v)
    if not isinstance(chunks, int) or chunks > 1:
        memory = torch.matmul((k * to_state).transpose(-1, -2), v)  # (B, NH, n, DH, DH + 1)
        memory = torch.matmul(chunk_weights, memory.flatten(-2)).reshape(memory.shape)
        sums = sums + torch.matmul(q * from_state, memory)
    sums = sums.flatten(2, 3)[:, :, :tokens]
    numerator, normalizer = sums[..., :-1], sums[..., -1]

    stabilizer = cumulative + running_max.flatten(2)[:, :, :tokens]
    denominator = torch.maximum(normalizer.abs(), torch.exp(-stabilizer).to(dtype)) + EPS
    return (numerator / denominator.unsqueeze(-1)).to(out_dtype), normalizer


def _has_read(rows: int, columns: int, reverse: bool, device, strictly: bool = False) -> Tensor:
    """Whether row t has read column j, shape (rows, columns)."""
    t = torch.arange(rows, device=device).unsqueeze(-1)
    j = torch.arange(columns, device=device)
    if strictly:
        return j > t if reverse else j < t
    return j >= t if reverse else j <= t


def _mask(x: Tensor, mask: Tensor) -> Tensor:
    """Repeat (..., L) for every row of the mask (L, L), shape (..., L, L)."""
    return torch.where(mask, x.unsqueeze(-2), NOTHING)
