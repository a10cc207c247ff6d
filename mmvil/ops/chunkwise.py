# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""The chunkwise form of the mLSTM: parallel inside chunks, recurrent from chunk to chunk, linear
in N.

The chunks read before chunk c leave behind a memory and a normalizer, scaled by the running maximum
:math:`M` at their end:

.. math:: C = \sum_j e^{g_j - M} k_j v_j^\top, \qquad n = \sum_j e^{g_j - M} k_j,

and token t of chunk c sees them with the weight :math:`e^{M - M_t} \le 1` (see
:mod:`mmvil.ops.gates` for g and M). The chunks of a sequence are computed side by side; only the
states pass from one to the next. With one chunk this is the parallel form. Nothing is flipped for
the reverse direction: states go from the last chunk to the first, and inside chunks the other
triangle is used.

Sequences, one for each sample and head, are processed in tiles of a few sequences that stay in a
CPU's cache, and read and written where they lie: (B, NH, N, DH) may be a view of tokens (B, N, NH *
DH).

Shapes: a tile of G sequences, cut into n chunks of L tokens, makes (G * n, L, DH).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gates import GateStatistics, gate_gradients, gate_statistics
from .layout import like_tokens
from .parallel import decay_weights, parallel_backward, parallel_forward
from .reference import EPS

SEQUENCE_TILE_BYTES = 2**20
"""Queries of a tile of sequences on a CPU; with all that is made of them they fill a common L2
cache."""

DENSE_TRANSFER = 32
"""Up to that many chunks, all states come out of one matrix product; beyond, out of a loop."""


def chunk_length(length: int, chunk_size: int) -> int:
    """Tokens per chunk: at most ``chunk_size``, and a divisor of the length if that takes less than
    twice the chunks.
    """
    fewest = math.ceil(length / chunk_size)
    for count in range(fewest, 2 * fewest):
        if length % count == 0:
            return length // count
    return math.ceil(length / fewest)  # the last chunk is padded


class ChunkGates(NamedTuple):
    """The gates of G sequences by chunk. Logarithms stay in float64: far from their chunk's start
    they are large, and only their differences are small. Weights are in the dtype of the features.
    """

    source: Tensor  # (G, n, L) g_j
    running_max: Tensor  # (G, n, L) M_t
    to_state: Tensor  # (G, n, L, 1) exp(g_j - M_end): what of token j is left at the chunk's end
    from_state: Tensor  # (G, n, L, 1) exp(M_before - M_t): what token t sees of the incoming state
    # (G, n, n): what of chunk j's part is left in the incoming state of chunk c. Beyond
    # DENSE_TRANSFER chunks (G, n, 1): what of the incoming state of chunk c is left at its end.
    transfer: Tensor

    def sequence_tiles(self, size: int) -> list['ChunkGates']:
        return [ChunkGates(*parts) for parts in zip(*(x.split(size) for x in self))]


def chunk_gates(
    stats: GateStatistics, length: int, reverse: bool, dtype: torch.dtype
) -> ChunkGates:
    """Cut statistics of shape (G, N) into chunks of ``length`` tokens."""
    source, running_max = stats.source, stats.running_max
    padding = -source.shape[1] % length  # stands after the last token and weighs nothing
    if padding:
        source = F.pad(source, (0, padding), value=-math.inf)
        running_max = torch.cat([running_max, running_max[:, -1:].expand(-1, padding)], dim=1)
    source, running_max = source.unflatten(1, (-1, length)), running_max.unflatten(1, (-1, length))
    end = running_max[..., :1] if reverse else running_max[..., -1:]  # (G, n, 1)
    before = end.roll(-1 if reverse else 1, 1)
    before[:, -1 if reverse else 0] = -math.inf  # nothing is read before the first chunk
    if end.shape[1] > DENSE_TRANSFER:
        transfer = torch.exp(before - end)
    else:
        transfer = torch.exp(end.transpose(1, 2) - before)
        transfer = transfer.triu_(1) if reverse else transfer.tril_(-1)
    return ChunkGates(
        source,
        running_max,
        torch.exp(source - end).to(dtype).unsqueeze(-1),
        torch.exp(before - running_max).to(dtype).unsqueeze(-1),
        transfer.to(dtype),
    )


def _incoming_states(added: Tensor, transfer: Tensor, reverse: bool) -> Tensor:
    """Incoming state of every chunk, from what each chunk adds to the state.

    Args:
        added (Tensor): Shape (G * n, ...).
        transfer (Tensor): See :class:`ChunkGates`.
        reverse (bool): Whether chunks are read from last to first.

    Returns:
        Tensor: Shape (G * n, ...).
    """
    sequences, chunks, width = transfer.shape
    flat = added.view(sequences, chunks, -1)
    if width == chunks:
        return torch.bmm(transfer, flat).view(added.shape)
    return _scan(flat, transfer, reverse).view(added.shape)


def _incoming_states_backward(states_grad: Tensor, transfer: Tensor, reverse: bool) -> Tensor:
    """Gradient of ``added`` in :func:`_incoming_states`: the transposed map."""
    if transfer.shape[1] == transfer.shape[2]:
        transfer = transfer.transpose(1, 2)
    return _incoming_states(states_grad, transfer, not reverse)


def _scan(added: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    """Carry states (G, n, K) from chunk to chunk, with what is left of them after each (G, n,
    1).
    """
    order = range(added.shape[1])[::-1] if reverse else range(added.shape[1])
    incoming = torch.empty_like(added)
    incoming[:, order[0]] = 0
    added, decay, states = added.unbind(1), decay.unbind(1), incoming.unbind(1)
    for last, this in zip(order, order[1:]):
        torch.addcmul(added[last], states[last], decay[last], out=states[this])
    return incoming


def _sequence_tile_size(q: Tensor) -> int:
    """Sequences in a tile: on a CPU some heads of one sample, whose tensors stay in its cache;
    elsewhere all there are.
    """
    batch, heads, tokens, head_width = q.shape
    if q.device.type != 'cpu':
        return batch * heads
    fitting = max(1, SEQUENCE_TILE_BYTES // (tokens * head_width * q.element_size()))
    return max(size for size in range(1, heads + 1) if heads % size == 0 and size <= fitting)


def _sequence_tiles(x: Tensor, size: int) -> Sequence[Tensor]:
    """Views (size, ...) of (B, NH, ...), each of one sample and some heads, or all in one."""
    if size > x.shape[1]:
        return [x]
    samples = x.unbind(0)
    if size == x.shape[1]:
        return samples
    return [heads for sample in samples for heads in sample.split(size)]


def _to_chunks(x: Tensor, length: int) -> Tensor:
    """Cut (..., N, DH) into (G * n, L, DH), padded with zeros if need be."""
    padding = -x.shape[-2] % length
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    return x.unflatten(-2, (-1, length)).flatten(0, -3)


def _from_chunks(x: Tensor, shape: torch.Size) -> Tensor:
    """Join (G * n, L, DH) to (..., N, DH), without the padding."""
    x = x.reshape(*shape[:-2], -1, shape[-1])
    return x[..., : shape[-2], :]


def _floor(stats: GateStatistics, dtype: torch.dtype) -> Tensor:
    """exp(-m_t), the least denominator; infinite where nothing was ever written, so that h is 0."""
    return torch.exp(-stats.stabilizer).to(dtype)


def chunkwise_forward(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute the mLSTM in O(N * (chunk_size + DH)) per head and channel.

    Args:
        q, k, v (Tensor): Shape (B, NH, N, DH), any strides; float32 or float64.
        igate, fgate (Tensor): Gate pre-activations, shape (B, NH, N).
        reverse (bool): Read from last to first.
        chunk_size (int): Largest number of tokens in a chunk.

    Returns:
        tuple[Tensor, Tensor]: h, shape (B, NH, N, DH) and in memory (B, N, NH, DH); and the signed
        normalizer, shape (B, NH, N), needed for backward.
    """
    scale = q.shape[-1] ** -0.5
    stats = gate_statistics(igate.flatten(0, 1), fgate.flatten(0, 1), reverse)
    length = chunk_length(q.shape[2], chunk_size)
    gates = chunk_gates(stats, length, reverse, q.dtype)
    size = _sequence_tile_size(q)

    h = like_tokens(q)
    normalizer = torch.empty_like(stats.source, dtype=q.dtype)  # (B * NH, N)
    for q_, k_, v_, h_, normalizer_, floor, part in zip(
        *(_sequence_tiles(x, size) for x in (q, k, v, h)),
        normalizer.split(size),
        _floor(stats, q.dtype).split(size),
        gates.sequence_tiles(size),
    ):
        q_, k_, v_ = (_to_chunks(x, length) for x in (q_, k_, v_))
        numerator, sums = parallel_forward(q_, k_, v_, _weights(part, reverse, q.dtype), scale)
        if length < q.shape[2]:
            memory, state_normalizer = _states(k_, v_, part, reverse)
            state_q = q_ * (part.from_state * scale).flatten(0, 1)
            numerator.baddbmm_(state_q, memory)
            sums += torch.bmm(state_q, state_normalizer.transpose(1, 2)).squeeze(-1)
        normalizer_.copy_(_from_chunks(sums.unsqueeze(-1), (*normalizer_.shape, 1)).squeeze(-1))
        denominator = torch.maximum(normalizer_.abs(), floor).add_(EPS)
        torch.div(_from_chunks(numerator, h_.shape), denominator.view(*h_.shape[:-1], 1), out=h_)
    return h, normalizer.view(q.shape[:3])


def _weights(gates: ChunkGates, reverse: bool, dtype: torch.dtype) -> Tensor:
    """exp(g_j - M_t) inside the chunks, shape (G * n, L, L)."""
    source, running_max = gates.source.flatten(0, 1), gates.running_max.flatten(0, 1)
    return decay_weights(source, running_max, reverse, dtype)


def _states(k: Tensor, v: Tensor, gates: ChunkGates, reverse: bool) -> tuple[Tensor, Tensor]:
    """Incoming memory (G * n, DH, DH) and normalizer (G * n, 1, DH) of each chunk."""
    state_k = k * gates.to_state.flatten(0, 1)
    memory = torch.bmm(state_k.transpose(1, 2), v)
    return (
        _incoming_states(memory, gates.transfer, reverse),
        _incoming_states(state_k.sum(1, keepdim=True), gates.transfer, reverse),
    )


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
) -> tuple[Tensor, ...]:
    r"""Gradients of :func:`chunkwise_forward`, with scores and states computed again.

    No gradient passes through an exponential or a cumulative sum over pairs of tokens. Because the
    weights enter only through the scores, :math:`\sum_t \partial a_{tj} = k_j \cdot \partial k_j`;
    because h is invariant to a common factor of numerator and normalizer, :math:`\sum_j \partial
    a_{tj}` is 0 where :math:`|n_t|` is the denominator, and :math:`h_t \cdot \partial h_t` (up to
    eps) where :math:`e^{-m_t}` is.

    Args:
        h_grad (Tensor): Gradient of h, shape (B, NH, N, DH), any strides.
        q, k, v, igate, fgate, reverse, chunk_size: As in the forward pass.
        h, normalizer (Tensor): Its results.

    Returns:
        tuple[Tensor, ...]: Gradients of q, k, v (B, NH, N, DH), in memory (B, N, NH, DH), and of
        igate, fgate (B, NH, N).
    """
    scale = q.shape[-1] ** -0.5
    fgate = fgate.flatten(0, 1)
    stats = gate_statistics(igate.flatten(0, 1), fgate, reverse)
    length = chunk_length(q.shape[2], chunk_size)
    gates = chunk_gates(stats, length, reverse, q.dtype)
    size = _sequence_tile_size(q)

    projection = (h_grad * h).sum(-1).flatten(0, 1)  # (B * NH, N)
    normalizer, floor = normalizer.flatten(0, 1), _floor(stats, q.dtype)
    inverse = torch.maximum(normalizer.abs(), floor).add_(EPS).reciprocal_()
    by_normalizer = normalizer.abs() >= floor
    projection_part = projection * inverse
    normalizer_grad = torch.where(by_normalizer, projection_part * -normalizer.sign(), 0)

    grads = [like_tokens(q) for _ in range(3)]
    source_grad = torch.empty_like(normalizer)
    for q_, k_, v_, h_grad_, q_grad_, k_grad_, v_grad_, source_grad_, inverse_, n_grad, part in zip(
        *(_sequence_tiles(x, size) for x in (q, k, v, h_grad, *grads)),
        *(x.split(size) for x in (source_grad, inverse, normalizer_grad)),
        gates.sequence_tiles(size),
    ):
        q_, k_, v_, numerator_grad = (
            _to_chunks(x, length)
            for x in (q_, k_, v_, h_grad_ * inverse_.view(*h_grad_.shape[:-1], 1))
        )
        n_grad = _to_chunks(n_grad.unsqueeze(-1), length)  # (G * n, L, 1)
        q_grad, k_grad, v_grad = parallel_backward(
            numerator_grad, n_grad, q_, k_, v_, _weights(part, reverse, q.dtype), scale
        )
        if length < q.shape[2]:
            # Through the state that a chunk reads ...
            memory, state_normalizer = _states(k_, v_, part, reverse)
            state_q_grad = torch.bmm(numerator_grad, memory.transpose(1, 2))
            state_q_grad.addcmul_(n_grad, state_normalizer)
            from_state, to_state = (
                (part.from_state * scale).flatten(0, 1),
                part.to_state.flatten(0, 1),
            )
            q_grad.addcmul_(state_q_grad, from_state)
            # ... whose gradients run from chunk to chunk in the opposite direction ...
            state_q = torch.mul(q_, from_state, out=state_q_grad)
            memory_grad = _incoming_states_backward(
                torch.bmm(state_q.transpose(1, 2), numerator_grad), part.transfer, reverse
            )
            state_normalizer_grad = _incoming_states_backward(
                torch.bmm(n_grad.transpose(1, 2), state_q), part.transfer, reverse
            )
            # ... and through the state that it writes.
            state_k_grad = torch.baddbmm(state_normalizer_grad, v_, memory_grad.transpose(1, 2))
            k_grad.addcmul_(state_k_grad, to_state)
            v_grad.baddbmm_(torch.mul(k_, to_state, out=state_k_grad), memory_grad)
        products = (k_ * k_grad).sum(-1, keepdim=True)
        source_grad_.copy_(_from_chunks(products, (*source_grad_.shape, 1)).squeeze(-1))
        for target, grad in ((q_grad_, q_grad), (k_grad_, k_grad), (v_grad_, v_grad)):
            target.copy_(_from_chunks(grad, target.shape))

    eps_part = projection_part * EPS  # the stabilizer matters only relative to eps
    row_grad = torch.where(by_normalizer, 0, projection - eps_part)
    gate_grads = gate_gradients(source_grad, -eps_part, row_grad, fgate, stats, reverse)
    return (*grads, *(grad.view(q.shape[:3]) for grad in gate_grads))
