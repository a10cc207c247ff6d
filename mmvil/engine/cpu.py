# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Training without a GPU: mixed precision, synchronized batch norm, memory, config."""

import ctypes
import os
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import all_reduce, get_world_size
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import MODELS, OPTIM_WRAPPERS
from torch import Tensor, nn

from .config_nodes import dicts, loaders, type_name, use_float32

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's ``AmpOptimWrapper`` for CPUs, which the original rejects.

    Autocast and loss scaling are PyTorch's, as on a GPU, but slower than float32. Use it to check
    for overflows in half precision, not for speed.

    Args:
        dtype (str): 'float16' with dynamic loss scaling, or 'bfloat16' without. Default: 'float16'.
        loss_scale (str | float): Initial loss scale for float16. Default: 'dynamic', that is,
            65536, as on a GPU.
        **kwargs: See :class:`mmengine.optim.OptimWrapper`.

    Raises:
        ValueError: For another ``dtype``, or float16 with PyTorch before 2.3, which has no loss
            scaling on CPUs.
    """

    def __init__(self, dtype: str = 'float16', loss_scale='dynamic', **kwargs) -> None:
        if dtype not in ('float16', 'bfloat16'):
            raise ValueError(f"dtype must be 'float16' or 'bfloat16', but is {dtype!r}.")
        OptimWrapper.__init__(self, **kwargs)  # the parent's needs a GPU
        self.cast_dtype = getattr(torch, dtype)
        self._scale_update_param = None
        if hasattr(torch.amp, 'GradScaler'):
            scale = 2.0**16 if loss_scale == 'dynamic' else float(loss_scale)
            scaled = dtype == 'float16'
            self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=scale, enabled=scaled)
        elif dtype == 'bfloat16':
            self.loss_scaler = torch.cuda.amp.GradScaler(enabled=False)
        else:
            raise ValueError(
                f'PyTorch {torch.__version__} has no float16 training on the CPU; use bfloat16, or '
                'PyTorch 2.3 or later.'
            )

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Run the forward pass in half precision."""
        with OptimWrapper.optim_context(self, model), torch.autocast('cpu', self.cast_dtype):
            yield


@MODELS.register_module()
class CPUSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm synchronized over all processes, for CPUs.

    torch's ``SyncBatchNorm`` requires GPUs; without one, the tools replace it with this.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, shape (B, C, H, W)."""
        if not self.training or get_world_size() == 1:
            return super().forward(x)
        dtype, channels = x.dtype, x.shape[1]
        x = x.to(torch.promote_types(dtype, torch.float32))  # sums exceed float16's range
        numel = x.new_tensor([x.numel() // channels])
        sums = _AllReduceSum.apply(torch.cat([x.sum((0, 2, 3)), numel]))
        count = sums[-1].detach()
        mean = (sums[:-1] / count).view(1, channels, 1, 1)
        centred = x - mean  # a second pass, because E[x²] - E[x]² loses digits
        var = _AllReduceSum.apply(centred.square().sum((0, 2, 3))) / count
        if self.track_running_stats:
            self.num_batches_tracked += 1
            momentum = self.momentum
            if momentum is None:  # a cumulative average
                momentum = 1 / self.num_batches_tracked.item()
            self.running_mean.lerp_(mean.detach().flatten(), momentum)
            self.running_var.lerp_(var.detach() * count / (count - 1), momentum)

        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        y = centred * scale.view(1, channels, 1, 1)
        y = y + self.bias.view(1, channels, 1, 1) if self.affine else y
        return y.to(dtype)


class _AllReduceSum(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced, too, because each input contributes to all sums."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _AllReduceSum.forward(ctx, grad)


def fit_to_cpu(cfg: Config) -> list[str]:
    """Adapt a config in place to a machine without a GPU.

    Returns:
        list[str]: Notes on the changes, for the log; empty on a machine with an accelerator.
    """
    if get_device() != 'cpu':
        return []
    set_malloc_thresholds()
    notes = []
    wrapper = cfg.get('optim_wrapper') or {}
    if type_name(wrapper) == 'AmpOptimWrapper':
        use_float32(wrapper)
        notes.append(
            'no GPU: training in float32, because mixed precision (AmpOptimWrapper) needs one'
        )
    kinds = ('SyncBN', 'MMSyncBN', 'SyncBatchNorm')
    sync_norms = [node for node in dicts(cfg.model) if type_name(node) in kinds]
    for node in sync_norms:
        node.type = 'BN' if cfg.launcher == 'none' else 'mmvil.engine.CPUSyncBatchNorm'
    if sync_norms and cfg.launcher != 'none':
        notes.append('no GPU: CPUSyncBatchNorm replaces SyncBN, which needs GPUs')
    for loader in loaders(cfg):
        loader.pin_memory = False

    if cfg.launcher == 'pytorch':
        # If imported after the process group is created, as by DDP, its functions would hold the
        # group as a default argument, and cli.main.run could not destroy it.
        from torch.distributed.nn import functional  # noqa: F401

        # mmengine would choose a CUDA device first; it does not touch an existing process group.
        torch.distributed.init_process_group('gloo')
        if cfg.get('strategy') is None:
            cfg.model_wrapper_cfg = {
                'type': 'MMDistributedDataParallel',
                'broadcast_buffers': False,
                'find_unused_parameters': cfg.get('find_unused_parameters', False),
                **(cfg.get('model_wrapper_cfg') or {}),
                'device_ids': None,
            }
        elif type_name(cfg.strategy) == 'FSDPStrategy':
            cfg.strategy.model_wrapper.device_id = torch.device('cpu')
        notes.append('no GPU: the processes communicate with gloo')
    elif cfg.launcher != 'none':
        raise ValueError(f'--launcher {cfg.launcher} needs GPUs; on CPUs use tools/dist_train.sh')
    return notes


def set_malloc_thresholds() -> None:
    """Make glibc keep up to 512 MiB of freed memory for the next layer.

    By default it returns blocks of a few megabytes to the system, and the page faults of the next
    ones take a quarter of a small model's time. Settings in the environment take precedence.
    Without glibc, this does nothing.
    """
    if any(name.startswith('MALLOC_') for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the maximum
    mallopt(M_TRIM_THRESHOLD, 512 * 2**20)
