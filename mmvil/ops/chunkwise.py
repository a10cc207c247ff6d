# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""The chunkwise form of the mLSTM: parallel inside chunks, recurrent from chunk to chunk, linear
in N.

Token j has the weight :math:`e^{g_j - M_t}` in the sums of token t (see :mod:`mmvil.ops.gates` for
g and M). Inside a chunk, with a base c near its M, the weight is a product,

.. math:: e^{g_j - M_t} = e^{g_j - c} \cdot e^{c - M_t},

of a factor of the keys and a factor of the sums, so no weight matrix is materialized. It is
materialized only where M rises too far inside a chunk for the range of float32 (:data:`MAX_RISE`).

The preceding chunks are summarized by a memory and a normalizer,

.. math:: C = \sum_j e^{g_j - c} k_j v_j^\top, \qquad n = \sum_j e^{g_j - c} k_j,

which the queries of later chunks read like the tokens of their own chunk. The chunks of a sequence
are computed in parallel; only the states pass from one to the next. With one chunk this is the
parallel form. The reverse direction flips no tensors: states pass from the last chunk to the first,
and inside chunks the other triangle is used.

Sequences, one per sample and head, are processed in tiles that fit into a CPU's cache, and are read
and written in place: (B, NH, N, DH) may be a view of tokens (B, N, NH * DH).

Shapes: a tile of G sequences, split into n chunks of L tokens, is (n, G, L, DH), and (n * G, L, DH)
in matrix products. With chunks as the first dimension, both the chunks that write states (all but
the last one read) and those that read them (all but the first) are contiguous.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gates import GateStatistics, gate_gradients, gate_statistics
from .layout import empty_like_tokens
from .parallel import (
    causal_mask,
    decay_weights,
    parallel_backward,
    parallel_forward,
    scaled_product,
)
from .reference import EPS

SEQUENCE_TILE_BYTES = 2**22
"""Size of a tile's queries on a CPU, such that all its tensors fit into a common L3 cache."""

MAX_RISE = 40.0
"""Largest rise of M inside a chunk for which weights are factorized: each factor is at most e^20,
and masked entries are at most e^40 times a score."""


@functools.cache
def raise_malloc_thresholds() -> None:
    """Make glibc keep up to 64 MiB of freed memory for the tensors of the next layer.

    By default it returns blocks of a few megabytes to the system, and the page faults of the next
    ones take a third of a small model's time. Its thresholds adapt to the largest freed block, up
    to 32 MiB, so this allocates and frees one, without touching its pages.
    """
    torch.UntypedStorage(32 * 2**20 - 2**16)


def chunk_length(length: int, chunk_size: int) -> int:
    """Tokens per chunk: at most ``chunk_size``, and a divisor of the length unless that doubles the
    number of chunks.
    """
    fewest = math.ceil(length / chunk_size)
    for count in range(fewest, 2 * fewest):
        if length % count == 0:
            return length // count
    return math.ceil(length / fewest)  # the last chunk is padded


class ChunkGates(NamedTuple):
    """Gates of a tile of G sequences, by chunk. Logarithms stay in float64, because they can be
    large where their differences are small. Weights have the dtype of the features.
    """

    factorized: bool  # whether weights are products; otherwise from decay_weights
    log_weight: Tensor  # (n, G, L) g_j
    running_max: Tensor  # (n, G, L) M_t
    # (n, G, L, 1) each: exp(g_j - base), the factor of token j in the state that it writes, and
    # exp(base - M_t), the factor of token t for the state that it reads.
    write_weight: Tensor
    read_weight: Tensor
    # (n - 1, G, 1) each, factors in the state that a chunk reads: of the part written last, and of
    # the state read last.
    write_decay: Tensor
    state_decay: Tensor


def chunk_gates(
    stats: GateStatistics, length: int, reverse: bool, dtype: torch.dtype, tile: int
) -> list[ChunkGates]:
    """Split statistics into chunks of ``length`` tokens and tiles of ``tile`` sequences.

    Args:
        stats (GateStatistics): Statistics of all sequences, each (B * NH, N).
        length (int): L. Padding of the last chunk has zero weight.
        reverse (bool): Reading direction.
        dtype (torch.dtype): Dtype of the features.
        tile (int): Largest G; the last tile may be smaller.
    """
    log_weight, running_max = stats.log_weight, stats.running_max
    padding = -log_weight.shape[1] % length
    if padding:
        log_weight = F.pad(log_weight, (0, padding), value=-math.inf)
        running_max = torch.cat([running_max, running_max[:, -1:].expand(-1, padding)], dim=1)
    log_weight, running_max = (
        x.unflatten(1, (-1, length)).transpose(0, 1).contiguous() for x in (log_weight, running_max)
    )
    lowest, highest = running_max[..., :1], running_max[..., -1:]  # (n, B * NH, 1)
    if reverse:
        lowest, highest = highest, lowest

    # Reference points of the states: the base of the chunk, or M when they are written and read.
    sequences = log_weight.shape[1]
    factorized = [False] * math.ceil(sequences / tile)
    if log_weight.device.type == 'cpu':  # a GPU would have to synchronize
        # False for NaN, which results where nothing is written at all.
        fits = [rise <= MAX_RISE for rise in (highest - lowest).amax((0, 2)).tolist()]
        factorized = [all(fits[first : first + tile]) for first in range(0, sequences, tile)]
    write_base = read_base = (highest + lowest) / 2
    if not all(factorized):
        before = highest.roll(-1 if reverse else 1, 0)
        before[-1 if reverse else 0] = -math.inf  # nothing is read before the first chunk
        common = torch.tensor(factorized, device=log_weight.device).repeat_interleave(tile)
        common = common[:sequences].unsqueeze(-1)
        write_base = torch.where(common, write_base, highest)
        read_base = torch.where(common, read_base, before)
    by_chunk = (
        log_weight,
        running_max,
        torch.exp(log_weight - write_base).to(dtype).unsqueeze(-1),
        torch.exp(read_base - running_max).to(dtype).unsqueeze(-1),
    )
    reader_base = read_base[_reading_chunks(reverse)]
    by_chunk += (
        torch.exp(write_base[_writing_chunks(reverse)] - reader_base).to(dtype),
        torch.exp(reader_base.roll(-1 if reverse else 1, 0) - reader_base).to(dtype),
    )
    tiles = zip(*(x.split(tile, 1) for x in by_chunk))
    return [ChunkGates(products, *parts) for products, parts in zip(factorized, tiles)]


def _writing_chunks(reverse: bool) -> slice:
    """Chunks that write a state which another one reads."""
    return slice(1, None) if reverse else slice(-1)


def _reading_chunks(reverse: bool) -> slice:
    """Chunks that read a state."""
    return slice(-1) if reverse else slice(1, None)


def _sequence_tile_size(q: Tensor) -> int:
    """Sequences per tile: on a CPU several samples, or several heads of one, whose tensors fit into
    its cache; elsewhere all.
    """
    batch, heads, tokens, head_width = q.shape
    if q.device.type != 'cpu':
        return batch * heads
    fitting = max(1, SEQUENCE_TILE_BYTES // (tokens * head_width * q.element_size()))
    if fitting >= heads:
        return min(fitting // heads, batch) * heads
    return max(size for size in range(1, heads + 1) if heads % size == 0 and size <= fitting)


def _sequence_tiles(x: Tensor, size: int) -> Sequence[Tensor]:
    """Views (..., N, DH) of (B, NH, N, DH), each of several samples, or of several heads of one."""
    batch, heads = x.shape[:2]
    if size >= batch * heads:
        return (x,)
    if size >= heads:
        return x.split(size // heads)
    return [tile for sample in x.unbind(0) for tile in sample.split(size)]


def _by_chunk(x: Tensor, length: int) -> Tensor:
    """View (..., N, DH) as (n, ..., L, DH)."""
    return x.unflatten(-2, (-1, length)).movedim(-3, 0)


def _pad(x: Tensor, padding: int) -> Tensor:
    """Append tokens of zeros to (B, NH, N, DH)."""
    return F.pad(x, (0, 0, 0, padding)) if padding else x


def _unpad(x: Tensor, length: int) -> Tensor:
    """Remove tokens beyond a length from (B, NH, N, DH), in memory (B, N, NH, DH)."""
    if x.shape[2] == length:
        return x
    x = x[:, :, :length]
    return empty_like_tokens(x).copy_(x)


def _scan_states(added: Tensor, gates: ChunkGates, reverse: bool, backward: bool = False) -> Tensor:
    """Accumulate the chunks' contributions into the states that later chunks read.

    Args:
        added (Tensor): Contributions of the writing chunks, shape ((n - 1) * G, ...). May be
            overwritten.
        gates (ChunkGates): Of n chunks.
        reverse (bool): Whether chunks are read from last to first.
        backward (bool): Apply the transposed map, to gradients of the result. Default: False.

    Returns:
        Tensor: States of the reading chunks, shape ((n - 1) * G, ...).
    """
    steps = added.view(len(gates.write_decay), -1, added[0].numel())  # (n - 1, G, K)
    if not backward:
        steps = steps * gates.write_decay
    order = range(len(steps))[::-1] if reverse != backward else range(len(steps))
    for last, this in zip(order, order[1:]):
        steps[this].addcmul_(steps[last], gates.state_decay[last if backward else this])
    if backward:
        steps = steps.mul_(gates.write_decay)
    return steps.view(added.shape)


def _states(k: Tensor, v: Tensor, gates: ChunkGates, reverse: bool) -> tuple[Tensor, Tensor]:
    """Memory (DH, DH) and normalizer (1, DH) that chunks read, from the weighted keys and values
    ((n - 1) * G, L, DH) of the writing chunks.
    """
    memory, normalizer = torch.bmm(k.transpose(1, 2), v), k.sum(1, keepdim=True)
    return tuple(_scan_states(x, gates, reverse) for x in (memory, normalizer))


def _select_chunks(x: Tensor, which: slice, gates: ChunkGates) -> Tensor:
    """View of some chunks of (n * G, ...)."""
    return x.view(len(gates.write_weight), -1, *x.shape[1:])[which].flatten(0, 1)


def _min_denominator(stats: GateStatistics, dtype: torch.dtype) -> Tensor:
    """exp(-m_t), the smallest denominator; infinite where nothing was written, so that h is 0."""
    return torch.exp(-stats.stabilizer).to(dtype)


def _operands(q, k, v, gates: ChunkGates, length: int, reverse: bool) -> tuple[Tensor, ...]:
    """Operands of a tile's matrix products, from features (..., N, DH).

    Returns:
        tuple[Tensor, ...]: q, k, v and weights for :func:`parallel_forward`, and the keys that
            write states.
    """
    k = _by_chunk(k, length)
    q, v = (_by_chunk(x, length).reshape(-1, length, x.shape[-1]) for x in (q, v))
    state_k = torch.empty_like(q)
    torch.mul(k, gates.write_weight.view(*k.shape[:-1], 1), out=state_k.view(k.shape))
    if gates.factorized:
        return q, state_k, v, causal_mask(length, reverse, q), state_k
    log_weight, running_max = gates.log_weight.flatten(0, 1), gates.running_max.flatten(0, 1)
    weights = decay_weights(log_weight, running_max, reverse, q.dtype)
    return q, k.reshape(q.shape), v, weights, state_k


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
    if q.device.type == 'cpu':
        raise_malloc_thresholds()
    tokens, scale = q.shape[2], q.shape[3] ** -0.5
    stats = gate_statistics(igate.flatten(0, 1), fgate.flatten(0, 1), reverse)
    length = chunk_length(tokens, chunk_size)
    size = _sequence_tile_size(q)
    gates = chunk_gates(stats, length, reverse, q.dtype, size)

    q, k, v = (_pad(x, -tokens % length) for x in (q, k, v))
    h = empty_like_tokens(q)
    normalizer = q.new_empty(*q.shape[:3], 1)
    min_denom = F.pad(_min_denominator(stats, q.dtype), (0, q.shape[2] - tokens))
    min_denom = min_denom.view_as(normalizer)
    for q_, k_, v_, h_, normalizer_, min_denom_, part in zip(
        *(_sequence_tiles(x, size) for x in (q, k, v, h, normalizer, min_denom)), gates
    ):
        q_, k_, v_, weights, state_k = _operands(q_, k_, v_, part, length, reverse)
        numerator, sums = parallel_forward(q_, k_, v_, weights, scale)
        if length < tokens:
            writing, reading = _writing_chunks(reverse), _reading_chunks(reverse)
            state_k, state_v = (_select_chunks(x, writing, part) for x in (state_k, v_))
            memory, state_normalizer = _states(state_k, state_v, part, reverse)
            state_q = _select_chunks(q_, reading, part)
            if not part.factorized:
                state_q = state_q * part.read_weight[reading].flatten(0, 1)
            _select_chunks(numerator, reading, part).baddbmm_(state_q, memory, alpha=scale)
            read_sums = (state_q * state_normalizer).sum(-1, keepdim=True)
            _select_chunks(sums, reading, part).add_(read_sums, alpha=scale)
        h_, normalizer_, min_denom_ = (_by_chunk(x, length) for x in (h_, normalizer_, min_denom_))
        sums, read = sums.view(normalizer_.shape), part.read_weight.view(normalizer_.shape)
        if part.factorized:
            sums.mul_(read)
        normalizer_.copy_(sums)
        factor = torch.maximum(sums.abs_(), min_denom_).add_(EPS).reciprocal_()
        if part.factorized:
            factor.mul_(read)
        torch.mul(numerator.view(h_.shape), factor, out=h_)
    return _unpad(h, tokens), normalizer.squeeze(-1)[..., :tokens].contiguous()


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
    r"""Compute the gradients of :func:`chunkwise_forward`, recomputing scores and states.

    No gradient passes through an exponential or a cumulative sum over pairs of tokens. Because the
    weights enter only through the scores, :math:`\sum_t \partial a_{tj} = k_j \cdot \partial k_j`;
    because h is invariant to a common factor of numerator and normalizer, :math:`\sum_j \partial
    a_{tj}` is 0 where :math:`|n_t|` is the denominator, and :math:`h_t \cdot \partial h_t` (up to
    eps) where :math:`e^{-m_t}` is.

    Args:
        h_grad (Tensor): Gradient of h, shape (B, NH, N, DH), any strides.
        q, k, v, igate, fgate, reverse, chunk_size: As in the forward pass.
        h, normalizer (Tensor): Results of the forward pass.

    Returns:
        tuple[Tensor, ...]: Gradients of q, k, v (B, NH, N, DH), in memory (B, N, NH, DH), and of
        igate, fgate (B, NH, N).
    """
    tokens, scale = q.shape[2], q.shape[3] ** -0.5
    fgate = fgate.flatten(0, 1)
    stats = gate_statistics(igate.flatten(0, 1), fgate, reverse)
    length = chunk_length(tokens, chunk_size)
    size = _sequence_tile_size(q)
    gates = chunk_gates(stats, length, reverse, q.dtype, size)

    projection = (h_grad * h).sum(-1).flatten(0, 1)  # (B * NH, N)
    normalizer, min_denom = normalizer.flatten(0, 1), _min_denominator(stats, q.dtype)
    inverse = torch.maximum(normalizer.abs(), min_denom).add_(EPS).reciprocal_()
    by_normalizer = normalizer.abs() >= min_denom
    projection_part = projection * inverse
    normalizer_grad = torch.where(by_normalizer, projection_part * -normalizer.sign(), 0)

    padding = -tokens % length
    q, k, v, h_grad, inverse, normalizer_grad = (
        _pad(x.view(*q.shape[:3], -1), padding) for x in (q, k, v, h_grad, inverse, normalizer_grad)
    )
    grads = [empty_like_tokens(q) for _ in range(3)]
    log_weight_grad = torch.empty_like(inverse)
    tensors = (q, k, v, h_grad, inverse, normalizer_grad, *grads, log_weight_grad)
    for q_, k_, v_, h_grad_, inverse_, n_grad, *targets, part in zip(
        *(_sequence_tiles(x, size) for x in tensors), gates
    ):
        q_, k_, v_, weights, state_k = _operands(q_, k_, v_, part, length, reverse)
        h_grad_, inverse_, n_grad = (_by_chunk(x, length) for x in (h_grad_, inverse_, n_grad))
        read, write = part.read_weight.view(inverse_.shape), part.write_weight.flatten(0, 1)
        if part.factorized:
            inverse_, n_grad = inverse_ * read, n_grad * read
        numerator_grad = torch.empty_like(q_)
        torch.mul(h_grad_, inverse_, out=numerator_grad.view(h_grad_.shape))
        n_grad = n_grad.reshape(*q_.shape[:2], 1)
        q_grad, k_grad, v_grad = parallel_backward(
            numerator_grad, n_grad, q_, k_, v_, weights, scale
        )
        if length < tokens:
            # Through the state that a chunk reads ...
            writing, reading = _writing_chunks(reverse), _reading_chunks(reverse)
            state_k, state_v, state_k_grad, state_v_grad = (
                _select_chunks(x, writing, part) for x in (state_k, v_, k_grad, v_grad)
            )
            state_q, numerator_grad, n_grad = (
                _select_chunks(x, reading, part) for x in (q_, numerator_grad, n_grad)
            )
            memory, state_normalizer = _states(state_k, state_v, part, reverse)
            state_q_grad = torch.bmm(numerator_grad, memory.transpose(1, 2))
            state_q_grad.addcmul_(n_grad, state_normalizer)
            if not part.factorized:
                read = part.read_weight[reading].flatten(0, 1)
                state_q, state_q_grad = state_q * read, state_q_grad.mul_(read)
            _select_chunks(q_grad, reading, part).add_(state_q_grad, alpha=scale)
            # ... whose gradients run from chunk to chunk in the opposite direction ...
            memory_grad = scaled_product(state_q.transpose(1, 2), numerator_grad, scale)
            state_normalizer_grad = scaled_product(n_grad.transpose(1, 2), state_q, scale)
            memory_grad, state_normalizer_grad = (
                _scan_states(x, part, reverse, backward=True)
                for x in (memory_grad, state_normalizer_grad)
            )
            # ... and through the state that it writes.
            state_v_grad.baddbmm_(state_k, memory_grad)
            if part.factorized:
                state_k_grad.baddbmm_(state_v, memory_grad.transpose(1, 2))
                state_k_grad.add_(state_normalizer_grad)
            else:
                through_state = torch.baddbmm(
                    state_normalizer_grad, state_v, memory_grad.transpose(1, 2)
                )
                state_k_grad.addcmul_(through_state, part.write_weight[writing].flatten(0, 1))
        products = (k_ * k_grad).sum(-1)
        if part.factorized:
            k_grad.mul_(write)
        for target, grad in zip(targets, (q_grad, k_grad, v_grad, products)):
            target = _by_chunk(target, length)
            target.copy_(grad.view(target.shape))

    eps_part = projection_part * EPS  # the stabilizer matters only relative to eps
    row_grad = torch.where(by_normalizer, 0, projection - eps_part)
    log_weight_grad = log_weight_grad.flatten(0, 1)[:, :tokens, 0]
    gate_grads = gate_gradients(log_weight_grad, -eps_part, row_grad, fgate, stats, reverse)
    return (
        *(_unpad(grad, tokens) for grad in grads),
        *(grad.view(igate.shape) for grad in gate_grads),
    )
