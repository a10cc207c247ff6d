# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Mixed precision without a GPU, for checking the numbers of a recipe before it meets one."""

from contextlib import contextmanager

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's ``AmpOptimWrapper`` for the CPU, which that one refuses.

    Autocast and loss scaling are PyTorch's own, the same as on a GPU; the kernels are the CPU's,
    and slower than in float32. So this tells whether training in half precision overflows, not how
    fast it is.

    Args:
        dtype (str): 'float16', with dynamic loss scaling, or 'bfloat16', without. Default:
            'float16'.
        loss_scale (str | float): First scale of the loss in float16. Default: 'dynamic', which is
            65536, as on a GPU.
        **kwargs: See :class:`mmengine.optim.OptimWrapper`.

    Raises:
        ValueError: For another ``dtype``, or float16 with a PyTorch that has no loss scaling for
            the CPU (before 2.3).
    """

    def __init__(self, dtype: str = 'float16', loss_scale='dynamic', **kwargs) -> None:
        if dtype not in ('float16', 'bfloat16'):
            raise ValueError(f"dtype must be 'float16' or 'bfloat16', but is {dtype!r}.")
        scaled = dtype == 'float16'
        if scaled and not hasattr(torch.amp, 'GradScaler'):
            raise ValueError(
                f'PyTorch {torch.__version__} has no float16 training on the CPU; use bfloat16, or '
                'PyTorch 2.3 or later.'
            )
        OptimWrapper.__init__(self, **kwargs)  # the parent's would look for a GPU
        self.cast_dtype = getattr(torch, dtype)
        self._scale_update_param = None
        if hasattr(torch.amp, 'GradScaler'):
            loss_scale = 2.0**16 if loss_scale == 'dynamic' else float(loss_scale)
            self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=loss_scale, enabled=scaled)
        else:
            self.loss_scaler = torch.cuda.amp.GradScaler(enabled=False)

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Forward in half precision."""
        with OptimWrapper.optim_context(self, model), torch.autocast('cpu', self.cast_dtype):
            yield
