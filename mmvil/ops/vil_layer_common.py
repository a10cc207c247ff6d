# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Parameters and settings of the ViL layer, and functions for its PyTorch and Triton forms."""

from typing import NamedTuple

import torch
from torch import Tensor

from .mlstm import Form


class LayerWeights(NamedTuple):
    """Parameters of a ViL layer, with outer width D, inner width E and NH heads. Biases may be
    None.
    """

    norm_weight: Tensor  # (D, )
    norm_bias: Tensor | None
    up_weight: Tensor  # (2E, D)
    up_bias: Tensor | None
    conv_weight: Tensor  # (E, 1, 3, 3) or (E, 1, K)
    conv_bias: Tensor | None
    q_weight: Tensor  # (E / 4, 4, 4)
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    igate_weight: Tensor  # (NH, 3E)
    igate_bias: Tensor
    fgate_weight: Tensor  # (NH, 3E)
    fgate_bias: Tensor
    out_norm_weight: Tensor  # (E, )
    out_norm_bias: Tensor | None
    skip: Tensor  # (E, )
    down_weight: Tensor  # (D, E)
    down_bias: Tensor | None


class LayerSettings(NamedTuple):
    """Constants of one call of a layer."""

    grid: tuple[int, int]
    heads: int
    reverse: bool
    form: Form
    norm_eps: float
    out_norm_eps: float
    dtype: torch.dtype
    """Dtype of features and matrix products; gates and statistics are at least float32."""
    save_cell_inputs: bool = False
    """Keep q, k, v and the convolution's output for backward."""
    residual_scale: float | None = None
    """Return the input plus this number times the layer's output, unless it is None."""


def cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a parameter to a dtype; None stays None."""
    if parameter is None or parameter.dtype == dtype:
        return parameter
    return parameter.to(dtype)


def add_branch(
    x: Tensor, branch: Tensor, scale: float = 1.0, samples: Tensor | None = None
) -> Tensor:
    """Compute x (B, N, C) plus ``scale`` times a residual branch, (B, N, C) or of the ``samples``
    with these indices alone.
    """
    if samples is not None:
        return x.index_add(0, samples, branch.to(x.dtype), alpha=scale)
    return x + branch if scale == 1 else x.add(branch, alpha=scale)


def sum_tokens(x: Tensor) -> Tensor:
    """Sum (B, N, C) to (C, ), at least in float32: sums over many tokens exceed float16's range."""
    return x.sum((0, 1), dtype=torch.promote_types(x.dtype, torch.float32))


def linear_weight_grad(y_grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weight (out, in), as in :func:`linear_parameter_grads`."""
    return torch.matmul(y_grad.flatten(0, 1).t(), x.flatten(0, 1))


def linear_parameter_grads(
    y_grad: Tensor, x: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight (out, in) and bias (out, ) of a linear map from those of its output (B,
    N, out) and its input (B, N, in).
    """
    return linear_weight_grad(y_grad, x), None if bias is None else sum_tokens(y_grad)
