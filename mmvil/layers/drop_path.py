# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Stochastic depth that skips the computation of dropped samples."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.compat import is_compiling, is_tracing, is_transforming
from ..ops.vil_layer_common import add_branch


class DropPath(nn.Module):
    """Residual connection whose branch is dropped per sample (Huang et al., Deep Networks with
    Stochastic Depth, 2016).

    The branch runs on the kept samples only. Samples are dropped independently with probability
    ``drop_prob`` whatever the batch size, so the expected output does not depend on how a batch is
    distributed over devices.

    Args:
        drop_prob (float): Probability in [0, 1) that a sample skips the branch. Default: 0.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f'drop_prob must be in [0, 1), but is {drop_prob}.')
        self.drop_prob = drop_prob

    def forward(
        self,
        x: Tensor,
        branch: Callable[[Tensor], Tensor],
        residual_branch: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Add the branch to x.

        Args:
            x (Tensor): Shape (B, N, C).
            branch (Callable): Maps (b, N, C) to (b, N, C) for any b, sample by sample.
            residual_branch (Callable, optional): Faster way to add the branch: maps x, a factor
                for the branch (default: 1) and indices of kept samples (default: None, for all) to
                the result.

        Returns:
            Tensor: Shape (B, N, C).
        """
        if residual_branch is None:

            def residual_branch(x, scale=1.0, samples=None):
                part = x if samples is None else x.index_select(0, samples)
                return add_branch(x, branch(part), scale, samples)

        if self.drop_prob == 0 or not self.training:
            return residual_branch(x)
        keep_prob = 1 - self.drop_prob
        if is_compiling() or is_tracing() or is_transforming():  # these need fixed shapes
            return x + branch(x) * (x.new_empty(x.shape[0], 1, 1).bernoulli_(keep_prob) / keep_prob)
        # Drawn on the CPU, which needs the number of kept samples, to avoid a GPU synchronization.
        kept = torch.rand(x.shape[0]).lt(keep_prob).nonzero().squeeze(1)
        if len(kept) == 0:
            # Distributed data parallel expects gradients of the branch's parameters.
            return x + branch(x) * 0
        kept = None if len(kept) == x.shape[0] else kept.to(x.device, non_blocking=True)
        return residual_branch(x, 1 / keep_prob, kept)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:g}'
