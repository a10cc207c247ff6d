# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""LayerNorm between features of different dtypes, without float32 copies in memory.

The residual stream is often in float32, while matrix products need half precision. The backward
kernel recomputes the output, which the gradient of the next weight needs, so only the input is
saved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous, token_rows
from . import cdiv, launch, next_power_of_2, on_input_device
from .reduction import split_tokens
from .tiles import load_row


@triton.jit
def normalize(x, present, eps, WIDTH: tl.constexpr):
    """Normalize rows of x, zero outside their WIDTH channels, and return the inverse deviation,
    too.
    """
    mean = tl.sum(x, axis=1) / WIDTH
    centred = tl.where(present, x - mean[:, None], 0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    return centred * rstd[:, None], rstd[:, None]


@triton.jit
def normalize_backward(y_grad, y, rstd, WIDTH: tl.constexpr):
    """Gradient of x in :func:`normalize`, all zero outside the WIDTH channels."""
    mean = tl.sum(y_grad, axis=1) / WIDTH
    projection = tl.sum(y_grad * y, axis=1) / WIDTH
    return (y_grad - mean[:, None] - y * projection[:, None]) * rstd


@triton.jit(do_not_specialize=['tokens'])
def layer_norm_kernel(
    x, x_stride, weight, bias, y,
    tokens, eps,
    D: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute y (tokens, D) for one tile of tokens."""
    token, channel = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, C)
    present = channel < D
    inside = (token < tokens)[:, None] & present[None, :]
    offset = tl.cast(token, tl.int64)[:, None]
    x_tile = tl.load(x + offset * x_stride + channel[None, :], mask=inside, other=0)
    normed, _ = normalize(x_tile.to(tl.float32), present[None, :], eps, D)
    out = normed * load_row(weight, channel, present) + load_row(bias, channel, present)
    tl.store(y + offset * D + channel[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['tokens', 'tokens_per_program'])
def layer_norm_backward_kernel(
    x, x_stride, y_grad, residual_grad, weight, bias, y, x_grad, sums, sums_stride,
    tokens, tokens_per_program, eps,
    D: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Recompute y, and compute the gradient of x, plus that of a residual connection if there is
    one, and partial sums of those of weight and bias (2, D), for some tiles of tokens.
    """
    program, channel = tl.program_id(0), tl.arange(0, C)
    present = channel < D
    w, b = load_row(weight, channel, present), load_row(bias, channel, present)
    weight_grad = tl.zeros((T, C), tl.float32)
    bias_grad = tl.zeros((T, C), tl.float32)
    begin = program * tokens_per_program
    end = tl.minimum(begin + tokens_per_program, tokens)
    for first in tl.range(begin, end, T, num_stages=3):
        token = first + tl.arange(0, T)
        inside = (token < tokens)[:, None] & present[None, :]
        offset = tl.cast(token, tl.int64)[:, None]
        here = offset * D + channel[None, :]
        # All loads before the first store, behind which they could not be prefetched.
        x_tile = tl.load(x + offset * x_stride + channel[None, :], mask=inside, other=0)
        dy = tl.load(y_grad + here, mask=inside, other=0).to(tl.float32)
        if residual_grad is not None:
            residual = tl.load(residual_grad + here, mask=inside, other=0)
        normed, rstd = normalize(x_tile.to(tl.float32), present[None, :], eps, D)
        tl.store(y + here, (normed * w + b).to(y.dtype.element_ty), mask=inside)
        weight_grad += dy * normed
        bias_grad += dy
        dx = normalize_backward(dy * w, normed, rstd, D)
        if residual_grad is not None:
            dx += residual.to(tl.float32)
        tl.store(x_grad + here, dx.to(x_grad.dtype.element_ty), mask=inside)
    sums += tl.cast(program, tl.int64) * sums_stride + channel
    tl.store(sums, tl.sum(weight_grad, axis=0), mask=present)
    tl.store(sums + D, tl.sum(bias_grad, axis=0), mask=present)


@on_input_device
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Normalize the last dimension.

    Args:
        x (Tensor): Shape (B, N, D), any strides and dtype; computed in float32.
        weight (Tensor): Shape (D, ).
        bias (Tensor, optional): Shape (D, ).
        eps (float): Epsilon.
        dtype (torch.dtype): Dtype of the result.

    Returns:
        Tensor: Shape (B, N, D), contiguous.
    """
    rows, tile = token_rows(x), _tile(x, 2048)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch(
        layer_norm_kernel,
        cdiv(len(rows), tile['T']),
        x=rows,
        x_stride=rows.stride(0),
        weight=contiguous(weight),
        bias=contiguous(bias),
        y=y,
        tokens=len(rows),
        eps=eps,
        **tile,
    )
    return y


@on_input_device
def layer_norm_backward(
    y_grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`layer_norm`.

    Args:
        y_grad (Tensor): Shape (B, N, D), in the dtype of the output.
        x, weight, bias, eps: As in the forward pass.
        residual_grad (Tensor, optional): Added to the gradient of x, shape (B, N, D).

    Returns:
        tuple[Tensor, Tensor, Tensor]: The recomputed output; the gradient of x; partial sums of
        those of weight and bias (programs, 2D), in float32.
    """
    rows, tile = token_rows(x), _tile(x, 1024)
    y, x_grad = (torch.empty(x.shape, dtype=d, device=x.device) for d in (y_grad.dtype, x.dtype))
    share, sums = layer_norm_sums(x)
    launch(
        layer_norm_backward_kernel,
        len(sums),
        x=rows,
        x_stride=rows.stride(0),
        y_grad=y_grad.contiguous(),
        residual_grad=contiguous(residual_grad),
        weight=contiguous(weight),
        bias=contiguous(bias),
        y=y,
        x_grad=x_grad,
        sums=sums,
        sums_stride=sums.stride(0),
        tokens=len(rows),
        tokens_per_program=share,
        eps=eps,
        **tile,
        num_warps=2,
    )
    return y, x_grad, sums


def layer_norm_sums(x: Tensor) -> tuple[int, Tensor]:
    """Tokens per program of the backward kernel, and memory for its sums."""
    batch, tokens, size = x.shape
    # On an H100, 512 programs are faster than 1024, which write twice as many partial sums.
    share, programs = split_tokens(batch * tokens, _tile(x, 1024)['T'], 1, programs=512)
    return share, x.new_empty(programs, 2 * size, dtype=torch.float32)


def _tile(x: Tensor, size: int) -> dict[str, int]:
    """Width and tile of both kernels: whole rows, about ``size`` values."""
    columns = next_power_of_2(x.shape[-1])
    return dict(D=x.shape[-1], T=max(1, min(64, size // columns)), C=columns)
