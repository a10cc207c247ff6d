# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The ViL layer with fused kernels: the functions of :mod:`mmvil.ops.vil_layer_eager`. They save
the same tensors for backward, and weights as the kernels read them.

What remains are torch's matrix products, the norm, the cell, and one fused part before and one
after it. Under autocast, including casts of weights and the residual connection, this takes 12
launches besides the cell's in the forward pass and 14 in the backward pass, versus about 48 and 105
in the PyTorch form. Each part is a torch operator, so a compiler sees one node for it.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import is_compiling
from ..layout import split_heads
from ..mlstm import mlstm_backward, mlstm_forward
from ..vil_layer_common import LayerSettings, LayerWeights, cast, linear_weight_grad
from .conv_qkv_gates import BeforeCellWeights, before_cell
from .conv_qkv_gates_backward import before_cell_backward, before_cell_sums, split_gradients
from .layer_norm import layer_norm, layer_norm_backward, layer_norm_sums
from .norm_skip_gate import after_cell, after_cell_backward, after_cell_sums
from .reduction import add_partial_sums, convert_and_sum, token_sums


def forward(
    x: Tensor, w: LayerWeights, settings: LayerSettings
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute the layer like :func:`mmvil.ops.vil_layer_eager.forward`, but not in float64."""
    parts = _parts(x)
    norm = (w.norm_weight, w.norm_bias, settings.norm_eps)
    x_norm = parts.layer_norm(x, *norm, settings.dtype)
    linear = (w.up_weight, w.up_bias, w.down_weight, w.down_bias)
    up_weight, up_bias, down_weight, down_bias = (cast(p, settings.dtype) for p in linear)
    up = F.linear(x_norm, up_weight, up_bias)
    x_m, z = up.chunk(2, dim=-1)
    taps = w.conv_weight.movedim(0, -1).contiguous()
    weights = [*_before_cell_weights(w, taps)]
    a, q, k, v, gates = parts.before_cell(
        x_m, weights, settings.grid, settings.heads, settings.reverse, True
    )
    igate, fgate = gates.unbind(0)
    h, normalizer = parts.mlstm(q, k, v, igate, fgate, settings.reverse, *settings.form)
    cell = (a, q, k, v) if settings.save_cell_inputs else ()
    saved = (up_weight, down_weight, taps, x_m, z, h, igate, fgate, normalizer, *cell)
    del q, k, v
    y = parts.after_cell(h, a, z, *_after_cell_parameters(w, settings))
    return F.linear(y, down_weight, down_bias), saved


def gradients(
    y_grad: Tensor, saved: tuple[Tensor, ...], w: LayerWeights, settings: LayerSettings
) -> tuple[Tensor, LayerWeights]:
    """Compute all gradients like :func:`mmvil.ops.vil_layer_eager.gradients`."""
    x, up_weight, down_weight, taps, x_m, z, h, igate, fgate, normalizer, *cell = saved
    parts = _parts(x)
    grid, heads, reverse = settings.grid, settings.heads, settings.reverse
    weights = [*_before_cell_weights(w, taps)]
    if not cell:
        *cell, _ = parts.before_cell(x_m, weights, grid, heads, reverse, False)
    a, q, k, v = cell

    # Down-projection, and the fused part after the cell.
    scale = settings.residual_scale
    residual_grad = None if scale is None else y_grad
    y_grad, *down_sums = parts.convert_and_sum(y_grad, settings.dtype, scale or 1.0)
    gated_grad = torch.matmul(y_grad, down_weight)  # (B, N, E)
    gated, h_grad, delta, c_grad, up_grad, after_sums = parts.after_cell_backward(
        gated_grad, h, a, z, *_after_cell_parameters(w, settings)
    )
    down_weight_grad = linear_weight_grad(y_grad, gated)
    del gated_grad, gated, y_grad

    # Cell, and the fused part before it.
    q_grad, k_grad, v_grad, igate_grad, fgate_grad = parts.mlstm_backward(
        h_grad, q, k, v, igate, fgate, h, normalizer, reverse, *settings.form, delta
    )
    del h_grad, q, k, v, cell
    before_sums = parts.before_cell_backward(
        q_grad,
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
        x_grad=up_grad.chunk(2, dim=-1)[0],  # written by the operator
    )
    del q_grad, k_grad, v_grad, c_grad, a

    # Up-projection and norm.
    x_norm_grad = torch.matmul(up_grad, up_weight)
    x_norm, x_grad, norm_sums = parts.layer_norm_backward(
        x_norm_grad, x, w.norm_weight, w.norm_bias, settings.norm_eps, residual_grad
    )
    up_weight_grad = linear_weight_grad(up_grad, x_norm)

    # Sums over tokens. Those of both halves of the up-projection's output are side by side.
    partial_sums = [before_sums, after_sums, norm_sums]
    partial_sums += [] if w.down_bias is None else down_sums
    sums = parts.add_partial_sums(partial_sums[0], partial_sums[1:])
    before, after, norm, *down = sums.split([part.shape[1] for part in partial_sums])
    before_grads = split_gradients(before, _before_cell_weights(w, w.conv_weight))
    end, inner = before.shape[0], z.shape[2]
    up_bias_grad = sums[end - inner : end + inner]
    _, out_norm_weight_grad, out_norm_bias_grad, skip_grad = after.view(4, inner)
    norm_weight_grad, norm_bias_grad = norm.view(2, -1)
    return x_grad, LayerWeights(
        norm_weight=norm_weight_grad,
        norm_bias=None if w.norm_bias is None else norm_bias_grad,
        up_weight=up_weight_grad,
        up_bias=None if w.up_bias is None else up_bias_grad,
        **dict(zip(BeforeCellWeights._fields, before_grads)),
        out_norm_weight=out_norm_weight_grad,
        out_norm_bias=None if w.out_norm_bias is None else out_norm_bias_grad,
        skip=skip_grad,
        down_weight=down_weight_grad,
        down_bias=down[0] if down else None,
    )


def _parts(x: Tensor):
    """Functions of the fused parts; torch's operators where these may be traced or counted."""
    observed = is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack()
    return torch.ops.mmvil if observed else _FUNCTIONS


def _before_cell_weights(w: LayerWeights, conv_weight: Tensor) -> BeforeCellWeights:
    """Weights of the part before the cell, with that of the convolution in either layout.

    Without ``_replace``, which compilers before torch 2.9 do not know.
    """
    names = BeforeCellWeights._fields
    return BeforeCellWeights(
        *(conv_weight if name == 'conv_weight' else getattr(w, name) for name in names)
    )


def _after_cell_parameters(w: LayerWeights, settings: LayerSettings) -> tuple[Any, ...]:
    return w.out_norm_weight, w.out_norm_bias, w.skip, settings.out_norm_eps


_FUNCTIONS = SimpleNamespace(
    layer_norm=layer_norm,
    layer_norm_backward=layer_norm_backward,
    before_cell=before_cell,
    before_cell_backward=before_cell_backward,
    mlstm=mlstm_forward,
    mlstm_backward=mlstm_backward,
    after_cell=after_cell,
    after_cell_backward=after_cell_backward,
    convert_and_sum=convert_and_sum,
    add_partial_sums=add_partial_sums,
)
"""The operators' Python functions, which take half as long to call."""


# -- Registration with torch -----------------------------------------------------------------------
# The backward functions are operators too, not formulas of autograd: `gradients` calls them itself.

_library = torch.library.Library('mmvil', 'FRAGMENT')
_library.define(
    'layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor y'
)
_library.define(
    'layer_norm_backward(Tensor y_grad, Tensor x, Tensor weight, Tensor? bias, float eps,'
    ' Tensor? residual_grad=None) -> (Tensor y, Tensor x_grad, Tensor partial_sums)'
)
_library.define(
    'before_cell(Tensor x, Tensor?[] weights, SymInt[] grid, SymInt heads, bool reverse,'
    ' bool with_gates) -> (Tensor a, Tensor q, Tensor k, Tensor v, Tensor gates)'
)
_library.define(
    'before_cell_backward(Tensor q_grad, Tensor k_grad, Tensor v_grad, Tensor igate_grad,'
    ' Tensor fgate_grad, Tensor c_grad, Tensor a, Tensor x, Tensor?[] weights, SymInt[] grid,'
    ' bool reverse, Tensor(a!) x_grad) -> Tensor partial_sums'
)
_library.define(
    'after_cell(Tensor h, Tensor a, Tensor z, Tensor weight, Tensor? bias, Tensor skip, float eps)'
    ' -> Tensor y'
)
_library.define(
    'after_cell_backward(Tensor y_grad, Tensor h, Tensor a, Tensor z, Tensor weight, Tensor? bias,'
    ' Tensor skip, float eps) -> (Tensor y, Tensor h_grad, Tensor delta, Tensor c_grad,'
    ' Tensor up_grad, Tensor partial_sums)'
)
_library.define(
    'convert_and_sum(Tensor x, ScalarType dtype, float scale) -> (Tensor y, Tensor partial_sums)'
)
_library.define('add_partial_sums(Tensor first, Tensor[] others) -> Tensor')


def _layer_norm_fake(x, weight, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _layer_norm_backward_fake(y_grad, x, *_):
    y, x_grad = y_grad.new_empty(x.shape), x.new_empty(x.shape)
    return y, x_grad, layer_norm_sums(x)[1]


def _before_cell_fake(x, weights, grid, heads, reverse, with_gates):
    a, q, k, v = (x.new_empty(x.shape) for _ in range(4))
    q, k, v = (split_heads(y, heads) for y in (q, k, v))
    shape = (2, x.shape[0], heads, x.shape[1]) if with_gates else (0,)
    return a, q, k, v, x.new_empty(shape, dtype=torch.float32)


def _before_cell_backward_fake(*args):
    *_, x, weights, _, _, _ = args
    return before_cell_sums(x, BeforeCellWeights(*weights))[-1]


def _after_cell_fake(h, a, z, *_):
    return z.new_empty(z.shape)


def _after_cell_backward_fake(y_grad, h, a, z, *_):
    y, h_grad, c_grad = (z.new_empty(z.shape) for _ in range(3))
    up_grad = z.new_empty(*z.shape[:2], 2 * z.shape[2])
    delta = h.new_empty(h.shape[:3], dtype=torch.float32)
    sums = after_cell_sums(z, h.shape[1])[1]
    return y, split_heads(h_grad, h.shape[1]), delta, c_grad, up_grad, sums


def _convert_and_sum_fake(x, dtype, scale):
    return x.new_empty(x.shape, dtype=dtype), token_sums(x)[1]


def _add_partial_sums_fake(first, others):
    return first.new_empty(sum(x.shape[1] for x in (first, *others)))


for _function, _fake in (
    (layer_norm, _layer_norm_fake),
    (layer_norm_backward, _layer_norm_backward_fake),
    (before_cell, _before_cell_fake),
    (before_cell_backward, _before_cell_backward_fake),
    (after_cell, _after_cell_fake),
    (after_cell_backward, _after_cell_backward_fake),
    (convert_and_sum, _convert_and_sum_fake),
    (add_partial_sums, _add_partial_sums_fake),
):
    _library.impl(_function.__name__, _function, 'CompositeExplicitAutograd')
    _library.impl(_function.__name__, _fake, 'Meta')
