# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What makes training on several processes equal training on one with the whole batch.

Data parallel training averages the gradients of the processes. That equals the gradient of the
whole batch if the loss is a mean over equal numbers of things, and if nothing is computed from a
process's own share alone. A segmentor breaks both: processes hold different numbers of labelled
pixels, and batch norm takes its statistics from what it sees.
"""

from typing import Dict, Optional, Sequence

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from torch import Tensor, nn


@MODELS.register_module()
class GlobalBatchCrossEntropyLoss(nn.Module):
    """Cross entropy, averaged over the labelled pixels of all processes.

    mmsegmentation's ``CrossEntropyLoss(avg_non_ignore=True)`` divides by the process's own labelled
    pixels. The mean of such means gives a pixel more weight the fewer labelled ones it has beside
    it, the more so the smaller the batch of a process. Here a process's sum is divided by the mean
    number of labelled pixels per process, so that the averaged gradient is that of

        sum of the losses of all labelled pixels / number of all labelled pixels.

    On one process both losses are equal. A process's own value depends on its share of the labelled
    pixels; :class:`AverageLogHook` logs the mean, which is the loss of the whole batch.

    Gradients accumulated over several iterations are averaged iteration by iteration, because the
    number of labelled pixels to come is not known.

    Args:
        class_weight (Sequence[float], optional): Weight of each class. Pixels then count with the
            weight of their class, in sum and divisor. Default: None.
        loss_weight (float): Default: 1.
        loss_name (str): Name in the log; what begins with 'loss' is trained on. Default: 'loss_ce'.
    """

    def __init__(
        self,
        class_weight: Optional[Sequence[float]] = None,
        loss_weight: float = 1.0,
        loss_name: str = 'loss_ce',
    ) -> None:
        super().__init__()
        self.class_weight = class_weight
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[float] = None,
        reduction_override: Optional[str] = None,
        ignore_index: int = -100,
    ) -> Tensor:
        """Compute the loss, with the arguments that mmsegmentation's heads give.

        Args:
            cls_score (Tensor): Logits, shape (B, K, H, W).
            label (Tensor): Classes, shape (B, H, W).
            weight (Tensor, optional): Of each pixel, shape (B, H, W), as pixel samplers give it.
            avg_factor (float, optional): Divisor of the sum of the losses, instead of the number
                of labelled pixels.
            reduction_override (str, optional): 'none' for the losses of the pixels, (B, H, W);
                'sum' for their sum.
            ignore_index (int): Label of pixels that do not count.

        Returns:
            Tensor: A scalar; (B, H, W) with ``reduction_override='none'``.
        """
        # The sum over an image's pixels leaves float16's range.
        cls_score = cls_score.to(torch.promote_types(cls_score.dtype, torch.float32))
        class_weight = self.class_weight and cls_score.new_tensor(self.class_weight)
        losses = F.cross_entropy(
            cls_score, label, weight=class_weight, ignore_index=ignore_index, reduction='none'
        )
        if weight is not None:
            losses = losses * weight
        if reduction_override == 'none':
            return self.loss_weight * losses
        total = self.loss_weight * losses.sum()
        if reduction_override == 'sum':
            return total
        if avg_factor is None:
            avg_factor = _mean_over_processes(_labelled(label, ignore_index, class_weight))
        return total / avg_factor

    def extra_repr(self) -> str:
        return f'loss_weight={self.loss_weight:g}, class_weight={self.class_weight}'


def _labelled(label: Tensor, ignore_index: int, class_weight: Optional[Tensor]) -> Tensor:
    """Number of labelled pixels, or the sum of the weights of their classes. A tensor, because a
    number would make the CPU wait for the GPU.
    """
    labelled = label != ignore_index
    if class_weight is None:
        return labelled.sum(dtype=torch.float32)
    return class_weight.float()[label[labelled]].sum()


def _mean_over_processes(count: Tensor) -> Tensor:
    """Mean of a positive scalar; where there is nothing to average, a divisor that leaves 0."""
    all_reduce(count, op='mean')
    return count.clamp_(min=torch.finfo(count.dtype).tiny)


@HOOKS.register_module()
class AverageLogHook(Hook):
    """Log losses and accuracies as means over all processes.

    mmengine logs those of the first process, a part of the batch. With this hook the training log
    of any number of processes shows what one process with the whole batch would show.
    """

    priority = 'HIGHEST'  # before the log takes the numbers

    def after_train_iter(
        self, runner, batch_idx: int, data_batch=None, outputs: Optional[Dict[str, Tensor]] = None
    ) -> None:
        """Replace what the model returned for the log."""
        if not outputs or get_world_size() == 1:
            return
        means = torch.stack([value.detach().float().mean() for value in outputs.values()])
        all_reduce(means, op='mean')
        outputs.update(zip(outputs, means))


@MODELS.register_module()
class CPUSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes, on CPUs.

    torch's ``SyncBatchNorm`` is for GPUs only. This one does the same with plain, differentiable
    operations, so that training with several CPU processes is exact, too. On one process it is
    ``BatchNorm2d``. The tools put it in the place of SyncBN where there is no GPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, shape (B, C, H, W)."""
        if not self.training or get_world_size() == 1:
            return super().forward(x)
        channels = x.shape[1]
        numel = x.new_tensor([x.numel() // channels])
        sums = _SumOverProcesses.apply(torch.cat([x.sum((0, 2, 3)), numel]))
        count = sums[-1].detach()
        mean = (sums[:-1] / count).view(1, channels, 1, 1)
        centred = x - mean  # a second round, because E[x²] - E[x]² loses digits
        var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        self._update_running(mean.detach().flatten(), var.detach() * count / (count - 1))

        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        y = centred * scale.view(1, channels, 1, 1)
        return y + self.bias.view(1, channels, 1, 1) if self.affine else y

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var, momentum)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduced gradient: each input is in all the sums."""

    @staticmethod
    def forward(ctx, x):
        return _sum(x)

    @staticmethod
    def backward(ctx, grad):
        return _sum(grad)


def _sum(x: Tensor) -> Tensor:
    x = x.clone()
    all_reduce(x)
    return x


def wrap_classes(
    module: nn.Module, recurse: bool, nonwrapped_numel: int, names: Sequence[str]
) -> bool:
    """Policy of FSDP that makes a unit of every module whose class has one of the names.

    Units must be called as a whole. A ViLBlock is; its parts are not, because the block reads their
    weights itself.
    """
    return recurse or type(module).__name__ in names
