# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Tracers, transforms, precision and autocast, for torch 2.1 and later."""

import warnings
from contextlib import nullcontext

import torch
from torch import Tensor


def is_compiling() -> bool:
    """Whether torch.compile or torch.export is tracing."""
    if hasattr(torch.compiler, 'is_compiling'):  # torch >= 2.3
        return torch.compiler.is_compiling()
    return torch._utils.is_compiling()


def is_exporting() -> bool:
    """Whether torch.export is tracing one graph for all image sizes."""
    # Up to torch 2.9 at least, torch.compile takes torch.compiler.is_exporting() to be true.
    return getattr(torch.compiler, '_is_exporting_flag', False)  # torch >= 2.7


def is_tracing() -> bool:
    """Whether torch.jit.trace, or an exporter or FLOP counter on top of it, is recording."""
    return torch.jit.is_tracing()


def is_transforming() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is active."""
    return torch._C._are_functorch_transforms_active()


def is_batched(x: Tensor) -> bool:
    """Whether x is a batch under vmap, which autograd uses for several gradients at once."""
    return 'Batched' in str(torch._C._dispatch_keys(x))


def has_global_module_hooks() -> bool:
    """Whether hooks on all modules are registered, as by torch's FLOP counter."""
    module = torch.nn.modules.module
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )


def static_shape(x: Tensor) -> tuple[int, ...]:
    """Sizes of x as integers, even where torch.jit.trace would record them as operations."""
    if not is_tracing():
        return tuple(x.shape)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        return tuple(map(int, x.shape))


def tf32_is_allowed() -> bool:
    """Whether CUDA may round the operands of float32 matrix products to TF32."""
    matmul = torch.backends.cuda.matmul
    # torch >= 2.9, where reading the old name may raise; before, the module raises at new names
    if hasattr(torch.backends, 'fp32_precision'):
        return matmul.fp32_precision == 'tf32'
    return matmul.allow_tf32


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of x are computed, autocast included."""
    if x.dtype == torch.float64 or x.device.type == 'meta':
        return x.dtype
    device = x.device.type
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if device == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else x.dtype
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else x.dtype


def without_autocast(x: Tensor):
    """Context without autocast on the device of x, for code with explicit dtypes."""
    device = x.device.type
    return nullcontext() if device == 'meta' else torch.autocast(device, enabled=False)
