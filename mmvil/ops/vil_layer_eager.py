# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The ViL layer in PyTorch: forward pass and explicit gradients."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import is_compiling
from .layout import by_head
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
    layer_norm_backward,
    linear_parameter_grads,
    normalize,
    sum_tokens,
)


class _Projections(NamedTuple):
    """The weights between the convolution and the cell, as the products take them."""

    blocks: Tensor  # (3, E / 4, 4, 4) of q, k, v, at least float32
    biases: Tensor | None  # (3, E), at least float32
    gates: Tensor  # (2 NH, 3E), at least float32
    dense: tuple[Tensor, ...]  # of q, k, v, (groups, width, width) in the dtype of the features
    folded_gates: GateWeights


SAMPLE_TILE_BYTES = 5 * 2**18
"""Inner features (N, E) of the samples that a CPU computes together; with all that is made of them
they fill a common L3 cache."""

KEPT_PER_TILE = 6


def forward(
    x: Tensor, w: LayerWeights, settings: LayerSettings, keep: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute the layer.

    Args:
        x (Tensor): Tokens, shape (B, N, D).
        w (LayerWeights): Parameters.
        settings (LayerSettings): Token grid, direction, dtype.
        keep (bool): Whether a backward pass follows. Default: True.

    Returns:
        tuple[Tensor, tuple[Tensor, ...]]: The output (B, N, D), and what the backward pass needs
        besides the input and the weights.
    """
    projections, w = _projections(w, settings), _cast_weights(w, settings)
    outputs, kept = [], []
    for tile in _sample_tiles(x, w):
        y, *tile_kept = _tile_forward(tile, projections, w, settings)
        outputs.append(y)
        if keep:
            kept += tile_kept
    return _join(outputs), tuple(kept)


def _tile_forward(x: Tensor, projections: _Projections, w: LayerWeights, settings: LayerSettings):
    x_norm, _, _ = normalize(x, w, settings)
    # Two products instead of one and a split: both halves come out contiguous at the same cost.
    x_m, z = (F.linear(x_norm, *half) for half in _up_halves(w))
    c = F.silu(_convolve(x_m, w, settings), inplace=True)
    q, k, v = _project(c, x_m, projections.dense, w, settings)
    igate, fgate = gate_preactivations(c, x_m, projections.folded_gates)
    h, normalizer = torch.ops.mmvil.mlstm(q, k, v, igate, fgate, settings.reverse, *settings.form)
    h_norm, _, _ = _head_norm(h, settings)
    mixed = _mix_(h_norm, c, w).mul_(F.silu(z))
    return F.linear(mixed, w.down_weight, w.down_bias), x_m, z, h, igate, fgate, normalizer


def gradients(
    y_grad: Tensor, kept: tuple[Tensor, ...], w: LayerWeights, settings: LayerSettings
) -> tuple[Tensor, LayerWeights]:
    """Compute the gradients of the input (B, N, D) and of all weights.

    Args:
        y_grad (Tensor): Gradient of the output, shape (B, N, D).
        kept (tuple[Tensor, ...]): The input, and what :func:`forward` kept.
        w, settings: As in the forward pass.
    """
    x, *kept = kept
    projections, w = _projections(w, settings), _cast_weights(w, settings)
    x_grads, grads = [], {}
    tiles = (_sample_tiles(tokens, w) for tokens in (x, y_grad.to(settings.dtype)))
    for number, (x_tile, y_grad_tile) in enumerate(zip(*tiles)):
        tile_kept = kept[number * KEPT_PER_TILE :][:KEPT_PER_TILE]
        x_grad, tile_grads = _tile_gradients(
            y_grad_tile, x_tile, *tile_kept, projections, w, settings
        )
        x_grads.append(x_grad)
        for name, grad in tile_grads.items():
            grads[name] = _accumulate(grads.get(name), grad)

    gates_grad = GateWeights(*(grads.pop(f'gates_{name}') for name in GateWeights._fields))
    gates_weight_grad, blocks_grad, biases_grad = fold_gates_backward(
        gates_grad, projections.gates, projections.blocks, projections.biases
    )
    dense_grad = torch.cat([grads.pop(f'{name}_dense') for name in 'qkv'])
    blocks_grad += diagonal_blocks(dense_grad, w.q_weight.shape[-1]).view_as(blocks_grad)
    if biases_grad is not None:
        for name, grad in zip('qkv', biases_grad):
            grads[f'{name}_bias'] = grads[f'{name}_bias'] + grad
    heads = settings.heads
    grads = LayerWeights(
        q_weight=blocks_grad[0],
        k_weight=blocks_grad[1],
        v_weight=blocks_grad[2],
        igate_weight=gates_weight_grad[:heads],
        igate_bias=gates_grad.bias[:heads],
        fgate_weight=gates_weight_grad[heads:],
        fgate_bias=gates_grad.bias[heads:],
        **grads,
    )
    return _join(x_grads), grads


def _tile_gradients(
    y_grad: Tensor,
    x: Tensor,
    x_m: Tensor,
    z: Tensor,
    h: Tensor,
    igate: Tensor,
    fgate: Tensor,
    normalizer: Tensor,
    projections: _Projections,
    w: LayerWeights,
    settings: LayerSettings,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Gradients of the input and, by name, of weights and :class:`_Projections`."""
    a = _convolve(x_m, w, settings)
    c = F.silu(a)
    q, k, v = _project(c, x_m, projections.dense, w, settings)
    h_norm, mean, rstd = _head_norm(h, settings)
    mixed = _mix_(h_norm.clone(), c, w)
    grads = {}

    # Down-projection and output gate.
    open_gate = F.silu(z)
    grads['down_weight'], grads['down_bias'] = linear_parameter_grads(
        y_grad, mixed * open_gate, w.down_bias
    )
    gated_grad = torch.matmul(y_grad, w.down_weight)  # (B, N, E)
    z_grad = torch.ops.aten.silu_backward(mixed.mul_(gated_grad), z)
    mixed_grad = gated_grad.mul_(open_gate)

    # Skip and head-wise norm.
    grads['skip'] = sum_tokens(mixed_grad * c)
    c_grad = mixed_grad * w.skip
    grads['out_norm_weight'] = sum_tokens(mixed_grad * h_norm)
    grads['out_norm_bias'] = None if w.out_norm_bias is None else sum_tokens(mixed_grad)
    h_norm_grad = mixed_grad.mul_(w.out_norm_weight).unflatten(2, (settings.heads, -1))
    h_grad = layer_norm_backward(h_norm_grad, h.transpose(1, 2), mean, rstd)[0].transpose(1, 2)

    # Cell.
    *qkv_grads, igate_grad, fgate_grad = torch.ops.mmvil.mlstm_backward(
        h_grad, q, k, v, igate, fgate, h, normalizer, settings.reverse, *settings.form
    )

    # Projections and gates, first what goes through the convolution.
    gates_grad = torch.cat([igate_grad, fgate_grad], 1).transpose(1, 2).flatten(0, 1)
    folded, with_bias = projections.folded_gates, w.q_bias is not None
    q_grad, k_grad, v_grad = (grad.transpose(1, 2).flatten(2) for grad in qkv_grads)
    q_dense, k_dense, v_dense = projections.dense
    grads['q_dense'], grads['q_bias'] = headwise_linear_backward(
        q_grad, c, q_dense, with_bias, c_grad
    )
    grads['k_dense'], grads['k_bias'] = headwise_linear_backward(
        k_grad, c, k_dense, with_bias, c_grad
    )
    grads['gates_c'] = gate_preactivations_backward(gates_grad, c, folded.c, c_grad)
    x_m_grad, grads['conv_weight'], grads['conv_bias'] = token_conv_backward(
        torch.ops.aten.silu_backward(c_grad, a),
        x_m,
        w.conv_weight,
        w.conv_bias is not None,
        settings.grid,
        settings.reverse,
    )
    x_m_grad = x_m_grad.contiguous()
    grads['v_dense'], grads['v_bias'] = headwise_linear_backward(
        v_grad, x_m, v_dense, with_bias, x_m_grad
    )
    grads['gates_x'] = gate_preactivations_backward(gates_grad, x_m, folded.x, x_m_grad)
    grads['gates_bias'] = gates_grad.sum(0)

    # Up-projection and norm.
    x_norm, mean, rstd = normalize(x, w, settings)
    halves = [linear_parameter_grads(grad, x_norm, w.up_bias) for grad in (x_m_grad, z_grad)]
    weight_grads, bias_grads = zip(*halves)
    grads['up_weight'] = torch.cat(weight_grads)
    grads['up_bias'] = None if w.up_bias is None else torch.cat(bias_grads)
    (up_m, _), (up_z, _) = _up_halves(w)
    x_norm_grad = torch.addmm(x_m_grad.flatten(0, 1) @ up_m, z_grad.flatten(0, 1), up_z)
    x_grad, grads['norm_weight'], grads['norm_bias'] = layer_norm_backward(
        x_norm_grad.view(x.shape), x, mean, rstd, w.norm_weight, w.norm_bias
    )
    return x_grad, grads


def _sample_tiles(x: Tensor, w: LayerWeights) -> tuple[Tensor, ...]:
    """Cut (B, N, D) into groups of samples whose features stay in a CPU's cache."""
    if x.device.type != 'cpu' or is_compiling():
        return (x,)
    sample_bytes = x.shape[1] * len(w.skip) * x.element_size()
    fitting = max(1, SAMPLE_TILE_BYTES // max(1, sample_bytes))
    return (x,) if len(x) <= fitting else x.split(fitting)


def _join(tiles: list[Tensor]) -> Tensor:
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)


def _accumulate(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Sum over tiles, at least in float32."""
    if total is None or grad is None:
        return grad
    return total.to(torch.promote_types(total.dtype, torch.float32)).add_(grad)


def _projections(w: LayerWeights, settings: LayerSettings) -> _Projections:
    dtype = torch.promote_types(settings.dtype, torch.float32)
    blocks = torch.stack([w.q_weight, w.k_weight, w.v_weight]).to(dtype)
    biases = None if w.q_bias is None else torch.stack([w.q_bias, w.k_bias, w.v_bias]).to(dtype)
    gates = torch.cat([w.igate_weight, w.fgate_weight]).to(dtype)
    gates_bias = torch.cat([w.igate_bias, w.fgate_bias]).to(dtype)
    dense = dense_blocks(blocks.flatten(0, 1).to(settings.dtype), len(w.skip) // settings.heads)
    folded = fold_gates(gates, gates_bias, blocks, biases)
    return _Projections(blocks, biases, gates, dense.chunk(3), folded)


def _cast_weights(w: LayerWeights, settings: LayerSettings) -> LayerWeights:
    """Weights in the dtype of the features, but for those of the input norm."""
    if all(weight is None or weight.dtype == settings.dtype for weight in w):
        return w
    narrow = LayerWeights(*(cast(weight, settings.dtype) for weight in w))
    return narrow._replace(norm_weight=w.norm_weight, norm_bias=w.norm_bias)


def _up_halves(w: LayerWeights) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of both halves of the up-projection."""
    biases = (None, None) if w.up_bias is None else w.up_bias.chunk(2)
    return list(zip(w.up_weight.chunk(2), biases))


def _convolve(x_m: Tensor, w: LayerWeights, settings: LayerSettings) -> Tensor:
    return token_conv(x_m, w.conv_weight, w.conv_bias, settings.grid, settings.reverse)


def _project(c: Tensor, x_m: Tensor, dense, w: LayerWeights, settings: LayerSettings):
    """Queries and keys from c, values from x_m, (B, N, E) to (B, NH, N, DH)."""
    biases = (w.q_bias, w.k_bias, w.v_bias)
    return tuple(
        by_head(headwise_linear(x, weight, bias), settings.heads)
        for x, weight, bias in zip((c, c, x_m), dense, biases)
    )


def _head_norm(h: Tensor, settings: LayerSettings):
    """LayerNorm over each head, (B, NH, N, DH) to (B, N, E), with mean and inverse deviation."""
    h = h.transpose(1, 2)  # as it lies in memory
    h_norm, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], None, None, settings.out_norm_eps)
    return h_norm.to(settings.dtype).flatten(2), mean, rstd


def _mix_(h_norm: Tensor, c: Tensor, w: LayerWeights) -> Tensor:
    """Affine map of the norm, and skip: the sum before the output gate, written over ``h_norm``."""
    mixed = h_norm.mul_(w.out_norm_weight)
    if w.out_norm_bias is not None:
        mixed = mixed.add_(w.out_norm_bias)
    return mixed.addcmul_(c, w.skip)
