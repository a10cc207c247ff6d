# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The blocks of a model, one after the other."""

from collections.abc import Container

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class BlockStack(nn.ModuleList):
    """Blocks (:class:`ViLBlock`) to run in order.

    Their cost is that of the model, and they use no data but tokens: ``compile()`` makes one graph
    of them all, which other parts of a training step do not interrupt.
    """

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        out_indices: Container[int],
        with_cp: bool = False,
    ) -> list[Tensor]:
        """Run the blocks.

        Args:
            x (Tensor): Tokens in row-major order, shape (B, N, D).
            grid (tuple[int, int]): Rows and columns of the token grid, N in all.
            out_indices (Container[int]): Blocks whose output is returned.
            with_cp (bool): Save only the inputs of blocks for backward. Default: False.

        Returns:
            list[Tensor]: Outputs, each (B, N, D).
        """
        with_cp = with_cp and torch.is_grad_enabled() and not torch.jit.is_tracing()
        outputs = []
        for index, block in enumerate(self):
            x = checkpoint(block, x, grid, use_reentrant=False) if with_cp else block(x, grid)
            if index in out_indices:
                outputs.append(x)
        return outputs
