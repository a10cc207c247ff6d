# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""The chunkwise form of the mLSTM: parallel inside chunks, recurrent from chunk to chunk, linear
in N.

The chunks read before chunk c leave behind a memory and a normalizer, scaled by the running maximum
:math:`M` at their end:

.. math:: C = \sum_j e^{g_j - M} k_j v_j^\top, \qquad n = \sum_j e^{g_j - M} k_j,

and token t of chunk c sees them with the weight :math:`e^{M - M_t} \le 1` (see
:mod:`mmvil.ops.gates` for g and M). All chunks are computed side by side; only the states pass
through a loop. With one chunk this is the parallel form. Nothing is flipped for the reverse
direction: states go from the last chunk to the first, and inside chunks the other triangle is used.

Shapes: batch and heads are flattened to G, and n chunks of L tokens make (G, n, L, DH).
"""

import math
from typing import NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gates import GateStatistics, gate_gradients, gate_statistics
from .parallel import decay_weights, parallel_backward, parallel_forward
from .reference import EPS


def chunk_length(length: int, chunk_size: int) -> int:
    """Tokens per chunk: at most ``chunk_size``, and such that they tile the sequence if that takes
    less than twice the chunks.
    """
    fewest = math.ceil(length / chunk_size)
    for count in range(fewest, 2 * fewest):
        if length % count == 0:
            return length // count
    return math.ceil(length / fewest)  # the last chunk is padded


class _ChunkGates(NamedTuple):
    """The gates' weights by chunk, in the dtype of the features."""

    weights: Tensor  # (G * n, L, L) exp(g_j - M_t) inside a chunk
    from_state: (
        Tensor  # (G * n, L, 1) exp(M_before - M_t): what of the incoming state reaches token t
    )
    to_state: Tensor  # (G * n, L, 1) exp(g_j - M_end): what of token j is left at the chunk's end
    decay: Tensor  # (G, n, 1, 1) exp(M_before - M_end): what of it is left at the chunk's end


def _chunk_gates(
    stats: GateStatistics, length: int, reverse: bool, dtype: torch.dtype
) -> _ChunkGates:
    # Padding stands after the last token and weighs nothing.
    padding = -stats.source.shape[1] % length
    source, running_max = stats.source, stats.running_max
    if padding:
        source = F.pad(source, (0, padding), value=-math.inf)
        running_max = torch.cat([running_max, running_max[:, -1:].expand(-1, padding)], dim=1)
    source, running_max = (
        source.unflatten(1, (-1, length)),
        running_max.unflatten(1, (-1, length)),
    )  # (G, n, L)
    end = running_max[..., :1] if reverse else running_max[..., -1:]
    before = end.roll(-1 if reverse else 1, 1)
    before[:, -1 if reverse else 0] = -math.inf  # nothing is read before the first chunk
    # Differences are taken in float64, relative to the chunk; only then the precision is lowered.
    to_state = (source - end).to(dtype)
    weights = decay_weights(
        to_state.flatten(0, 1), (running_max - end).to(dtype).flatten(0, 1), reverse
    )
    return _ChunkGates(
        weights,
        torch.exp(before - running_max).to(dtype).flatten(0, 1).unsqueeze(-1),
        to_state.exp_().flatten(0, 1).unsqueeze(-1),
        torch.exp(before - end).to(dtype).unsqueeze(-1),
    )


def _scan_(
    memory: Tensor, normalizer: Tensor, decay: Tensor, reverse: bool
) -> Tuple[Tensor, Tensor]:
    """Turn what every chunk adds to the state into the state that it finds.

    Args:
        memory (Tensor): Added by each chunk, shape (G * n, DH, DH); overwritten.
        normalizer (Tensor): Likewise, shape (G * n, DH); overwritten.
        decay (Tensor): What of the incoming state is left after a chunk, shape (G, n, 1, 1).
        reverse (bool): From the last chunk to the first.

    Returns:
        tuple[Tensor, Tensor]: Memory and normalizer before each chunk, in the shapes of the
        arguments.
    """
    chunks = decay.shape[1]
    memory, normalizer = memory.unflatten(0, (-1, chunks)), normalizer.unflatten(0, (-1, chunks))
    order = range(chunks)[::-1] if reverse else range(chunks)
    memory_before, normalizer_before = torch.empty_like(memory), torch.empty_like(normalizer)
    memory_before[:, order[0]] = 0
    normalizer_before[:, order[0]] = 0
    for last, this in zip(order, order[1:]):
        torch.addcmul(
            memory[:, last], memory_before[:, last], decay[:, last], out=memory_before[:, this]
        )
        torch.addcmul(
            normalizer[:, last],
            normalizer_before[:, last],
            decay[:, last, 0],
            out=normalizer_before[:, this],
        )
    return memory_before.flatten(0, 1), normalizer_before.flatten(0, 1)


def _states(k: Tensor, v: Tensor, gates: _ChunkGates, reverse: bool) -> Tuple[Tensor, Tensor]:
    """Memory (G * n, DH, DH) and normalizer (G * n, DH) that each chunk finds."""
    written = k * gates.to_state
    return _scan_(torch.bmm(written.transpose(1, 2), v), written.sum(1), gates.decay, reverse)


def _denominator(normalizer: Tensor, stabilizer: Tensor) -> Tensor:
    """max(abs(n_t), exp(-m_t)) + eps, shape (G, N); infinite where nothing was ever written, so
    that h is 0.
    """
    return torch.maximum(normalizer.abs(), torch.exp(-stabilizer).to(normalizer.dtype)).add_(EPS)


def _to_chunks(length: int, *features: Tensor):
    """(G, N, DH) to (G * n, L, DH), padded with zeros if need be."""
    padding = -features[0].shape[1] % length
    if padding:
        features = tuple(F.pad(x, (0, 0, 0, padding)) for x in features)
    return tuple(x.unflatten(1, (-1, length)).flatten(0, 1) for x in features)


def _from_chunks(x: Tensor, shape: torch.Size) -> Tensor:
    """(G * n, L, ...) to (G, N, ...), without the padding."""
    return x.view(shape[0], -1, *shape[2:])[:, : shape[1]]


def chunkwise_forward(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool, chunk_size: int
) -> Tuple[Tensor, Tensor]:
    """mLSTM over a sequence, O(N * (chunk_size + DH)) per head and channel.

    Args:
        q, k, v (Tensor): Shape (G, N, DH) with batch and heads flattened to G; float32 or float64.
        igate, fgate (Tensor): Gate pre-activations, shape (G, N).
        reverse (bool): Read from last to first.
        chunk_size (int): Largest number of tokens in a chunk.

    Returns:
        tuple[Tensor, Tensor]: h, shape (G, N, DH), and the signed normalizer, shape (G, N), needed
        for backward.
    """
    shape, scale = q.shape, q.shape[-1] ** -0.5
    stats = gate_statistics(igate, fgate, reverse)
    length = chunk_length(shape[1], chunk_size)
    gates = _chunk_gates(stats, length, reverse, q.dtype)
    q, k, v = _to_chunks(length, q, k, v)
    numerator, normalizer = parallel_forward(q, k, v, gates.weights, scale)
    if length < shape[1]:
        memory, state_normalizer = _states(k, v, gates, reverse)
        reading = q * (gates.from_state * scale)
        numerator.baddbmm_(reading, memory)
        normalizer += torch.bmm(reading, state_normalizer.unsqueeze(-1)).squeeze(-1)
    normalizer = _from_chunks(normalizer, shape[:2])
    h = _from_chunks(numerator, shape).div_(
        _denominator(normalizer, stats.stabilizer).unsqueeze(-1)
    )
    return h, normalizer


def chunkwise_backward(
    h_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    h: Tensor,
    normalizer: Tensor,
    reverse: bool,
    chunk_size: int,
):
    r"""Gradients of :func:`chunkwise_forward`, with scores and states computed again.

    No gradient passes through an exponential or a cumulative sum over pairs of tokens. Because the
    weights enter only through the scores, :math:`\sum_t \partial a_{tj} = k_j \cdot \partial k_j`;
    because h is invariant to a common factor of numerator and normalizer, :math:`\sum_j \partial
    a_{tj}` is 0 where :math:`|n_t|` is the denominator, and :math:`h_t \cdot \partial h_t` (up to
    eps) where :math:`e^{-m_t}` is.

    Args:
        h_grad (Tensor): Gradient of h, shape (G, N, DH).
        q, k, v, igate, fgate, reverse, chunk_size: As in the forward pass.
        h, normalizer (Tensor): Its results.

    Returns:
        tuple[Tensor, ...]: Gradients of q, k, v (G, N, DH) and of igate, fgate (G, N).
    """
    shape, scale = q.shape, q.shape[-1] ** -0.5
    stats = gate_statistics(igate, fgate, reverse)
    length = chunk_length(shape[1], chunk_size)
    gates = _chunk_gates(stats, length, reverse, q.dtype)

    projection = (h_grad * h).sum(-1)  # (G, N)
    inverse = _denominator(normalizer, stats.stabilizer).reciprocal_()
    by_normalizer = normalizer.abs() >= torch.exp(-stats.stabilizer)
    normalizer_grad = torch.where(by_normalizer, projection * inverse * -normalizer.sign(), 0)
    q, k, v, numerator_grad = _to_chunks(length, q, k, v, h_grad * inverse.unsqueeze(-1))
    normalizer_grad = _to_chunks(length, normalizer_grad.unsqueeze(-1))[0]  # (G * n, L, 1)
    q_grad, k_grad, v_grad = parallel_backward(
        numerator_grad, normalizer_grad, q, k, v, gates.weights, scale
    )
    if length < shape[1]:
        # Through the state that a chunk reads ...
        memory, state_normalizer = _states(k, v, gates, reverse)
        reading_grad = torch.bmm(numerator_grad, memory.transpose(1, 2))
        reading_grad.addcmul_(normalizer_grad, state_normalizer.unsqueeze(1))
        from_state = gates.from_state * scale
        q_grad.addcmul_(reading_grad, from_state)
        # ... whose gradients run from chunk to chunk in the opposite direction ...
        reading = torch.mul(q, from_state, out=reading_grad)
        memory_grad, state_normalizer_grad = _scan_(
            torch.bmm(reading.transpose(1, 2), numerator_grad),
            torch.bmm(normalizer_grad.transpose(1, 2), reading).squeeze(1),
            gates.decay,
            not reverse,
        )
        # ... and through the state that it writes.
        written_grad = torch.baddbmm(
            state_normalizer_grad.unsqueeze(1), v, memory_grad.transpose(1, 2)
        )
        k_grad.addcmul_(written_grad, gates.to_state)
        v_grad.baddbmm_(torch.mul(k, gates.to_state, out=written_grad), memory_grad)
    source_grad = _from_chunks((k * k_grad).sum(-1), shape[:2])
    q_grad, k_grad, v_grad = (_from_chunks(grad, shape) for grad in (q_grad, k_grad, v_grad))

    eps_part = projection * inverse * EPS  # the stabilizer matters only relative to eps
    row_grad = torch.where(by_normalizer, 0, projection - eps_part)
    igate_grad, fgate_grad = gate_gradients(source_grad, -eps_part, row_grad, fgate, stats, reverse)
    return q_grad, k_grad, v_grad, igate_grad, fgate_grad
