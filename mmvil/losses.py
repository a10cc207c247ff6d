# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Cross entropy that does not depend on how a batch is distributed over processes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class GlobalBatchCrossEntropyLoss(nn.Module):
    """Cross entropy, averaged over the labelled pixels of all processes.

    Data-parallel training averages gradients over processes. mmsegmentation's
    ``CrossEntropyLoss(avg_non_ignore=True)`` divides by the labelled pixels of each process, so a
    pixel weighs more in a process with fewer of them. This loss divides by the mean number of
    labelled pixels per process, so the averaged gradient is that of the mean over all labelled
    pixels. With a single process both losses are equal.

    The value in each process depends on its share of the labelled pixels;
    :class:`mmvil.engine.AverageLogHook` logs the mean, which is the loss of the whole batch. With
    gradient accumulation, each iteration is averaged separately.

    Args:
        class_weight (Sequence[float], optional): Weight of each class, applied to both sum and
            divisor. Default: None.
        loss_weight (float): Default: 1.
        loss_name (str): Name in the log; it must start with 'loss' to be trained on. Default:
            'loss_ce'.
    """

    def __init__(
        self,
        class_weight: Sequence[float] | None = None,
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
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        """Compute the loss, called with the arguments of mmsegmentation's heads.

        Args:
            cls_score (Tensor): Logits, shape (B, K, H, W).
            label (Tensor): Class indices, shape (B, H, W).
            weight (Tensor, optional): Weight of each pixel, shape (B, H, W), from pixel samplers.
            avg_factor (float, optional): Divisor instead of the number of labelled pixels.
            reduction_override (str, optional): 'none' for the loss of each pixel, (B, H, W), or
                'sum'.
            ignore_index (int): Label of pixels to ignore.
        """
        # The sum over an image's pixels exceeds float16's range.
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
            labelled = label != ignore_index
            if class_weight is None:
                avg_factor = labelled.sum(dtype=torch.float32)  # a tensor: no synchronization
            else:
                avg_factor = class_weight.float()[label[labelled]].sum()
            all_reduce(avg_factor, op='mean')
            avg_factor.clamp_(min=torch.finfo(avg_factor.dtype).tiny)  # so that 0 / 0 gives 0
        return total / avg_factor

    def extra_repr(self) -> str:
        return f'loss_weight={self.loss_weight:g}, class_weight={self.class_weight}'
