# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""The chunkwise mLSTM on tensor cores, forward and backward.

The equations are those of :mod:`mmvil.ops.chunkwise`, where chunks are computed side by side and
see what came before through a state. With the gate scalars g and M of :mod:`mmvil.ops.gates`, the
weight of token j in the output of token t is :math:`D_{tj} = e^{g_j - M_t} / \sqrt{d} \le 1 /
\sqrt d`, and with :math:`r_t = 1 / (\max(|n_t|, e^{-m_t}) + 10^{-6})` and :math:`\partial n_t`, the
gradient of the normalizer:

.. math::
    n_t &= \sum_{j \le t} D_{tj}\, q_t \cdot k_j, \qquad
    h_t = r_t \sum_{j \le t} D_{tj} (q_t \cdot k_j)\, v_j \\
    \partial q_t &= \sum_{j \le t} D_{tj} (r_t\, \partial h_t \cdot v_j + \partial n_t)\, k_j \\
    \partial k_j &= \sum_{t \ge j} D_{tj} (r_t\, \partial h_t \cdot v_j + \partial n_t)\, q_t \\
    \partial v_j &= \sum_{t \ge j} D_{tj}\, r_t (q_t \cdot k_j)\, \partial h_t

All four have one shape: scores of two features, times weights, times a third feature. So there is
one kernel for those who read (h and :math:`\partial q`) and one for those who are read
(:math:`\partial k` and :math:`\partial v`); a program holds one tile of tokens in full head width
and walks through its chunk. What lies in other chunks comes by one product with the (DH, DH) state
before the chunk, or with the gradient of the state after it. One kernel makes both by a walk along
the sequence, tiled over the state.

Nothing quadratic is ever written to memory: scores and states are computed again in the backward
pass, from the inputs, h, and n. Sums are in float32. States are handed over in the dtype of the
features if that is bfloat16, as the matrix units would round them to it in any case, and in float32
otherwise (float16 lacks the range for a sum over all tokens).
"""

from typing import NamedTuple, Optional, Tuple

import torch
import triton
from torch import Tensor

from .cell import denominators_kernel, readers_kernel, states_kernel, writers_kernel
from .gates import gate_gradients_kernel, gate_statistics_kernel


class Tiling(NamedTuple):
    """Sizes of tiles and launches for one head width and dtype."""

    width: int
    tiles: int
    """A head is ``tiles`` tensors of ``width`` columns."""
    rows: int
    columns: int
    warps: int
    stages: int
    step: int
    """Rows of the state that are read at once."""
    state: int
    """Side of the tile of the state that one program sums up."""
    split: bool
    """Gradients of keys and values in two launches: at once, their sums do not fit into registers."""


def tiling(head_width: int, dtype: torch.dtype) -> Tiling:
    """The static table that stands for autotuning."""
    width = min((16, 32, 64, 128), key=lambda w: (triton.cdiv(head_width, w) * w, -w))
    tiles = triton.cdiv(head_width, width)
    padded = width * tiles
    return Tiling(
        width=width,
        tiles=tiles,
        rows=64,
        columns=64 if padded <= 192 else 32,
        warps=4 if padded <= 128 else 8,
        stages=2,
        step=min(width, 32),
        state=min(triton.next_power_of_2(padded), 64 if padded <= 192 else 128),
        split=padded > 192,
    )


def default_chunk_size(length: int, head_width: int) -> int:
    """Tokens in a chunk: one chunk as long as that costs fewer products than states would."""
    chunk = 128 if head_width <= 128 else 256
    return length if length <= chunk + 2 * head_width else chunk


class _Call:
    """What the kernels of one call have in common: sizes, constants, gate scalars."""

    def __init__(self, q: Tensor, igate: Tensor, fgate: Tensor, reverse: bool, chunk_size: int):
        self.batch, self.heads, self.length, self.width = q.shape
        self.programs = self.batch * self.heads
        self.reverse = reverse
        self.tiling = tiling(self.width, q.dtype)
        unit = max(self.tiling.rows, self.tiling.columns)
        self.chunk = triton.cdiv(min(chunk_size, self.length), unit) * unit
        self.scale = self.width**-0.5
        self.device = q.device
        self.precision, self.state_precision, self.state_dtype = _precision(q.dtype)
        self.block = min(1024, max(16, triton.next_power_of_2(self.length)))

        self.source, self.running_max = self.scalars(torch.float64), self.scalars(torch.float64)
        self.floor = self.scalars()
        self.igate, self.fgate = self.reading(igate), self.reading(fgate)
        gate_statistics_kernel[(self.programs,)](
            self.igate[0],
            self.fgate[0],
            self.igate[1],
            self.fgate[1],
            self.source,
            self.running_max,
            self.floor,
            self.heads,
            self.length,
            BLOCK=self.block,
        )

    def scalars(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """One number per token, in reading order."""
        return torch.empty(self.programs, self.length, dtype=dtype, device=self.device)

    def reading(self, x: Tensor) -> Tuple[Tensor, Tuple[int, ...]]:
        """A tensor (B, NH, N, ...) from the token read first on, and its strides from there."""
        if not self.reverse:
            return x, x.stride()
        batch, head, token, *rest = x.stride()
        return x[:, :, -1:], (batch, head, -token, *rest)

    def states(self, a: Tensor, b: Tensor, grad: Optional[Tuple[Tensor, Tensor]] = None):
        """States before all chunks but the first, and their normalizers; or gradients of them."""
        bounds = triton.cdiv(self.length, self.chunk) - 1
        shape = (self.programs, bounds, self.width)
        states = torch.empty(*shape, self.width, dtype=self.state_dtype, device=self.device)
        vectors = torch.empty(*shape, dtype=torch.float32, device=self.device)
        if bounds:
            a, a_strides = self.reading(a)
            b, b_strides = self.reading(b)
            tile = self.tiling.state
            inverse, normalizer_grad = grad or (self.floor, self.floor)
            states_kernel[(self.programs * triton.cdiv(self.width, tile) ** 2,)](
                a,
                b,
                a_strides,
                b_strides,
                self.source,
                self.running_max,
                inverse,
                normalizer_grad,
                states,
                vectors,
                self.heads,
                self.length,
                self.chunk,
                self.scale,
                DH=self.width,
                A_WIDTH=tile,
                B_WIDTH=tile,
                ROWS=self.tiling.rows,
                GRAD=grad is not None,
                PRECISION=self.state_precision,
                num_warps=self.tiling.warps,
                num_stages=self.tiling.stages,
            )
        return states, vectors

    def constants(self):
        """Of the kernels for readers and writers."""
        t = self.tiling
        return dict(
            DH=self.width,
            WIDTH=t.width,
            TILES=t.tiles,
            STEP=t.step,
            ROWS=t.rows,
            COLUMNS=t.columns,
            PRECISION=self.precision,
            STATE_PRECISION=self.state_precision,
            num_warps=t.warps,
            num_stages=t.stages,
        )

    def readers(self, a, b, c, out, normalizer, grad, states):
        a, a_strides = self.reading(a)
        b, b_strides = self.reading(b)
        c, c_strides = self.reading(c)
        out, out_strides = self.reading(out)
        normalizer, normalizer_strides = self.reading(normalizer)
        inverse, normalizer_grad = grad or (self.floor, self.floor)
        readers_kernel[(self.programs * triton.cdiv(self.length, self.tiling.rows),)](
            a,
            b,
            c,
            out,
            a_strides,
            b_strides,
            c_strides,
            out_strides,
            self.source,
            self.running_max,
            self.floor,
            normalizer,
            normalizer_strides,
            inverse,
            normalizer_grad,
            *states,
            self.heads,
            self.length,
            self.chunk,
            self.scale,
            GRAD=grad is not None,
            **self.constants(),
        )


def _precision(dtype: torch.dtype) -> Tuple[str, str, torch.dtype]:
    """How float32 operands are multiplied, in general and with states, and the dtype of states."""
    if dtype == torch.bfloat16:
        return 'tf32', 'tf32', torch.bfloat16
    if dtype == torch.float16:
        return 'tf32', 'tf32', torch.float32  # tf32 has all the digits of float16
    precision = 'tf32' if torch.backends.cuda.matmul.allow_tf32 else 'tf32x3'
    return precision, precision, torch.float32


def mlstm_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    reverse: bool,
    chunk_size: Optional[int] = None,
) -> Tuple[Tensor, Tensor]:
    """The mLSTM cell.

    Args:
        q, k, v (Tensor): Shape (B, NH, N, DH), any strides; float16, bfloat16 or float32.
        igate, fgate (Tensor): Gate pre-activations, shape (B, NH, N), any strides and float dtype.
        reverse (bool): Read from last to first.
        chunk_size (int, optional): Tokens in a chunk, rounded up to whole tiles.

    Returns:
        tuple[Tensor, Tensor]: h, shape (B, NH, N, DH), and the signed normalizer, shape (B, NH, N)
        in float32, needed for backward.
    """
    call = _Call(q, igate, fgate, reverse, chunk_size or default_chunk_size(*q.shape[2:]))
    h = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    normalizer = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    call.readers(q, k, v, h, normalizer, None, call.states(k, v))
    return h, normalizer


def mlstm_backward(
    h_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    h: Tensor,
    normalizer: Tensor,
    reverse: bool,
    chunk_size: Optional[int] = None,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`mlstm_forward`.

    Args:
        h_grad (Tensor): Gradient of h, shape (B, NH, N, DH), any strides.
        q, k, v, igate, fgate, reverse, chunk_size: As in the forward pass.
        h, normalizer (Tensor): Its results.

    Returns:
        tuple[Tensor, ...]: Gradients of q, k, v (B, NH, N, DH) and of igate, fgate (B, NH, N), in
        their dtypes.
    """
    call = _Call(q, igate, fgate, reverse, chunk_size or default_chunk_size(*q.shape[2:]))
    grads = tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, igate, fgate)
    )
    q_grad, k_grad, v_grad, igate_grad, fgate_grad = grads
    inverse, normalizer_grad, row_grad, stabilizer_grad, source_grad = (
        call.scalars() for _ in range(5)
    )
    t = call.tiling
    (h_grad_first, h_grad_strides), (h, h_strides) = call.reading(h_grad), call.reading(h)
    n_first, n_strides = call.reading(normalizer)
    denominators_kernel[(call.programs * triton.cdiv(call.length, 16),)](
        h_grad_first,
        h,
        n_first,
        h_grad_strides,
        h_strides,
        n_strides,
        call.floor,
        inverse,
        normalizer_grad,
        row_grad,
        stabilizer_grad,
        call.heads,
        call.length,
        DH=call.width,
        WIDTH=min(128, triton.next_power_of_2(call.width)),
        ROWS=16,
    )
    grad = (inverse, normalizer_grad)
    call.readers(h_grad, v, k, q_grad, normalizer, grad, call.states(k, v))

    states_grad = call.states(q, h_grad, grad)
    tensors = [call.reading(x) for x in (q, k, v, h_grad, k_grad, v_grad)]
    for keys, values in ((True, False), (False, True)) if t.split else ((True, True),):
        writers_kernel[(call.programs * triton.cdiv(call.length, t.rows),)](
            *(first for first, _ in tensors),
            *(strides for _, strides in tensors),
            call.source,
            call.running_max,
            inverse,
            normalizer_grad,
            source_grad,
            *states_grad,
            call.heads,
            call.length,
            call.chunk,
            call.scale,
            KEYS=keys,
            VALUES=values,
            **call.constants(),
        )

    (igate_grad_first, igate_strides), (fgate_grad_first, fgate_strides) = (
        call.reading(igate_grad),
        call.reading(fgate_grad),
    )
    gate_gradients_kernel[(call.programs,)](
        *call.fgate,
        call.source,
        call.running_max,
        source_grad,
        row_grad,
        stabilizer_grad,
        igate_grad_first,
        fgate_grad_first,
        igate_strides,
        fgate_strides,
        call.heads,
        call.length,
        BLOCK=call.block,
    )
    return grads
