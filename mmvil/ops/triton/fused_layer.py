# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The lean layer of :mod:`mmvil.ops.lean_layer` with fused kernels: the same two functions, which
keep the same tensors.

Between norm and output there remain two matrix products of torch, the cell, and what is fused
before and after it. Under autocast, casts of weights included, these are 11 launches beside the
cell's in the forward pass and 23 in the backward pass, where the PyTorch form has about 48 and 105.
The parts are operators of torch, so a compiler sees one node for each.
"""

from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..vil_layer import (
    LayerSettings,
    LayerWeights,
    _normalize,
    _over_tokens,
    _to,
    _weight_grad,
)
from .conv_qkv_gates import (
    BeforeCellWeights,
    before_cell,
    before_cell_backward,
    gradient_sizes,
    split_gradients,
)
from .norm_skip_gate import after_cell, after_cell_backward


def forward(
    x: Tensor, w: LayerWeights, settings: LayerSettings
) -> Tuple[Tensor, Tuple[Tensor, ...]]:
    """The output (B, N, D), and what the backward pass needs besides the input and the weights.

    Args:
        x (Tensor): Tokens, shape (B, N, D).
        w (LayerWeights): Parameters.
        settings (LayerSettings): Its dtype is float16, bfloat16 or float32.
    """
    x_norm, _, _ = _normalize(x, w, settings)
    up = F.linear(x_norm, _to(w.up_weight, settings), _to(w.up_bias, settings))
    x_m, z = up.chunk(2, dim=-1)
    a, q, k, v, gates = torch.ops.mmvil.before_cell(
        x=x_m,
        weights=_before_cell_weights(w),
        grid=settings.grid,
        heads=settings.heads,
        reverse=settings.reverse,
        with_gates=True,
    )
    igate, fgate = gates.unbind(0)
    h, normalizer = torch.ops.mmvil.mlstm(q, k, v, igate, fgate, settings.reverse, *settings.form)
    del q, k, v
    y = torch.ops.mmvil.after_cell(h=h, a=a, z=z, **_after_cell_parameters(w, settings))
    y = F.linear(y, _to(w.down_weight, settings), _to(w.down_bias, settings))
    return y, (x_m, z, h, igate, fgate, normalizer)


def gradients(
    y_grad: Tensor, kept: Tuple[Tensor, ...], w: LayerWeights, settings: LayerSettings
) -> Tuple[Tensor, LayerWeights]:
    """From the output's gradient to that of the input (B, N, D) and of all weights.

    Args:
        y_grad (Tensor): Shape (B, N, D).
        kept (tuple[Tensor, ...]): The input and what :func:`forward` kept.
        w, settings: As in the forward pass.
    """
    x, x_m, z, h, igate, fgate, normalizer = kept
    y_grad = y_grad.to(settings.dtype)
    grid, heads, reverse = settings.grid, settings.heads, settings.reverse
    weights = _before_cell_weights(w)
    a, q, k, v, _ = torch.ops.mmvil.before_cell(x_m, weights, grid, heads, reverse, False)

    # Down-projection, and what is between the cell and it.
    down_bias_grad = None if w.down_bias is None else _over_tokens(y_grad)
    gated_grad = torch.matmul(y_grad, _to(w.down_weight, settings))  # (B, N, E)
    gated, h_grad, c_grad, up_grad, after_grads = torch.ops.mmvil.after_cell_backward(
        y_grad=gated_grad, h=h, a=a, z=z, **_after_cell_parameters(w, settings)
    )
    down_weight_grad = _weight_grad(y_grad, gated)
    out_norm_weight_grad, out_norm_bias_grad, skip_grad = after_grads.unbind(0)
    del gated_grad, gated

    # The cell, and what is between the up-projection and it.
    q_grad, k_grad, v_grad, igate_grad, fgate_grad = torch.ops.mmvil.mlstm_backward(
        h_grad, q, k, v, igate, fgate, h, normalizer, reverse, *settings.form
    )
    del h_grad, q, k, v
    x_m_grad = up_grad.chunk(2, dim=-1)[0]  # written by the operator
    before_grads = torch.ops.mmvil.before_cell_backward(
        q_grad=q_grad,
        k_grad=k_grad,
        v_grad=v_grad,
        igate_grad=igate_grad,
        fgate_grad=fgate_grad,
        c_grad=c_grad,
        a=a,
        x=x_m,
        weights=weights,
        grid=grid,
        reverse=reverse,
        x_grad=x_m_grad,
    )
    before_grads = split_gradients(*before_grads, BeforeCellWeights(*weights))
    del q_grad, k_grad, v_grad, c_grad, a

    # Up-projection and norm.
    x_norm, mean, rstd = _normalize(x, w, settings)
    up_weight_grad = _weight_grad(up_grad, x_norm)
    up_bias_grad = None if w.up_bias is None else _over_tokens(up_grad)
    x_norm_grad = torch.matmul(up_grad, _to(w.up_weight, settings))
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
    return x_grad, LayerWeights(
        norm_weight=norm_weight_grad,
        norm_bias=norm_bias_grad,
        up_weight=up_weight_grad,
        up_bias=up_bias_grad,
        **before_grads._asdict(),
        out_norm_weight=out_norm_weight_grad,
        out_norm_bias=None if w.out_norm_bias is None else out_norm_bias_grad,
        skip=skip_grad,
        down_weight=down_weight_grad,
        down_bias=down_bias_grad,
    )


def _before_cell_weights(w: LayerWeights) -> List[Optional[Tensor]]:
    return [getattr(w, name) for name in BeforeCellWeights._fields]


def _after_cell_parameters(w: LayerWeights, settings: LayerSettings) -> Dict[str, Any]:
    return dict(
        weight=w.out_norm_weight, bias=w.out_norm_bias, skip=w.skip, eps=settings.out_norm_eps
    )


# ------------------------------------------------------------------------------------------------
# Registration with torch. The backward functions are operators too, not formulas of autograd: the
# lean layer calls them itself.

_library = torch.library.Library('mmvil', 'FRAGMENT')
_library.define(
    'before_cell(Tensor x, Tensor?[] weights, SymInt[] grid, SymInt heads, bool reverse,'
    ' bool with_gates) -> (Tensor a, Tensor q, Tensor k, Tensor v, Tensor gates)'
)
_library.define(
    'before_cell_backward(Tensor q_grad, Tensor k_grad, Tensor v_grad, Tensor igate_grad,'
    ' Tensor fgate_grad, Tensor c_grad, Tensor a, Tensor x, Tensor?[] weights, SymInt[] grid,'
    ' bool reverse, Tensor(a!) x_grad) -> (Tensor conv_grads, Tensor other_grads)'
)
_library.define(
    'after_cell(Tensor h, Tensor a, Tensor z, Tensor weight, Tensor? bias, Tensor skip, float eps)'
    ' -> Tensor y'
)
_library.define(
    'after_cell_backward(Tensor y_grad, Tensor h, Tensor a, Tensor z, Tensor weight, Tensor? bias,'
    ' Tensor skip, float eps) -> (Tensor y, Tensor h_grad, Tensor c_grad, Tensor up_grad,'
    ' Tensor parameter_grads)'
)


def _before_cell(x, weights, grid, heads, reverse, with_gates):
    return before_cell(x, BeforeCellWeights(*weights), grid, heads, reverse, with_gates)


def _before_cell_fake(x, weights, grid, heads, reverse, with_gates):
    batch, length, channels = x.shape
    a = x.new_empty(x.shape)
    q, k, v = (
        x.new_empty(batch, length, heads, channels // heads).transpose(1, 2) for _ in range(3)
    )
    shape = (2, batch, heads, length) if with_gates else (0,)
    return a, q, k, v, x.new_empty(shape, dtype=torch.float32)


def _before_cell_backward(*args):
    *tensors, weights, grid, reverse, x_grad = args
    return before_cell_backward(*tensors, BeforeCellWeights(*weights), grid, reverse, x_grad)


def _before_cell_backward_fake(*args):
    *tensors, weights, _, _, _ = args
    sizes = gradient_sizes(BeforeCellWeights(*weights))
    return tuple(tensors[-1].new_empty(size, dtype=torch.float32) for size in sizes)


def _after_cell_fake(h, a, z, *_):
    return z.new_empty(z.shape)


def _after_cell_backward_fake(y_grad, h, a, z, *_):
    batch, heads, length, head_width = h.shape
    h_grad = z.new_empty(batch, length, heads, head_width).transpose(1, 2)
    channels = heads * head_width
    return (
        z.new_empty(z.shape),
        h_grad,
        z.new_empty(z.shape),
        z.new_empty(batch, length, 2 * channels),
        z.new_empty(3, channels, dtype=torch.float32),
    )


for _name, _function, _fake in (
    ('before_cell', _before_cell, _before_cell_fake),
    ('before_cell_backward', _before_cell_backward, _before_cell_backward_fake),
    ('after_cell', after_cell, _after_cell_fake),
    ('after_cell_backward', after_cell_backward, _after_cell_backward_fake),
):
    _library.impl(_name, _function, 'CompositeExplicitAutograd')
    _library.impl(_name, _fake, 'Meta')
