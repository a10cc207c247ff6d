# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The whole ViL layer as one differentiable function that keeps little for its backward pass.

Autograd over the single operations keeps about thirty widths of the model per token. Here the
backward pass keeps the layer's input (D values per token), both halves of the up-projection (2D
each), the cell's output (2D) and a few scalars, about 7 D in all. Norm, convolution, SiLU, q, k, v
and the gated product are cheap next to the matrix products and are computed again.

The equations are those of :class:`mmvil.layers.ViLBlock`, in the same order.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import is_compiling, without_autocast
from .mlstm import Form, refuse_second_derivatives
from .projections import (
    GateWeights,
    by_head,
    dense_blocks,
    diagonal_blocks,
    fold_gates,
    fold_gates_backward,
    gate_preactivations,
    gate_preactivations_backward,
    headwise_linear,
    headwise_linear_backward,
    token_conv,
    token_conv_backward,
)


class LayerWeights(NamedTuple):
    """The parameters of a ViL layer, D wide outside and E wide inside, with NH heads. Biases may be
    None.
    """

    norm_weight: Tensor  # (D, )
    norm_bias: Optional[Tensor]
    up_weight: Tensor  # (2E, D)
    up_bias: Optional[Tensor]
    conv_weight: Tensor  # (E, 1, 3, 3) or (E, 1, K)
    conv_bias: Optional[Tensor]
    q_weight: Tensor  # (E / 4, 4, 4)
    q_bias: Optional[Tensor]
    k_weight: Tensor
    k_bias: Optional[Tensor]
    v_weight: Tensor
    v_bias: Optional[Tensor]
    igate_weight: Tensor  # (NH, 3E)
    igate_bias: Tensor
    fgate_weight: Tensor  # (NH, 3E)
    fgate_bias: Tensor
    out_norm_weight: Tensor  # (E, )
    out_norm_bias: Optional[Tensor]
    skip: Tensor  # (E, )
    down_weight: Tensor  # (D, E)
    down_bias: Optional[Tensor]


class LayerSettings(NamedTuple):
    """What is constant for one call of a layer."""

    grid: Tuple[int, int]
    heads: int
    reverse: bool
    form: Form
    norm_eps: float
    out_norm_eps: float
    dtype: torch.dtype
    """Of features and matrix products; gates and statistics are at least float32."""


def lean_layer(x: Tensor, weights: LayerWeights, settings: LayerSettings) -> Tensor:
    """Norm, up-projection, convolution, mLSTM, gated product and down-projection (ViL, arXiv
    2406.04303, figure 2).

    Args:
        x (Tensor): Tokens, shape (B, N, D).
        weights (LayerWeights): Parameters.
        settings (LayerSettings): Token grid, direction, dtype.

    Returns:
        Tensor: Shape (B, N, D) in ``settings.dtype``, without the residual connection. First
            derivatives only.
    """
    if torch.is_grad_enabled() or is_compiling():
        return _LeanLayer.apply(settings, x, *weights)
    return _forward(x, weights, settings)[0]


def _normalize(x: Tensor, w: LayerWeights, settings: LayerSettings):
    """LayerNorm of the input in the dtype of its weights; returns it with mean and inverse
    deviation (B, N, 1).
    """
    x_norm, mean, rstd = torch.native_layer_norm(
        x.to(w.norm_weight.dtype), x.shape[-1:], w.norm_weight, w.norm_bias, settings.norm_eps
    )
    return x_norm.to(settings.dtype), mean, rstd


class _Projections(NamedTuple):
    """The weights between the convolution and the cell, as the products take them."""

    blocks: Tensor  # (3, E / 4, 4, 4) of q, k, v, at least float32
    biases: Optional[Tensor]  # (3, E), at least float32
    gates: Tensor  # (2 NH, 3E), at least float32
    dense: Tuple[Tensor, ...]  # of q, k, v, (groups, width, width) in the dtype of the features
    folded_gates: GateWeights


def _projections(w: LayerWeights, settings: LayerSettings) -> _Projections:
    dtype = torch.promote_types(settings.dtype, torch.float32)
    blocks = torch.stack([w.q_weight, w.k_weight, w.v_weight]).to(dtype)
    biases = None if w.q_bias is None else torch.stack([w.q_bias, w.k_bias, w.v_bias]).to(dtype)
    gates = torch.cat([w.igate_weight, w.fgate_weight]).to(dtype)
    gates_bias = torch.cat([w.igate_bias, w.fgate_bias]).to(dtype)
    dense = dense_blocks(blocks.flatten(0, 1).to(settings.dtype), len(w.skip) // settings.heads)
    folded = fold_gates(gates, gates_bias, blocks, biases)
    return _Projections(blocks, biases, gates, dense.chunk(3), folded)


def _convolve(x_m: Tensor, w: LayerWeights, settings: LayerSettings) -> Tensor:
    return token_conv(
        x_m,
        _to(w.conv_weight, settings),
        _to(w.conv_bias, settings),
        settings.grid,
        settings.reverse,
    )


def _project(c: Tensor, x_m: Tensor, dense, w: LayerWeights, settings: LayerSettings):
    """Queries and keys from c, values from x_m, (B, N, E) to (B, NH, N, DH)."""
    biases = (w.q_bias, w.k_bias, w.v_bias)
    return tuple(
        by_head(headwise_linear(x, weight, _to(bias, settings)), settings.heads)
        for x, weight, bias in zip((c, c, x_m), dense, biases)
    )


def _head_norm(h: Tensor, settings: LayerSettings):
    """LayerNorm over each head, from (B, NH, N, DH) to (B, N, E), and what its backward needs."""
    h = h.transpose(1, 2)  # as it lies in memory
    h_norm, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], None, None, settings.out_norm_eps)
    return h_norm.to(settings.dtype).flatten(2), mean, rstd


def _mix_(h_norm: Tensor, c: Tensor, w: LayerWeights, settings: LayerSettings) -> Tensor:
    """Affine map of the norm, and skip: the sum before the output gate, written over ``h_norm``."""
    mixed = h_norm.mul_(_to(w.out_norm_weight, settings))
    if w.out_norm_bias is not None:
        mixed = mixed.add_(_to(w.out_norm_bias, settings))
    return mixed.addcmul_(c, _to(w.skip, settings))


def _to(parameter: Optional[Tensor], settings: LayerSettings) -> Optional[Tensor]:
    return None if parameter is None else parameter.to(settings.dtype)


def _forward(x: Tensor, w: LayerWeights, settings: LayerSettings):
    """The output (B, N, D), and what the backward pass needs besides the input and the weights."""
    with without_autocast(x):  # dtypes are explicit here
        if settings.form.triton:
            from .triton import fused_layer as fused

            return fused.forward(x, w, settings)
        x_norm, _, _ = _normalize(x, w, settings)
        # Two products instead of one and a split: both halves come out contiguous at the same cost.
        up_m, up_z = _to(w.up_weight, settings).chunk(2)
        bias_m, bias_z = (None, None) if w.up_bias is None else _to(w.up_bias, settings).chunk(2)
        x_m, z = F.linear(x_norm, up_m, bias_m), F.linear(x_norm, up_z, bias_z)
        c = F.silu(_convolve(x_m, w, settings), inplace=True)
        projections = _projections(w, settings)
        q, k, v = _project(c, x_m, projections.dense, w, settings)
        igate, fgate = gate_preactivations(c, x_m, projections.folded_gates)
        h, normalizer = torch.ops.mmvil.mlstm(
            q, k, v, igate, fgate, settings.reverse, *settings.form
        )
        h_norm, _, _ = _head_norm(h, settings)
        mixed = _mix_(h_norm, c, w, settings).mul_(F.silu(z))
        y = F.linear(mixed, _to(w.down_weight, settings), _to(w.down_bias, settings))
    return y, (x_m, z, h, igate, fgate, normalizer)


class _LeanLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, x, *weights):
        y, kept = _forward(x, LayerWeights(*weights), settings)
        ctx.settings = settings
        ctx.save_for_backward(x, *kept, *weights)
        return y

    @staticmethod
    def backward(ctx, y_grad):
        if torch.is_grad_enabled() and not is_compiling():
            refuse_second_derivatives()
        x, x_m, z, h, igate, fgate, normalizer, *weights = ctx.saved_tensors
        kept = (x, x_m, z, h, igate, fgate, normalizer)
        with without_autocast(x):
            x_grad, grads = _gradients(y_grad, kept, LayerWeights(*weights), ctx.settings)
        _, x_needed, *needed = ctx.needs_input_grad
        return (
            None,
            x_grad.to(x.dtype) if x_needed else None,
            *(
                grad.to(weight.dtype) if need and grad is not None else None
                for grad, weight, need in zip(grads, weights, needed)
            ),
        )


def _gradients(y_grad: Tensor, kept: Tuple[Tensor, ...], w: LayerWeights, settings: LayerSettings):
    """From the output's gradient to that of the input (B, N, D) and of all weights.

    The way back through the layer, step by step, each with what it needs computed again.
    """
    if settings.form.triton:
        from .triton import fused_layer as fused

        return fused.gradients(y_grad, kept, w, settings)
    x, x_m, z, h, igate, fgate, normalizer = kept
    y_grad = y_grad.to(settings.dtype)
    a = _convolve(x_m, w, settings)
    c = F.silu(a)
    projections = _projections(w, settings)
    q, k, v = _project(c, x_m, projections.dense, w, settings)
    h_norm, mean, rstd = _head_norm(h, settings)
    mixed = _mix_(h_norm.clone(), c, w, settings)

    # Down-projection and output gate.
    open_gate = F.silu(z)
    down_weight_grad = _weight_grad(y_grad, mixed * open_gate)
    down_bias_grad = None if w.down_bias is None else _over_tokens(y_grad)
    gated_grad = torch.matmul(y_grad, _to(w.down_weight, settings))  # (B, N, E)
    z_grad = torch.ops.aten.silu_backward(gated_grad * mixed, z)
    mixed_grad = gated_grad.mul_(open_gate)

    # Skip and head-wise norm.
    skip_grad = _over_tokens(mixed_grad * c)
    c_grad = mixed_grad * _to(w.skip, settings)
    out_norm_weight_grad = _over_tokens(mixed_grad * h_norm)
    out_norm_bias_grad = None if w.out_norm_bias is None else _over_tokens(mixed_grad)
    h_norm_grad = mixed_grad.mul_(_to(w.out_norm_weight, settings))
    h_grad = torch.ops.aten.native_layer_norm_backward(
        h_norm_grad.unflatten(2, (settings.heads, -1)),
        h.transpose(1, 2),
        h.shape[-1:],
        mean,
        rstd,
        None,
        None,
        [True, False, False],
    )[0].transpose(1, 2)

    # Cell.
    *qkv_grads, igate_grad, fgate_grad = torch.ops.mmvil.mlstm_backward(
        h_grad, q, k, v, igate, fgate, h, normalizer, settings.reverse, *settings.form
    )

    # Projections and gates, first what goes through the convolution.
    gates_grad = torch.cat([igate_grad, fgate_grad], 1).transpose(1, 2).flatten(0, 1)
    folded = projections.folded_gates
    with_bias = w.q_bias is not None
    q_grad, k_grad, v_grad = (grad.transpose(1, 2).flatten(2) for grad in qkv_grads)
    q_dense_grad, q_bias_grad = headwise_linear_backward(
        q_grad, c, projections.dense[0], with_bias, c_grad
    )
    k_dense_grad, k_bias_grad = headwise_linear_backward(
        k_grad, c, projections.dense[1], with_bias, c_grad
    )
    gates_c_grad = gate_preactivations_backward(gates_grad, c, folded.c, c_grad)
    x_m_grad, conv_weight_grad, conv_bias_grad = token_conv_backward(
        torch.ops.aten.silu_backward(c_grad, a),
        x_m,
        _to(w.conv_weight, settings),
        w.conv_bias is not None,
        settings.grid,
        settings.reverse,
    )
    x_m_grad = x_m_grad.contiguous()
    v_dense_grad, v_bias_grad = headwise_linear_backward(
        v_grad, x_m, projections.dense[2], with_bias, x_m_grad
    )
    gates_x_grad = gate_preactivations_backward(gates_grad, x_m, folded.x, x_m_grad)
    gates_bias_grad = gates_grad.sum(0)
    gates_weight_grad, blocks_grad, biases_grad = fold_gates_backward(
        GateWeights(gates_c_grad, gates_x_grad, gates_bias_grad),
        projections.gates,
        projections.blocks,
        projections.biases,
    )
    dense_grad = torch.cat([q_dense_grad, k_dense_grad, v_dense_grad])
    blocks_grad += diagonal_blocks(dense_grad, w.q_weight.shape[-1]).view_as(blocks_grad)
    if with_bias:
        biases_grad = biases_grad + torch.stack([q_bias_grad, k_bias_grad, v_bias_grad])
    else:
        biases_grad = (None, None, None)

    # Up-projection and norm.
    x_norm, mean, rstd = _normalize(x, w, settings)
    up_m, up_z = _to(w.up_weight, settings).chunk(2)
    up_weight_grad = torch.cat([_weight_grad(x_m_grad, x_norm), _weight_grad(z_grad, x_norm)])
    up_bias_grad = (
        None if w.up_bias is None else torch.cat([_over_tokens(x_m_grad), _over_tokens(z_grad)])
    )
    x_norm_grad = torch.addmm(x_m_grad.flatten(0, 1) @ up_m, z_grad.flatten(0, 1), up_z).view(
        x.shape
    )
    x_grad, norm_weight_grad, norm_bias_grad = torch.ops.aten.native_layer_norm_backward(
        x_norm_grad.to(w.norm_weight.dtype),
        x.to(w.norm_weight.dtype),
        x.shape[-1:],
        mean,
        rstd,
        w.norm_weight,
        w.norm_bias,
        [True, True, w.norm_bias is not None],
    )

    heads = settings.heads
    return x_grad, LayerWeights(
        norm_weight=norm_weight_grad,
        norm_bias=norm_bias_grad,
        up_weight=up_weight_grad,
        up_bias=up_bias_grad,
        conv_weight=conv_weight_grad,
        conv_bias=conv_bias_grad,
        q_weight=blocks_grad[0],
        q_bias=biases_grad[0],
        k_weight=blocks_grad[1],
        k_bias=biases_grad[1],
        v_weight=blocks_grad[2],
        v_bias=biases_grad[2],
        igate_weight=gates_weight_grad[:heads],
        igate_bias=gates_bias_grad[:heads],
        fgate_weight=gates_weight_grad[heads:],
        fgate_bias=gates_bias_grad[heads:],
        out_norm_weight=out_norm_weight_grad,
        out_norm_bias=out_norm_bias_grad,
        skip=skip_grad,
        down_weight=down_weight_grad,
        down_bias=down_bias_grad,
    )


def _over_tokens(x: Tensor) -> Tensor:
    """Sum (B, N, C) to (C, ), at least in float32: sums over many tokens leave float16's range."""
    return x.sum((0, 1), dtype=torch.promote_types(x.dtype, torch.float32))


def _weight_grad(y_grad: Tensor, x: Tensor) -> Tensor:
    """Gradient (out, in) of a linear map's weight from (B, N, out) and (B, N, in)."""
    return torch.matmul(y_grad.flatten(0, 1).t(), x.flatten(0, 1))
