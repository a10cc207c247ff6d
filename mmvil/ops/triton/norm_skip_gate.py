# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
r"""Head-wise norm, skip and output gate of the ViL layer as fused kernels, forward and backward.

.. math:: y = (\mathrm{norm}(h) \cdot w + b + s \cdot \mathrm{SiLU}(a)) \cdot \mathrm{SiLU}(z)

The norm is over the channels of a head. In one launch, the forward kernel reads h, a and z and
writes y: 4 tensors of shape (B, N, E). The backward kernel reads the gradient of y, h, a and z, and
writes the gradients of h, c = SiLU(a) and z, and y again for the weight gradient of the
down-projection: 8 tensors, and partial sums over tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous, split_heads, token_rows, with_unit_stride
from . import cdiv, launch, next_power_of_2, on_input_device
from .activation import sigmoid
from .layer_norm import normalize, normalize_backward
from .reduction import split_tokens
from .tiles import load_row

# -- Kernels ---------------------------------------------------------------------------------------


@triton.jit
def _tile(pointer, offset, inside):
    return tl.load(pointer + offset, mask=inside, other=0).to(tl.float32)


@triton.jit(do_not_specialize=['tokens', 'length'])
def after_cell_kernel(
    h, batch_stride, head_stride, position_stride, a, z, z_stride, weight, bias, skip, y,
    tokens, length, eps,
    E: tl.constexpr, NH: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute y for one tile of tokens and one head."""
    DH: tl.constexpr = E // NH
    head = tl.program_id(1)
    in_head = tl.arange(0, C)
    present = in_head < DH
    channel = head * DH + in_head
    token = tl.program_id(0) * T + tl.arange(0, T)
    inside = (token < tokens)[:, None] & present[None, :]
    batch, position = (token // length).to(tl.int64), (token % length).to(tl.int64)
    row = batch * batch_stride + head.to(tl.int64) * head_stride + position * position_stride
    offset = token.to(tl.int64)[:, None]

    h_norm, _ = normalize(
        _tile(h, row[:, None] + in_head[None, :], inside), present[None, :], eps, DH
    )
    a_tile = _tile(a, offset * E + channel[None, :], inside)
    z_tile = _tile(z, offset * z_stride + channel[None, :], inside)
    mixed = h_norm * load_row(weight, channel, present) + load_row(bias, channel, present)
    mixed += a_tile * sigmoid(a_tile) * load_row(skip, channel, present)
    out = mixed * (z_tile * sigmoid(z_tile))
    tl.store(y + offset * E + channel[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['tokens', 'length', 'tokens_per_program'])
def after_cell_backward_kernel(
    y_grad, h, batch_stride, head_stride, position_stride, a, z, z_stride, weight, bias, skip, y,
    h_grad, delta, c_grad, z_grad, z_grad_stride, sums, sums_stride,
    tokens, length, tokens_per_program, eps,
    E: tl.constexpr, NH: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute gradients and delta of some tiles of tokens and one head, with h as (B, N, E)."""
    DH: tl.constexpr = E // NH
    dtype: tl.constexpr = y.dtype.element_ty
    program = tl.program_id(0)
    head = tl.program_id(1)
    in_head = tl.arange(0, C)
    present = in_head < DH
    channel = head * DH + in_head
    w = load_row(weight, channel, present)
    b = load_row(bias, channel, present)
    s = load_row(skip, channel, present)
    weight_grad = tl.zeros((T, C), tl.float32)
    bias_grad = tl.zeros((T, C), tl.float32)
    skip_grad = tl.zeros((T, C), tl.float32)
    z_grad_sum = tl.zeros((T, C), tl.float32)

    begin = program * tokens_per_program
    end = tl.minimum(begin + tokens_per_program, tokens)
    for first in tl.range(begin, end, T, num_stages=3):
        token = first + tl.arange(0, T)
        inside = (token < tokens)[:, None] & present[None, :]
        batch, position = (token // length).to(tl.int64), (token % length).to(tl.int64)
        row = batch * batch_stride + head.to(tl.int64) * head_stride + position * position_stride
        offset = token.to(tl.int64)[:, None]
        here = offset * E + channel[None, :]
        # All loads before the first store, behind which they could not be prefetched.
        h_tile = _tile(h, row[:, None] + in_head[None, :], inside)
        a_tile = _tile(a, here, inside)
        z_tile = _tile(z, offset * z_stride + channel[None, :], inside)
        dy = _tile(y_grad, here, inside)

        h_norm, rstd = normalize(h_tile, present[None, :], eps, DH)
        c = a_tile * sigmoid(a_tile)
        mixed = h_norm * w + b + c * s
        z_open = sigmoid(z_tile)
        gate = z_tile * z_open
        tl.store(y + here, (mixed * gate).to(dtype), mask=inside)

        dz = dy * mixed * z_open * (1 + z_tile * (1 - z_open))
        tl.store(z_grad + offset * z_grad_stride + channel[None, :], dz.to(dtype), mask=inside)
        z_grad_sum += dz
        d_mixed = dy * gate
        weight_grad += d_mixed * h_norm
        bias_grad += d_mixed
        skip_grad += d_mixed * c
        tl.store(c_grad + here, (d_mixed * s).to(dtype), mask=inside)

        dh = normalize_backward(d_mixed * w, h_norm, rstd, DH).to(dtype)
        tl.store(h_grad + here, dh, mask=inside)
        to = delta + (batch * NH + head) * length + position
        tl.store(to, tl.sum(dh.to(tl.float32) * h_tile, axis=1), mask=token < tokens)

    sums += program.to(tl.int64) * sums_stride + channel
    tl.store(sums, tl.sum(z_grad_sum, axis=0), mask=present)
    tl.store(sums + E, tl.sum(weight_grad, axis=0), mask=present)
    tl.store(sums + 2 * E, tl.sum(bias_grad, axis=0), mask=present)
    tl.store(sums + 3 * E, tl.sum(skip_grad, axis=0), mask=present)


# -- Launches --------------------------------------------------------------------------------------


@on_input_device
def after_cell(
    h: Tensor,
    a: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor,
    eps: float,
) -> Tensor:
    """Apply head-wise norm, skip and output gate.

    Args:
        h (Tensor): Output of the cell, shape (B, NH, N, DH), any strides.
        a (Tensor): Output of the convolution, shape (B, N, E), any strides.
        z (Tensor): Half of the up-projection's output, shape (B, N, E), any strides; copied unless
            channels are adjacent.
        weight, skip (Tensor): Shape (E, ), any floating dtype.
        bias (Tensor, optional): Shape (E, ).
        eps (float): Epsilon of the norm.

    Returns:
        Tensor: Shape (B, N, E), contiguous, with the dtype of z.
    """
    arguments = _shared_arguments(h, a, z, weight, bias, skip, eps, tile_size=2048)
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    programs = cdiv(arguments['tokens'], arguments['T'])
    launch(after_cell_kernel, programs, h.shape[1], **arguments, y=y)
    return y


@on_input_device
def after_cell_backward(
    y_grad: Tensor,
    h: Tensor,
    a: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`after_cell`.

    Args:
        y_grad (Tensor): Shape (B, N, E).
        h, a, z, weight, bias, skip, eps: As in the forward pass.

    Returns:
        tuple: y of the forward pass (B, N, E); gradient of h (B, NH, N, DH), in the memory layout
        of (B, N, E); the sum over channels of h times that gradient (B, NH, N), in float32;
        gradients of c = SiLU(a) (B, N, E) and of both halves of the up-projection's output (B, N,
        2E), of which only the second, that of z, is written; partial sums of the gradients of z,
        weight, bias and skip (programs, 4E), in float32.
    """
    arguments = _shared_arguments(h, a, z, weight, bias, skip, eps, tile_size=1024)
    tokens, heads, channels = arguments['tokens'], h.shape[1], z.shape[-1]
    y, c_grad, h_grad = (
        torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(3)
    )
    delta = torch.empty(h.shape[:3], dtype=torch.float32, device=z.device)
    up_grad = torch.empty((*z.shape[:2], 2 * channels), dtype=z.dtype, device=z.device)
    z_grad = up_grad.view(tokens, 2 * channels)[:, channels:]
    share, sums = after_cell_sums(z, heads)
    launch(
        after_cell_backward_kernel,
        len(sums),
        heads,
        **arguments,
        y_grad=y_grad.contiguous(),
        y=y,
        h_grad=h_grad,
        delta=delta,
        c_grad=c_grad,
        z_grad=z_grad,
        z_grad_stride=z_grad.stride(0),
        sums=sums,
        sums_stride=sums.stride(0),
        tokens_per_program=share,
    )
    return y, split_heads(h_grad, heads), delta, c_grad, up_grad, sums


def after_cell_sums(z: Tensor, heads: int) -> tuple[int, Tensor]:
    """Tokens per program of the backward kernel, and memory for its sums."""
    batch, tokens, channels = z.shape
    tile = _tile_sizes(channels // heads, 1024)
    # Three fit a multiprocessor: on an H100, all run at the same time, which is the fastest.
    share, programs = split_tokens(batch * tokens, tile['T'], heads, programs=384)
    return share, z.new_empty(programs, 4 * channels, dtype=torch.float32)


def _tile_sizes(head_width: int, size: int) -> dict[str, int]:
    """Tokens and channels of tiles of about ``size`` values."""
    columns = next_power_of_2(head_width)
    return dict(T=max(1, min(64, size // columns)), C=columns)


def _shared_arguments(h, a, z, weight, bias, skip, eps: float, tile_size: int) -> dict[str, Any]:
    """Arguments of both kernels, with tiles of about ``tile_size`` values."""
    h, rows = with_unit_stride(h), token_rows(z)
    heads, channels = h.shape[1], z.shape[-1]
    batch_stride, head_stride, position_stride, _ = h.stride()
    return dict(
        h=h,
        batch_stride=batch_stride,
        head_stride=head_stride,
        position_stride=position_stride,
        a=a.contiguous(),
        z=rows,
        z_stride=rows.stride(0),
        weight=contiguous(weight),
        bias=contiguous(bias),
        skip=contiguous(skip),
        tokens=len(rows),
        length=h.shape[2],
        eps=eps,
        E=channels,
        NH=heads,
        **_tile_sizes(channels // heads, tile_size),
    )
