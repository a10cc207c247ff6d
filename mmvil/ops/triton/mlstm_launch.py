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

All four have one form: scores of two features, times weights, times a third feature. One kernel
computes h, and one all gradients; a program holds one tile of tokens, in full head width or a part
of it, and loops over its chunk. Other chunks contribute by one product with the incoming (DH, DH)
state of the chunk, or with the gradient of the state after it. A program sums up one tile of
these over all chunks. Where such programs are too few to occupy a GPU, they compute the
contributions of all chunks in parallel, followed by a sum from chunk to chunk.

Nothing quadratic is written to memory: the backward pass recomputes scores and states from the
inputs, h, and n. Sums are in float32. States are stored in bfloat16 if the features are, because
matrix units would round them anyway, and in float32 otherwise (float16 lacks the range for a sum
over all tokens).
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import empty_like_tokens
from . import (
    cdiv,
    default_chunk_size,
    launch,
    limited_registers,
    next_power_of_2,
    on_input_device,
    shared_memory,
)
from .gate_kernels import gate_gradients_kernel, gate_statistics_kernel
from .mlstm_kernels import (
    chunk_sums_kernel,
    gradients_kernel,
    query_side_kernel,
    sum_states_kernel,
)
from .tiles import dot_precision

GATE_BLOCK = 2048
"""Tokens per block of the gate scans."""

FARTHEST = 2**22
"""Largest stride in a tile, of up to 512 columns, whose offsets fit into 32 bits."""


MULTIPROCESSORS = 132
"""Programs that occupy an H100."""


class Tiling(NamedTuple):
    """Tile sizes and launch options for one head width and dtype."""

    width: int
    tiles: int
    """A head is ``tiles`` tensors of ``width`` columns."""
    parts: int
    """Programs that share the columns of a tile of outputs."""
    rows: int
    columns: int
    warps: int
    stages: int
    step: int
    """Rows of the state that are loaded at once."""
    state: int
    """Side of the tile of the state that one program sums up."""
    together: bool
    """Whether one program computes the gradients of both k and v."""


@lru_cache
def tiling(head_width: int, dtype: torch.dtype, shared: int) -> Tiling:
    """Choose tiles that fit into registers and ``shared`` bytes of memory, instead of autotuning.

    Those in half precision for Hopper were the fastest of about 25 on an H100, at head widths 96,
    192 and 384 and up to 1024 x 1024 pixels (Triton 3.6; the stage ``tiles`` of ``make gpu-report``
    tries others). The rest are derived from compiled code, which ``python -m
    tests.test_ops.triton_offline`` prints. A warp computes 16 rows; with fewer, warps would repeat
    each other's scores. Beyond width 192, programs split the columns of the output, because
    registers would spill.
    """
    itemsize = dtype.itemsize
    hopper = shared >= 200 * 1024
    large = hopper and itemsize == 2  # operands in shared memory leave registers to larger tiles
    widths = (16, 32, 64) if large else (16, 32, 64, 128)
    width = min(widths, key=lambda w: (cdiv(head_width, w) * w, -w))
    tiles = cdiv(head_width, width)
    padded = width * tiles
    bfloat16 = dtype == torch.bfloat16  # float16 has float32 states, and takes more registers
    most = 192 if large and bfloat16 or padded <= 192 else 128  # columns beside the scores
    parts = next(n for n in range(1, tiles + 1) if tiles % n == 0 and padded // n <= most)
    few_registers = width == 64 and not hopper
    if itemsize == 4:  # one warp per 16 rows would take too many registers
        rows = columns = 32 if padded <= 64 else 16
        warps = 4 if padded < 128 else 8
    else:
        rows, warps = (64, 4) if padded < 128 or parts > 1 and not large else (128, 8)
        columns = 16 if few_registers and padded >= 128 else 32
    long_steps = large and bfloat16 and padded >= 128
    # A stage loads two tiles: one in full width, one in that of a part.
    room = shared // itemsize - (rows + 8) * padded
    stages = room // (columns * (padded + padded // parts))
    return Tiling(
        width=width,
        tiles=tiles,
        parts=parts,
        rows=rows,
        columns=columns,
        warps=warps,
        stages=max(1, min(stages, 3 if large else 2 if parts == 1 else 1)),
        step=16 if few_registers else min(width, 64 if long_steps else 32),
        state=min(next_power_of_2(padded), 128 if padded > 192 and itemsize == 2 else 64),
        together=padded < 128 and bfloat16,
    )


class _Cell:
    """Launches of one call, with their common sizes, constants and gate scalars. In the backward
    pass, ``backward`` has the normalizer and ``delta``.
    """

    def __init__(
        self, q, k, v, igate, fgate, reverse: bool, chunk_size: int | None, **backward: Tensor
    ):
        batch, heads, self.length, self.width = q.shape
        self.reverse, self.device, self.programs = reverse, q.device, batch * heads
        self.tiling = tiling(self.width, q.dtype, shared_memory(q.device))
        self.precision = dot_precision(q.dtype)
        self.state_dtype = q.dtype if q.dtype == torch.bfloat16 else torch.float32
        chunk = chunk_size or default_chunk_size(self.length)
        rows = self.tiling.rows  # a multiple of columns
        self.chunk = cdiv(min(chunk, self.length), rows) * rows
        self.bounds = cdiv(self.length, self.chunk) - 1
        self.sizes = dict(heads=heads, length=self.length)
        self.padded = cdiv(self.length, rows) * rows
        shape = (self.programs, self.padded // rows)
        bases = torch.empty(shape, dtype=torch.float64, device=q.device)
        self.grad = bool(backward)
        if self.grad:
            log_weight, running_max, *others, self.stabilizer_grad = self.scalars(5).unbind(0)
            self.denominators = dict(zip(('inverse', 'normalizer_grad'), others))
            results = dict(min_denom=None, stabilizer_grad=self.stabilizer_grad)
        else:
            log_weight, running_max, self.min_denom = self.scalars(3).unbind(0)
            self.denominators = dict(inverse=None, normalizer_grad=None)
            results = dict(min_denom=self.min_denom, stabilizer_grad=None)
            backward = dict(delta=None, normalizer=None)
        self.gates = dict(log_weight=log_weight, running_max=running_max, base=bases)
        self.block = min(GATE_BLOCK, max(rows, next_power_of_2(self.length)))
        launch(
            gate_statistics_kernel,
            self.programs,
            **self.in_reading_order(igate=igate, fgate=fgate, **backward),
            **self.gates,
            **self.denominators,
            **results,
            **self.sizes,
            BLOCK=self.block,
            ROWS=rows,
            GRAD=self.grad,
            num_warps=max(4, self.block // 256),
        )

    def scalars(self, count: int) -> Tensor:
        """Tensors with one number per token, in reading order, as one of shape (count, B * NH,
        padded length).
        """
        shape = (count, self.programs, self.padded)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def in_reading_order(self, **tensors: Tensor | None) -> dict[str, Any]:
        """Arguments for tensors (B, NH, N, ...): a pointer to the first token in reading order, and
        the strides from there; None for None.
        """
        arguments = {}
        for name, x in tensors.items():
            if x is None:
                arguments[name] = arguments[f'{name}_strides'] = None
                continue
            strides = x.stride()
            if max(strides[2:]) > FARTHEST:
                x = x.contiguous()
                strides = x.stride()
            if self.reverse:
                x, strides = x[:, :, -1:], (*strides[:2], -strides[2], *strides[3:])
            arguments[name], arguments[f'{name}_strides'] = x, strides
        return arguments

    def states(
        self, k: Tensor, v: Tensor, q: Tensor | None = None, h_grad: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """Incoming states and normalizers of all chunks except the first and, given q and the
        gradient of h, gradients of both.
        """
        roles, t = 1 + self.grad, self.tiling
        shape = (roles, self.programs, self.bounds, self.width)
        states = torch.empty(*shape, self.width, dtype=self.state_dtype, device=self.device)
        vectors = torch.empty(*shape, dtype=torch.float32, device=self.device)
        targets = dict(states=states[0], state_vectors=vectors[0])
        targets.update(states_grad=None, state_vectors_grad=None)
        if self.grad:
            targets.update(states_grad=states[1], state_vectors_grad=vectors[1])
        if self.bounds:
            across = cdiv(self.width, t.state)
            # If that occupies the GPU, programs sum up all chunks. Otherwise, they sum up one each.
            span = self.bounds if self.programs * across**2 >= MULTIPROCESSORS else 1
            launch(
                chunk_sums_kernel,
                self.programs * cdiv(self.bounds, span) * (across**2 + across) * roles,
                **self.in_reading_order(k=k, v=v, q=q, h_grad=h_grad),
                **self.gates,
                **self.denominators,
                **targets,
                **self.sizes,
                span=span,
                chunk=self.chunk,
                scale=self.width**-0.5,
                DH=self.width,
                WIDTH=t.state,
                ROWS=t.rows,
                STEP=min(t.rows, t.state if self.state_dtype.itemsize == 2 else 64),
                GRAD=self.grad,
                PRECISION=self.precision,
                num_warps=t.state // 16,
                num_stages=t.stages,
                **(limited_registers(k.dtype, blocks=4) if t.state == 64 else {}),
            )
        if self.bounds and span == 1:
            block = max(1024, next_power_of_2(self.width))
            launch(
                sum_states_kernel,
                self.programs * (cdiv(self.width**2, block) + 1) * roles,
                **targets,
                running_max=self.gates['running_max'],
                base=self.gates['base'],
                length=self.length,
                chunk=self.chunk,
                DH=self.width,
                BLOCK=block,
                ROWS=t.rows,
                GRAD=self.grad,
            )
        return targets

    def products(self, kernel, *, roles: int = 1, **arguments) -> None:
        """Launch a kernel with a program for each role in each part of a tile of tokens."""
        t = self.tiling
        launch(
            kernel,
            self.programs * self.padded // t.rows * t.parts * roles,
            **self.gates,
            **self.denominators,
            **arguments,
            **self.sizes,
            chunk=self.chunk,
            scale=self.width**-0.5,
            DH=self.width,
            WIDTH=t.width,
            TILES=t.tiles,
            PARTS=t.parts,
            STEP=t.step,
            ROWS=t.rows,
            COLUMNS=t.columns,
            STATES=self.bounds > 0,
            PRECISION=self.precision,
            num_warps=t.warps,
            num_stages=t.stages,
        )


@on_input_device
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
        chunk_size (int, optional): Tokens per chunk, rounded up to whole tiles.

    Returns:
        tuple[Tensor, Tensor]: h, shape (B, NH, N, DH), and the signed normalizer, shape (B, NH, N)
        in float32, needed for backward.
    """
    cell = _Cell(q, k, v, igate, fgate, reverse, chunk_size)
    h, normalizer = empty_like_tokens(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    states = cell.states(k, v)
    cell.products(
        query_side_kernel,
        **cell.in_reading_order(a=q, b=k, c=v, out=h, normalizer=normalizer),
        states=states['states'],
        state_vectors=states['state_vectors'],
        min_denom=cell.min_denom,
        **dict.fromkeys(('q', 'q_strides', 'row_grad', 'place', 'places')),
        GRAD=False,
    )
    return h, normalizer


@on_input_device
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
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`mlstm_forward`.

    Args:
        h_grad (Tensor): Gradient of h, shape (B, NH, N, DH), any strides.
        q, k, v, igate, fgate, reverse, chunk_size: As in the forward pass.
        h, normalizer (Tensor): Results of the forward pass.
        delta (Tensor, optional): Sum over channels of h times its gradient, shape (B, NH, N).
            Computed if None.

    Returns:
        tuple[Tensor, ...]: Gradients of q, k, v (B, NH, N, DH) and of igate, fgate (B, NH, N), in
        their dtypes.
    """
    if delta is None:
        delta = (h_grad.float() * h).sum(-1)
    cell = _Cell(q, k, v, igate, fgate, reverse, chunk_size, delta=delta, normalizer=normalizer)
    q_grad, k_grad, v_grad = (empty_like_tokens(x) for x in (q, k, v))
    igate_grad, fgate_grad = igate.new_empty(igate.shape), fgate.new_empty(fgate.shape)
    row_grad, log_weight_grad = cell.scalars(2 * cell.tiling.parts).chunk(2)
    cell.products(
        gradients_kernel,
        roles=2 if cell.tiling.together else 3,
        **cell.in_reading_order(
            q=q, k=k, v=v, h_grad=h_grad, q_grad=q_grad, k_grad=k_grad, v_grad=v_grad
        ),
        **cell.states(k, v, q, h_grad),
        row_grad=row_grad,
        log_weight_grad=log_weight_grad,
        TOGETHER=cell.tiling.together,
    )
    launch(
        gate_gradients_kernel,
        cell.programs,
        **cell.in_reading_order(fgate=fgate, igate_grad=igate_grad, fgate_grad=fgate_grad),
        log_weight=cell.gates['log_weight'],
        running_max=cell.gates['running_max'],
        log_weight_grad=log_weight_grad,
        row_grad=row_grad,
        stabilizer_grad=cell.stabilizer_grad,
        **cell.sizes,
        padded=cell.padded,
        BLOCK=cell.block,
        PARTS=cell.tiling.parts,
        num_warps=max(4, cell.block // 128),  # with half as many, registers spill on sm_100
    )
    return q_grad, k_grad, v_grad, igate_grad, fgate_grad
