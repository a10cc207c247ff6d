# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""Launches of the chunkwise mLSTM on tensor cores, forward and backward.

The equations are those of :mod:`mmvil.ops.chunkwise`. With the gate scalars g and M of
:mod:`mmvil.ops.gates`, the weight of token j in the output of token t is :math:`D_{tj} = e^{g_j -
M_t} / \sqrt{d} \le 1 / \sqrt d`, and with :math:`r_t = 1 / (\max(|n_t|, e^{-m_t}) + 10^{-6})` and
:math:`\partial n_t`, the gradient of the normalizer:

.. math::
    n_t &= \sum_{j \le t} D_{tj}\, q_t \cdot k_j, \qquad
    h_t = r_t \sum_{j \le t} D_{tj} (q_t \cdot k_j)\, v_j \\
    \partial q_t &= \sum_{j \le t} D_{tj} (r_t\, \partial h_t \cdot v_j + \partial n_t)\, k_j \\
    \partial k_j &= \sum_{t \ge j} D_{tj} (r_t\, \partial h_t \cdot v_j + \partial n_t)\, q_t \\
    \partial v_j &= \sum_{t \ge j} D_{tj}\, r_t (q_t \cdot k_j)\, \partial h_t

All four have one form: scores of two features, times weights, times a third feature. So there is
one kernel for the query side (h and :math:`\partial q`) and one for the key side
(:math:`\partial k` and :math:`\partial v`); a program holds one tile of tokens in full head width
and walks through its chunk. Other chunks contribute by one product with the incoming (DH, DH) state
of the chunk, or with the gradient of the state after it. One kernel computes both by a walk along
the sequence, tiled over the state.

Nothing quadratic is ever written to memory: scores and states are recomputed in the backward pass,
from the inputs, h, and n. Sums are in float32. States are stored in bfloat16 if the features are,
as the matrix units would round them to it in any case, and in float32 otherwise (float16 lacks the
range for a sum over all tokens).
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..layout import like_tokens
from . import default_chunk_size, on_its_device, shared_memory
from .gate_kernels import gate_gradients_kernel, gate_statistics_kernel
from .mlstm_kernels import (
    denominators_kernel,
    key_side_kernel,
    query_side_kernel,
    states_kernel,
)
from .tiles import dot_precision


class Tiling(NamedTuple):
    """Tile sizes and launch options for one head width and dtype."""

    width: int
    tiles: int
    """A head is ``tiles`` tensors of ``width`` columns."""
    rows: int
    columns: int
    warps: int
    stages: int
    step: int
    """Rows of the state that are loaded at once."""
    state: int
    """Side of the tile of the state that one program sums up."""


def tiling(head_width: int, dtype: torch.dtype, shared: int) -> Tiling:
    """Choose what fits into registers and ``shared`` bytes of memory, instead of autotuning."""
    width = min((16, 32, 64, 128), key=lambda w: (triton.cdiv(head_width, w) * w, -w))
    tiles = triton.cdiv(head_width, width)
    padded = width * tiles
    single = dtype == torch.float32
    few_registers = width == 64 and shared < 200 * 1024  # GPUs before Hopper need smaller steps
    wide = padded >= 128
    if single:
        rows = columns = 32 if padded <= 64 else 16
    else:
        rows, columns = 64, (32 if wide else 64)
        if few_registers and wide and dtype == torch.float16:  # which scales its totals
            columns = 16
    room = shared // (dtype.itemsize * padded) - rows  # rows that loops may prefetch
    return Tiling(
        width=width,
        tiles=tiles,
        rows=rows,
        columns=columns,
        warps=8 if wide else 4,
        stages=2 if room >= 4 * columns + 16 else 1,
        step=16 if few_registers else min(width, 32),
        state=min(triton.next_power_of_2(padded), 128 if padded > 192 and not single else 64),
    )


class _Cell:
    """Launches of one call, with the sizes, constants and gate scalars that they share."""

    def __init__(self, q, k, v, igate, fgate, reverse: bool, chunk_size: int | None):
        batch, heads, self.length, self.width = q.shape
        self.q, self.k, self.v, self.fgate, self.reverse = q, k, v, fgate, reverse
        self.device, self.programs = q.device, batch * heads
        self.tiling = tiling(self.width, q.dtype, shared_memory(q.device))
        self.precision = dot_precision(q.dtype)
        self.state_dtype = q.dtype if q.dtype == torch.bfloat16 else torch.float32
        chunk = chunk_size or default_chunk_size(self.length, self.width)
        unit = self.tiling.rows  # a multiple of columns
        self.chunk = triton.cdiv(min(chunk, self.length), unit) * unit
        self.sizes = dict(heads=heads, length=self.length)
        self.gates = dict(
            source=self.scalars(torch.float64), running_max=self.scalars(torch.float64)
        )
        self.floor = self.scalars()
        self.block = dict(BLOCK=min(1024, max(16, triton.next_power_of_2(self.length))))
        gate_statistics_kernel[(self.programs,)](
            **self.in_reading_order(igate=igate, fgate=fgate),
            **self.gates,
            floor=self.floor,
            **self.sizes,
            **self.block,
        )

    def scalars(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """One number per token, in reading order."""
        return torch.empty(self.programs, self.length, dtype=dtype, device=self.device)

    def in_reading_order(self, **tensors: Tensor) -> dict[str, Any]:
        """Arguments for tensors (B, NH, N, ...): a pointer to the first token in reading order, and
        the strides from there.
        """
        arguments = {}
        for name, x in tensors.items():
            strides = x.stride()
            if self.reverse:
                x, strides = x[:, :, -1:], (*strides[:2], -strides[2], *strides[3:])
            arguments[name], arguments[f'{name}_strides'] = x, strides
        return arguments

    def denominators(self, h_grad: Tensor, h: Tensor, normalizer: Tensor) -> dict[str, Tensor]:
        """Scalars of the backward pass that need no matrix product."""
        names = ('inverse', 'normalizer_grad', 'row_grad', 'stabilizer_grad')
        by_token = {name: self.scalars() for name in names}
        denominators_kernel[(self.programs * triton.cdiv(self.length, 16),)](
            **self.in_reading_order(h_grad=h_grad, h=h, normalizer=normalizer),
            floor=self.floor,
            **by_token,
            **self.sizes,
            DH=self.width,
            WIDTH=min(128, triton.next_power_of_2(self.width)),
            ROWS=16,
        )
        return by_token

    def states(self, a: Tensor, b: Tensor, by_token: dict[str, Tensor] | None = None):
        """Incoming states and normalizers of all chunks but the first, or gradients of both."""
        bounds = triton.cdiv(self.length, self.chunk) - 1
        shape = (self.programs, bounds, self.width)
        states = torch.empty(*shape, self.width, dtype=self.state_dtype, device=self.device)
        vectors = torch.empty(*shape, dtype=torch.float32, device=self.device)
        t = self.tiling
        if bounds:
            states_kernel[(self.programs * triton.cdiv(self.width, t.state) ** 2,)](
                **self.in_reading_order(a=a, b=b),
                **self.gates,
                **self.backward_scalars(by_token),
                states=states,
                state_vectors=vectors,
                **self.sizes,
                chunk=self.chunk,
                scale=self.width**-0.5,
                DH=self.width,
                A_WIDTH=t.state,
                B_WIDTH=t.state,
                ROWS=t.rows,
                GRAD=by_token is not None,
                PRECISION=self.precision,
                num_warps=t.warps,
                num_stages=t.stages,
            )
        return dict(states=states, state_vectors=vectors)

    def products(self, kernel, by_token: dict[str, Tensor] | None, **arguments) -> None:
        """Launch the kernel of the query side or the key side."""
        t = self.tiling
        kernel[(self.programs * triton.cdiv(self.length, t.rows),)](
            **self.gates,
            **self.backward_scalars(by_token),
            **arguments,
            **self.sizes,
            chunk=self.chunk,
            scale=self.width**-0.5,
            DH=self.width,
            WIDTH=t.width,
            TILES=t.tiles,
            STEP=t.step,
            ROWS=t.rows,
            COLUMNS=t.columns,
            PRECISION=self.precision,
            num_warps=t.warps,
            num_stages=t.stages,
        )

    def backward_scalars(self, by_token: dict[str, Tensor] | None) -> dict[str, Tensor]:
        names = ('inverse', 'normalizer_grad')  # in the forward pass any pointer will do
        return {name: by_token[name] if by_token else self.floor for name in names}

    def gate_gradients(self, by_token, source_grad, igate_grad, fgate_grad) -> None:
        gate_gradients_kernel[(self.programs,)](
            **self.in_reading_order(fgate=self.fgate, igate_grad=igate_grad, fgate_grad=fgate_grad),
            **self.gates,
            source_grad=source_grad,
            row_grad=by_token['row_grad'],
            stabilizer_grad=by_token['stabilizer_grad'],
            **self.sizes,
            **self.block,
        )


@on_its_device
def mlstm_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    reverse: bool,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the mLSTM cell.

    Args:
        q, k, v (Tensor): Shape (B, NH, N, DH), any strides; float16, bfloat16 or float32.
        igate, fgate (Tensor): Gate pre-activations, shape (B, NH, N), any strides and float dtype.
        reverse (bool): Read from last to first.
        chunk_size (int, optional): Tokens in a chunk, rounded up to whole tiles.

    Returns:
        tuple[Tensor, Tensor]: h, shape (B, NH, N, DH), and the signed normalizer, shape (B, NH, N)
        in float32, needed for backward.
    """
    cell = _Cell(q, k, v, igate, fgate, reverse, chunk_size)
    h, normalizer = like_tokens(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    cell.products(
        query_side_kernel,
        None,
        **cell.in_reading_order(a=q, b=k, c=v, out=h, normalizer=normalizer),
        **cell.states(k, v),
        floor=cell.floor,
        GRAD=False,
    )
    return h, normalizer


@on_its_device
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
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`mlstm_forward`.

    Args:
        h_grad (Tensor): Gradient of h, shape (B, NH, N, DH), any strides.
        q, k, v, igate, fgate, reverse, chunk_size: As in the forward pass.
        h, normalizer (Tensor): Its results.

    Returns:
        tuple[Tensor, ...]: Gradients of q, k, v (B, NH, N, DH) and of igate, fgate (B, NH, N), in
        their dtypes.
    """
    cell = _Cell(q, k, v, igate, fgate, reverse, chunk_size)
    q_grad, k_grad, v_grad = (like_tokens(x) for x in (q, k, v))
    igate_grad, fgate_grad = igate.new_empty(igate.shape), fgate.new_empty(fgate.shape)
    by_token = cell.denominators(h_grad, h, normalizer)
    cell.products(
        query_side_kernel,
        by_token,
        **cell.in_reading_order(a=h_grad, b=v, c=k, out=q_grad, normalizer=normalizer),
        **cell.states(k, v),
        floor=cell.floor,
        GRAD=True,
    )
    states_grad, source_grad = cell.states(q, h_grad, by_token), cell.scalars()
    for keys, a, b, c, out in ((False, k, q, h_grad, v_grad), (True, v, h_grad, q, k_grad)):
        cell.products(
            key_side_kernel,
            by_token,
            **cell.in_reading_order(a=a, b=b, c=c, out=out, k=k),
            **states_grad,
            source_grad=source_grad,
            KEYS=keys,
        )
    cell.gate_gradients(by_token, source_grad, igate_grad, fgate_grad)
    return q_grad, k_grad, v_grad, igate_grad, fgate_grad
