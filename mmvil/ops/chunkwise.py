# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""The chunkwise form of the mLSTM: parallel inside a chunk, recurrent from chunk to chunk, linear in N.

What chunk c leaves behind is a memory and a normalizer, scaled by the running maximum :math:`M_c` at its last token read,

.. math:: C_c = \sum_{j \le c} e^{g_j - M_c} k_j v_j^\top, \qquad n_c = \sum_{j \le c} e^{g_j - M_c} k_j,

and token t of the next chunk sees it with the weight :math:`e^{M_c - M_t} \le 1` (see :mod:`mmvil.ops.gates` for g and M).
With one chunk this is the parallel form. Nothing is flipped for the reverse direction: the chunks are taken from the
last to the first, and inside a chunk the other triangle is used.
"""
import math
from typing import List, NamedTuple, Optional, Tuple

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


class _State(NamedTuple):
    """What the chunks read so far leave behind: sums over their tokens."""
    memory: Tensor  # (G, DH, DH)
    normalizer: Tensor  # (G, DH)

    @classmethod
    def empty(cls, k: Tensor) -> '_State':
        """The state before the first token."""
        return cls(k.new_zeros(k.shape[0], k.shape[2], k.shape[2]), k.new_zeros(k.shape[0], k.shape[2]))

    def update_(self, left: Tensor, right: Tensor, right_scalar: Optional[Tensor], decay: Tensor) -> None:
        """Decay (G, 1, 1), then add the products of left (G, L, DH) with right (G, L, DH) and with right_scalar (G, L).

        No scalar stands for ones.
        """
        self.memory.mul_(decay).baddbmm_(left.transpose(1, 2), right)
        added = left.sum(1) if right_scalar is None else torch.bmm(right_scalar.unsqueeze(1), left).squeeze(1)
        self.normalizer.mul_(decay.squeeze(-1)).add_(added)

    def clone(self) -> '_State':
        return _State(self.memory.clone(), self.normalizer.clone())


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
    chunks = _split(stats, chunk_size, reverse, q.dtype)
    h = torch.empty_like(v)
    normalizer = v.new_empty(v.shape[:2])
    state = _State.empty(k) if len(chunks) > 1 else None
    for index, chunk in enumerate(chunks):
        q_c, k_c, v_c, h_c = (x[:, chunk.tokens] for x in (q, k, v, h))
        weights = decay_weights(chunk.source, chunk.running_max, reverse)
        normalizer_c = parallel_forward(q_c, k_c, v_c, weights, scale, out=h_c)
        if index > 0:
            reading = q_c * (chunk.from_state * scale)
            h_c.baddbmm_(reading, state.memory)
            normalizer_c += torch.bmm(reading, state.normalizer.unsqueeze(-1)).squeeze(-1)
        if index + 1 < len(chunks):
            state.update_(k_c * chunk.to_state, v_c, None, chunk.decay)
        h_c.div_(_denominator(normalizer_c, stats.stabilizer[:, chunk.tokens]).unsqueeze(-1))
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
    by_normalizer = normalizer.abs() >= torch.exp(-stats.stabilizer)
    sign = torch.where(by_normalizer, -inverse * normalizer.sign(), 0)

    # The states that the chunks read, for the second chunk and all after it.
    states = [_State.empty(k)] if len(chunks) > 1 else []
    for chunk in chunks[:-1]:
        states[-1].update_(k[:, chunk.tokens] * chunk.to_state, v[:, chunk.tokens], None, chunk.decay)
        states.append(states[-1].clone())

    q_grad, k_grad, v_grad = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    projection, source_grad = torch.empty_like(normalizer), torch.empty_like(normalizer)  # h . dh and k . dk
    state_grad = _State.empty(k) if len(chunks) > 1 else None  # of the state after the chunk at hand
    for index, chunk in reversed(list(enumerate(chunks))):
        tokens = chunk.tokens
        q_c, k_c, v_c, q_grad_c, k_grad_c, v_grad_c = (x[:, tokens] for x in (q, k, v, q_grad, k_grad, v_grad))
        torch.sum(h_grad[:, tokens] * h[:, tokens], -1, out=projection[:, tokens])
        numerator_grad = h_grad[:, tokens] * inverse[:, tokens].unsqueeze(-1)
        normalizer_grad = projection[:, tokens] * sign[:, tokens]
        weights = decay_weights(chunk.source, chunk.running_max, reverse)
        parallel_backward(numerator_grad, normalizer_grad, q_c, k_c, v_c, weights, scale,
                          out=(q_grad_c, k_grad_c, v_grad_c))
        if index + 1 < len(chunks):  # through the state that this chunk writes
            written_grad = torch.bmm(v_c, state_grad.memory.transpose(1, 2)).add_(state_grad.normalizer.unsqueeze(1))
            k_grad_c.addcmul_(written_grad, chunk.to_state)
            v_grad_c.baddbmm_(torch.mul(k_c, chunk.to_state, out=written_grad), state_grad.memory)
        if index > 0:  # through the state that this chunk reads
            state = states[index - 1]
            reading_grad = torch.bmm(numerator_grad, state.memory.transpose(1, 2))
            reading_grad.addcmul_(normalizer_grad.unsqueeze(-1), state.normalizer.unsqueeze(1))
            q_grad_c.addcmul_(reading_grad, chunk.from_state, value=scale)
            reading = torch.mul(q_c, chunk.from_state * scale, out=reading_grad)
            state_grad.update_(reading, numerator_grad, normalizer_grad, chunk.decay)
        torch.sum(torch.mul(k_c, k_grad_c, out=numerator_grad), -1, out=source_grad[:, tokens])

    eps_part = projection * inverse * EPS  # the stabilizer matters only relative to eps
    row_grad = torch.where(by_normalizer, 0, projection - eps_part)
    igate_grad, fgate_grad = gate_gradients(source_grad, -eps_part, row_grad, fgate, stats, reverse)
    return q_grad, k_grad, v_grad, igate_grad, fgate_grad
