# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The ViL layer in PyTorch: forward pass and explicit gradients."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import is_exporting
from .layout import split_heads
from .mlstm_export import mlstm_traceable
from .projections import (
    GateWeights,
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
from .vil_layer_common import (
    LayerSettings,
    LayerWeights,
    cast,
    linear_parameter_grads,
    sum_tokens,
)


def forward(
    x: Tensor, w: LayerWeights, settings: LayerSettings
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute the layer, without the residual connection.

    Args:
        x (Tensor): Tokens, shape (B, N, D).
        w (LayerWeights): Parameters.
        settings (LayerSettings): Token grid, direction, dtype.

    Returns:
        tuple[Tensor, tuple[Tensor, ...]]: The output (B, N, D), and the tensors that the backward
            pass needs besides input and weights.
    """
    x_norm, _, _ = _normalize(x, w, settings)
    # Two products instead of one and a split: both halves come out contiguous at the same cost.
    up_m, up_z = cast(w.up_weight, settings.dtype).chunk(2)
    bias_m, bias_z = (None, None) if w.up_bias is None else cast(w.up_bias, settings.dtype).chunk(2)
    x_m, z = F.linear(x_norm, up_m, bias_m), F.linear(x_norm, up_z, bias_z)
    a = _convolve(x_m, w, settings)
    c = F.silu(a, inplace=not settings.save_cell_inputs)
    projections = prepare_projections(w, settings.heads, settings.dtype)
    q, k, v = _project(c, x_m, projections, w, settings)
    igate, fgate = gate_preactivations(c, x_m, projections.folded_gates)
    if is_exporting():  # a graph that runs where mmvil is not installed
        mlstm, form = mlstm_traceable, settings.form[:1]
    else:
        mlstm, form = torch.ops.mmvil.mlstm, settings.form
    h, normalizer = mlstm(q, k, v, igate, fgate, settings.reverse, *form)
    h_norm, _, _ = _head_norm(h, settings)
    mixed = _mix_(h_norm, c, w, settings).mul_(F.silu(z))
    y = F.linear(mixed, cast(w.down_weight, settings.dtype), cast(w.down_bias, settings.dtype))
    cell = (a, q, k, v) if settings.save_cell_inputs else ()
    return y, (x_m, z, h, igate, fgate, normalizer, *cell)


def gradients(
    y_grad: Tensor, saved: tuple[Tensor, ...], w: LayerWeights, settings: LayerSettings
) -> tuple[Tensor, LayerWeights]:
    """Compute the gradients of the input (B, N, D) and of all weights, with the residual
    connection.

    Args:
        y_grad (Tensor): Gradient of the output, shape (B, N, D).
        saved (tuple[Tensor, ...]): The input and the tensors that :func:`forward` returned for
            backward.
        w, settings: As in the forward pass.
    """
    x, x_m, z, h, igate, fgate, normalizer, *cell = saved
    residual_grad, scale = y_grad, settings.residual_scale
    y_grad = (y_grad if scale in (None, 1) else y_grad * scale).to(settings.dtype)
    a, *qkv = cell or [_convolve(x_m, w, settings)]
    c = F.silu(a)
    projections = prepare_projections(w, settings.heads, settings.dtype)
    q, k, v = qkv or _project(c, x_m, projections, w, settings)
    h_norm, mean, rstd = _head_norm(h, settings)
    mixed = _mix_(h_norm.clone(), c, w, settings)

    # Down-projection and output gate.
    output_gate = F.silu(z)
    down_grads = linear_parameter_grads(y_grad, mixed * output_gate, w.down_bias)
    gated_grad = torch.matmul(y_grad, cast(w.down_weight, settings.dtype))  # (B, N, E)
    z_grad = torch.ops.aten.silu_backward(gated_grad * mixed, z)
    mixed_grad = gated_grad.mul_(output_gate)

    # Skip and head-wise norm.
    skip_grad = sum_tokens(mixed_grad * c)
    c_grad = mixed_grad * cast(w.skip, settings.dtype)
    out_norm_weight_grad = sum_tokens(mixed_grad * h_norm)
    out_norm_bias_grad = None if w.out_norm_bias is None else sum_tokens(mixed_grad)
    h_norm_grad = mixed_grad.mul_(cast(w.out_norm_weight, settings.dtype))
    h_norm_grad = h_norm_grad.unflatten(2, (settings.heads, -1))
    h_grad = _layer_norm_backward(h_norm_grad, h.transpose(1, 2), mean, rstd)[0].transpose(1, 2)

    # Cell.
    *qkv_grads, igate_grad, fgate_grad = torch.ops.mmvil.mlstm_backward(
        h_grad, q, k, v, igate, fgate, h, normalizer, settings.reverse, *settings.form
    )

    # Projections and gates, first the part that goes through the convolution.
    gates_grad = torch.cat([igate_grad, fgate_grad], 1).transpose(1, 2).flatten(0, 1)
    folded = projections.folded_gates
    with_bias = w.q_bias is not None
    q_grad, k_grad, v_grad = (grad.transpose(1, 2).flatten(2) for grad in qkv_grads)
    q_dense, k_dense, v_dense = projections.qkv_weights
    q_grads = headwise_linear_backward(q_grad, c, q_dense, with_bias, c_grad)
    k_grads = headwise_linear_backward(k_grad, c, k_dense, with_bias, c_grad)
    gates_c_grad = gate_preactivations_backward(gates_grad, c, folded.c, c_grad)
    x_m_grad, conv_weight_grad, conv_bias_grad = token_conv_backward(
        torch.ops.aten.silu_backward(c_grad, a),
        x_m,
        cast(w.conv_weight, settings.dtype),
        w.conv_bias is not None,
        settings.grid,
        settings.reverse,
    )
    x_m_grad = x_m_grad.contiguous()
    v_grads = headwise_linear_backward(v_grad, x_m, v_dense, with_bias, x_m_grad)
    gates_x_grad = gate_preactivations_backward(gates_grad, x_m, folded.x, x_m_grad)
    gates_bias_grad = gates_grad.sum(0)
    gates_weight_grad, dense_grad, biases_grad = fold_gates_backward(
        GateWeights(gates_c_grad, gates_x_grad, gates_bias_grad),
        projections.gates,
        projections.dense,
        projections.biases,
    )
    dense_grads, projection_bias_grads = zip(q_grads, k_grads, v_grads)
    dense_grad = dense_grad + torch.cat(dense_grads)
    blocks_grad = diagonal_blocks(dense_grad, w.q_weight.shape[-1]).chunk(3)
    if with_bias:
        biases_grad = biases_grad + torch.stack(projection_bias_grads)
    else:
        biases_grad = (None, None, None)

    # Up-projection and norm.
    x_norm, mean, rstd = _normalize(x, w, settings)
    up_m, up_z = cast(w.up_weight, settings.dtype).chunk(2)
    up_m_grad, up_m_bias_grad = linear_parameter_grads(x_m_grad, x_norm, w.up_bias)
    up_z_grad, up_z_bias_grad = linear_parameter_grads(z_grad, x_norm, w.up_bias)
    x_norm_grad = torch.addmm(x_m_grad.flatten(0, 1) @ up_m, z_grad.flatten(0, 1), up_z)
    x_grad, norm_weight_grad, norm_bias_grad = _layer_norm_backward(
        x_norm_grad.view(x.shape), x, mean, rstd, w.norm_weight, w.norm_bias
    )
    if scale is not None:
        x_grad = x_grad.add_(residual_grad)

    heads = settings.heads
    return x_grad, LayerWeights(
        norm_weight=norm_weight_grad,
        norm_bias=norm_bias_grad,
        up_weight=torch.cat([up_m_grad, up_z_grad]),
        up_bias=None if w.up_bias is None else torch.cat([up_m_bias_grad, up_z_bias_grad]),
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
        down_weight=down_grads[0],
        down_bias=down_grads[1],
    )


class Projections(NamedTuple):
    """Weights between the convolution and the cell, in the form that the matrix products use."""

    dense: Tensor  # of q, k and v, (groups, width, width), at least float32
    qkv_weights: tuple[Tensor, ...]  # the same in the dtype of the features
    biases: Tensor | None  # (3, E), at least float32
    gates: Tensor  # (2 NH, 3E), at least float32
    folded_gates: GateWeights


def prepare_projections(w: LayerWeights, heads: int, dtype: torch.dtype) -> Projections:
    """Join and fold the weights, for NH heads and features of the given dtype."""
    precise = torch.promote_types(dtype, torch.float32)
    blocks = cast(torch.cat([w.q_weight, w.k_weight, w.v_weight]), precise)
    biases = (
        None if w.q_bias is None else cast(torch.stack([w.q_bias, w.k_bias, w.v_bias]), precise)
    )
    gates = cast(torch.cat([w.igate_weight, w.fgate_weight]), precise)
    gates_bias = cast(torch.cat([w.igate_bias, w.fgate_bias]), precise)
    dense = dense_blocks(blocks, len(w.skip) // heads)
    folded = fold_gates(gates, gates_bias, dense, biases)
    return Projections(dense, cast(dense, dtype).chunk(3), biases, gates, folded)


def _convolve(x_m: Tensor, w: LayerWeights, settings: LayerSettings) -> Tensor:
    weight, bias = cast(w.conv_weight, settings.dtype), cast(w.conv_bias, settings.dtype)
    return token_conv(x_m, weight, bias, settings.grid, settings.reverse)


def _project(
    c: Tensor, x_m: Tensor, projections: Projections, w: LayerWeights, settings: LayerSettings
):
    """Queries and keys from c, values from x_m, (B, N, E) to (B, NH, N, DH)."""
    biases = (w.q_bias, w.k_bias, w.v_bias)
    return tuple(
        split_heads(headwise_linear(x, weight, cast(bias, settings.dtype)), settings.heads)
        for x, weight, bias in zip((c, c, x_m), projections.qkv_weights, biases)
    )


def _normalize(
    x: Tensor, w: LayerWeights, settings: LayerSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of the input in the dtype of its weights, with mean and inverse deviation (B, N,
    1).
    """
    x_norm, mean, rstd = torch.native_layer_norm(
        x.to(w.norm_weight.dtype), x.shape[-1:], w.norm_weight, w.norm_bias, settings.norm_eps
    )
    return x_norm.to(settings.dtype), mean, rstd


def _layer_norm_backward(
    y_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias of a LayerNorm over the last dimension, in the dtype of its
    weight.
    """
    dtype = x.dtype if weight is None else weight.dtype
    return torch.ops.aten.native_layer_norm_backward(
        y_grad.to(dtype),
        x.to(dtype),
        x.shape[-1:],
        mean,
        rstd,
        weight,
        bias,
        [True, weight is not None, bias is not None],
    )


def _head_norm(h: Tensor, settings: LayerSettings):
    """LayerNorm over each head, (B, NH, N, DH) to (B, N, E), with mean and inverse deviation."""
    h = h.transpose(1, 2)  # as laid out in memory
    h_norm, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], None, None, settings.out_norm_eps)
    return h_norm.to(settings.dtype).flatten(2), mean, rstd


def _mix_(h_norm: Tensor, c: Tensor, w: LayerWeights, settings: LayerSettings) -> Tensor:
    """Affine map of the norm, and skip: the sum before the output gate, overwriting ``h_norm``."""
    mixed = h_norm.mul_(cast(w.out_norm_weight, settings.dtype))
    if w.out_norm_bias is not None:
        mixed = mixed.add_(cast(w.out_norm_bias, settings.dtype))
    return mixed.addcmul_(c, cast(w.skip, settings.dtype))
