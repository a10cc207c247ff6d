# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The ViL layer as one differentiable function that saves little for its backward pass.

Autograd over the individual operations saves about 30D values per token. This function saves the
layer's input (D), both halves of the up-projection (2D each), the cell's output (2D) and a few
scalars, about 7D in total. Norm, convolution, SiLU, q, k, v and the gated product are cheap next to
the matrix products and are recomputed; with ``save_cell_inputs``, q, k, v and the convolution's
output are saved, too (2D each, 15D in total).

The equations are those of :class:`mmvil.layers.ViLBlock`, in the same order.
"""

import torch
from torch import Tensor

from . import vil_layer_eager
from .compat import is_batched, is_compiling, is_exporting, without_autocast
from .mlstm import reject_double_backward
from .vil_layer_common import LayerSettings, LayerWeights, add_branch, cast


def vil_layer(
    x: Tensor, weights: LayerWeights, settings: LayerSettings, samples: Tensor | None = None
) -> Tensor:
    """Norm, up-projection, convolution, mLSTM, gated product and down-projection (ViL, arXiv
    2406.04303, figure 2).

    Args:
        x (Tensor): Tokens, shape (B, N, D).
        weights (LayerWeights): Parameters.
        settings (LayerSettings): Token grid, direction, dtype, residual connection.
        samples (Tensor, optional): Indices of samples, each at most once. The layer is computed for
            these, and the others keep their values. Needs the residual connection. Default: None,
            for all.

    Returns:
        Tensor: Shape (B, N, D), in ``settings.dtype`` or, with the residual connection, that dtype
            promoted with the input's. First derivatives only.
    """
    if not is_exporting() and (torch.is_grad_enabled() or is_compiling()):
        return _ViLLayer.apply(settings, samples, x, *weights)
    return _forward(x, weights, settings, samples)[0]


class _ViLLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, samples, x, *weights):
        y, saved = _forward(x, LayerWeights(*weights), settings, samples)
        ctx.settings, ctx.samples = settings, samples
        ctx.save_for_backward(*saved, *weights)
        return y

    @staticmethod
    def backward(ctx, y_grad):
        if not is_compiling():
            if torch.is_grad_enabled():
                reject_double_backward()
            if is_batched(y_grad):
                raise NotImplementedError(
                    'The fused layer has no batched gradients (is_grads_batched=True, '
                    'vectorize=True). Use lean=False, which stores more.'
                )
        tensors, count = ctx.saved_tensors, len(LayerWeights._fields)  # read once: checkpointing
        x, saved, weights = tensors[0], tensors[:-count], LayerWeights(*tensors[-count:])
        implementation, samples = _implementation(ctx.settings), ctx.samples
        part_grad = y_grad if samples is None else y_grad.index_select(0, samples)
        with without_autocast(x):
            x_grad, grads = implementation.gradients(part_grad, saved, weights, ctx.settings)
        _, _, x_needed, *needed = ctx.needs_input_grad
        x_grad = cast(x_grad, x.dtype) if x_needed else None
        if x_needed and samples is not None:
            x_grad = y_grad.index_copy(0, samples, x_grad)
        grads = (cast(g, w.dtype) if need else None for g, w, need in zip(grads, weights, needed))
        return None, None, x_grad, *grads


def _forward(
    x: Tensor, w: LayerWeights, settings: LayerSettings, samples: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute the output, and the tensors to save for backward, of which the input is the first."""
    part, scale = x if samples is None else x.index_select(0, samples), settings.residual_scale
    with without_autocast(x):  # dtypes are explicit here
        y, saved = _implementation(settings).forward(part, w, settings)
    if scale is not None:
        y = add_branch(x, y, scale, samples)
    return y, (part, *saved)


def _implementation(settings: LayerSettings):
    """The module with ``forward`` and ``gradients`` of the layer."""
    if settings.form.triton:
        from .triton import fused_layer

        return fused_layer
    return vil_layer_eager
