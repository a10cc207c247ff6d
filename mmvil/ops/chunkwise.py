# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""The chunkwise form of the mLSTM: parallel inside a chunk, recurrent from chunk to chunk, linear in N.

What chunk c leaves behind is a memory and a normalizer, scaled by the running maximum :math:`M_c` at its last token read,

.. math:: C_c = \sum_{j \le c} e^{g_j - M_c} k_j v_j^\top, \qquad n_c = \sum_{j \le c} e^{g_j - M_c} k_j,

and token t of the next chunk sees it with the weight :math:`e^{M_c - M_t} \le 1` (see :mod:`mmvil.ops.gates` for g and M).
With one chunk this is the parallel form. Nothing is flipped for the reverse direction: the chunks are taken from the
last to the first, and inside a chunk the other triangle is used.
"""
import math
from typing import List, NamedTuple, Tuple

import torch
from torch import Tensor

from .gates import GateStatistics, gate_gradients, gate_statistics
from .parallel import decay_weights, parallel_backward, parallel_forward
from .reference import EPS


class _Chunk(NamedTuple):
    """One chunk's place in the sequence and its gate weights, in the dtype of the features."""
    tokens: slice
    source: Tensor  # (G, L) g_j - M_c
    running_max: Tensor  # (G, L) M_t - M_c
    from_state: Tensor  # (G, L, 1) exp(M_{c-1} - M_t): what of the incoming state reaches token t
    to_state: Tensor  # (G, L, 1) exp(g_j - M_c): what of token j the outgoing state keeps
    decay: Tensor  # (G, 1, 1) exp(M_{c-1} - M_c): what of the incoming state the outgoing state keeps


def _split(stats: GateStatistics, chunk_size: int, reverse: bool, dtype: torch.dtype) -> List[_Chunk]:
    """Cut a sequence into chunks of nearly equal length, listed in reading order."""
    length = stats.source.shape[-1]
    count = math.ceil(length / chunk_size)
    starts = [round(i * length / count) for i in range(count + 1)]
    slices = [slice(a, b) for a, b in zip(starts, starts[1:])]
    chunks = []
    previous = None  # before the first chunk there is no state
    for tokens in reversed(slices) if reverse else slices:
        source, running_max = stats.source[:, tokens], stats.running_max[:, tokens]
        final = running_max[:, :1] if reverse else running_max[:, -1:]
        if previous is None:
            previous = torch.full_like(final, -math.inf)
        # Differences are taken in float64, relative to this chunk; only then the precision is lowered.
        chunks.append(
            _Chunk(tokens, (source - final).to(dtype), (running_max - final).to(dtype),
                   torch.exp(previous - running_max).to(dtype).unsqueeze(-1),
                   torch.exp(source - final).to(dtype).unsqueeze(-1),
                   torch.exp(previous - final).to(dtype).unsqueeze(-1)))
        previous = final
    return chunks


def _next_state(state, chunk: _Chunk, k: Tensor, v: Tensor):
    """Write a chunk's keys (G, L, DH) and values (G, L, DH) into the memory (G, DH, DH) and normalizer (G, DH)."""
    written = k * chunk.to_state
    if state is None:
        return torch.bmm(written.transpose(1, 2), v), written.sum(1)
    memory, normalizer = state
    return (torch.baddbmm(memory * chunk.decay, written.transpose(1, 2), v),
            normalizer * chunk.decay.squeeze(-1) + written.sum(1))


def _denominator(normalizer: Tensor, stabilizer: Tensor) -> Tensor:
    """max(abs(n_t), exp(-m_t)) + eps, shape (G, N); infinite where nothing was ever written, so that h is 0."""
    return torch.maximum(normalizer.abs(), torch.exp(-stabilizer).to(normalizer.dtype)) + EPS


def chunkwise_forward(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool,
                      chunk_size: int) -> Tuple[Tensor, Tensor]:
    """mLSTM over a sequence, O(N * (chunk_size + DH)) per head and channel.

    Args:
        q, k, v (Tensor): Shape (G, N, DH) with batch and heads flattened to G; float32 or float64.
        igate, fgate (Tensor): Gate pre-activations, shape (G, N).
        reverse (bool): Read from last to first.
        chunk_size (int): Largest number of tokens in a chunk.

    Returns:
        tuple[Tensor, Tensor]: h, shape (G, N, DH), and the signed normalizer, shape (G, N), needed for backward.
    """
    scale = q.shape[-1]**-0.5
    stats = gate_statistics(igate, fgate, reverse)
    h = torch.empty_like(v)
    normalizer = v.new_empty(v.shape[:2])
    state = None
    chunks = _split(stats, chunk_size, reverse, q.dtype)
    for index, chunk in enumerate(chunks):
        q_c, k_c, v_c = q[:, chunk.tokens], k[:, chunk.tokens], v[:, chunk.tokens]
        weights = decay_weights(chunk.source, chunk.running_max, reverse)
        numerator_c, normalizer_c = parallel_forward(q_c, k_c, v_c, weights, scale)
        if state is not None:
            reading = q_c * (chunk.from_state * scale)
            numerator_c = numerator_c.baddbmm_(reading, state[0])
            normalizer_c = normalizer_c + torch.bmm(reading, state[1].unsqueeze(-1)).squeeze(-1)
        if index + 1 < len(chunks):
            state = _next_state(state, chunk, k_c, v_c)
        denominator = _denominator(normalizer_c, stats.stabilizer[:, chunk.tokens])
        torch.div(numerator_c, denominator.unsqueeze(-1), out=h[:, chunk.tokens])
        normalizer[:, chunk.tokens] = normalizer_c
    return h, normalizer


def chunkwise_backward(h_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, h: Tensor,
                       normalizer: Tensor, reverse: bool, chunk_size: int):
    r"""Gradients of :func:`chunkwise_forward`, with scores and states computed again.

    No gradient passes through an exponential or a cumulative sum over pairs of tokens. Because the weights enter only through
    the scores, :math:`\sum_t \partial a_{tj} = k_j \cdot \partial k_j`; because h is invariant to a common factor of
    numerator and normalizer, :math:`\sum_j \partial a_{tj}` is 0 where :math:`|n_t|` is the denominator, and
    :math:`h_t \cdot \partial h_t` (up to eps) where :math:`e^{-m_t}` is.

    Args:
        h_grad (Tensor): Gradient of h, shape (G, N, DH).
        q, k, v, igate, fgate, reverse, chunk_size: As in the forward pass.
        h, normalizer (Tensor): Its results.

    Returns:
        tuple[Tensor, ...]: Gradients of q, k, v (G, N, DH) and of igate, fgate (G, N).
    """
    scale = q.shape[-1]**-0.5
    stats = gate_statistics(igate, fgate, reverse)
    chunks = _split(stats, chunk_size, reverse, q.dtype)

    inverse = 1 / _denominator(normalizer, stats.stabilizer)  # (G, N)
    numerator_grad = h_grad * inverse.unsqueeze(-1)
    projection = torch.linalg.vecdot(h_grad, h)  # (G, N)
    by_normalizer = normalizer.abs() >= torch.exp(-stats.stabilizer)
    normalizer_grad = torch.where(by_normalizer, -projection * inverse * normalizer.sign(), 0)

    states = [None]
    for chunk in chunks[:-1]:
        states.append(_next_state(states[-1], chunk, k[:, chunk.tokens], v[:, chunk.tokens]))

    q_grad, k_grad, v_grad = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    memory_grad = None  # of the state after the chunk at hand; None: nobody reads that state
    for chunk, state in zip(reversed(chunks), reversed(states)):
        q_c, k_c, v_c = q[:, chunk.tokens], k[:, chunk.tokens], v[:, chunk.tokens]
        numerator_grad_c, normalizer_grad_c = numerator_grad[:, chunk.tokens], normalizer_grad[:, chunk.tokens]
        weights = decay_weights(chunk.source, chunk.running_max, reverse)
        q_grad_c, k_grad_c, v_grad_c = parallel_backward(numerator_grad_c, normalizer_grad_c, q_c, k_c, v_c, weights,
                                                         scale)
        if memory_grad is not None:  # through the state that this chunk writes
            written_grad = torch.baddbmm(state_normalizer_grad.unsqueeze(1), v_c, memory_grad.transpose(1, 2))
            k_grad_c = k_grad_c.addcmul_(written_grad, chunk.to_state)
            v_grad_c = v_grad_c.baddbmm_(k_c * chunk.to_state, memory_grad)
        if state is not None:  # through the state that this chunk reads
            reading = q_c * (chunk.from_state * scale)
            reading_grad = torch.bmm(numerator_grad_c, state[0].transpose(1, 2))
            reading_grad = reading_grad.addcmul_(normalizer_grad_c.unsqueeze(-1), state[1].unsqueeze(1))
            q_grad_c = q_grad_c.addcmul_(reading_grad, chunk.from_state, value=scale)
            normalizer_part = torch.bmm(normalizer_grad_c.unsqueeze(1), reading).squeeze(1)
            if memory_grad is None:
                memory_grad = torch.bmm(reading.transpose(1, 2), numerator_grad_c)
                state_normalizer_grad = normalizer_part
            else:
                memory_grad = torch.baddbmm(memory_grad * chunk.decay, reading.transpose(1, 2), numerator_grad_c)
                state_normalizer_grad = state_normalizer_grad * chunk.decay.squeeze(-1) + normalizer_part
        q_grad[:, chunk.tokens] = q_grad_c
        k_grad[:, chunk.tokens] = k_grad_c
        v_grad[:, chunk.tokens] = v_grad_c

    eps_part = projection * inverse * EPS  # the stabilizer matters only relative to eps
    row_grad = torch.where(by_normalizer, 0, projection - eps_part)
    igate_grad, fgate_grad = gate_gradients(
        torch.linalg.vecdot(k_grad, k), -eps_part, row_grad, fgate, stats, reverse)
    return q_grad, k_grad, v_grad, igate_grad, fgate_grad
