# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The ViL block: x + layer(norm(x)), read in one direction."""

import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import mlstm
from ..ops.compat import autocast_dtype, without_autocast
from ..ops.lean_layer import LayerSettings, LayerWeights, lean_layer
from ..ops.mlstm import BACKENDS, choose_form
from ..ops.projections import fold_gates, gate_preactivations
from .drop_path import DropPath
from .projections import HeadwiseLinear, TokenConv


class ViLBlock(nn.Module):
    """Pre-norm residual mLSTM block (ViL, arXiv 2406.04303, section 3 and figure 2).

    Args:
        embed_dims (int): D, a multiple of 2 * num_heads; the block works E = 2D wide inside.
        num_heads (int): NH. Default: 4.
        reverse (bool): Read the tokens from last to first. Default: False.
        version (int): 2 (3x3 convolution over the grid, biases) or 1 (causal convolution, no
            biases). Default: 2.
        drop_path_rate (float): Default: 0.
        backend (str): Form of the mLSTM, see :func:`mmvil.ops.mlstm`. Default: 'auto'.
        chunk_size (int, optional): See :func:`mmvil.ops.mlstm`.
        lean (bool): Keep about 7 D values per token for backward and compute the rest again,
            instead of everything. Equal results. False is for second derivatives up to the cell, or
            where memory is plentiful. Default: True.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int = 4,
        reverse: bool = False,
        version: int = 2,
        drop_path_rate: float = 0.0,
        backend: str = 'auto',
        chunk_size: Optional[int] = None,
        lean: bool = True,
    ) -> None:
        super().__init__()
        if embed_dims % (2 * num_heads):
            raise ValueError(
                f'embed_dims must be a multiple of 2 * num_heads = {2 * num_heads}, so that heads '
                'consist of '
                f'blocks of 4 channels, but is {embed_dims}.'
            )
        if backend not in BACKENDS:
            raise ValueError(f'Unknown mLSTM backend {backend!r}; choose from {BACKENDS}.')
        inner = 2 * embed_dims
        bias = version == 2
        self.num_heads = num_heads
        self.reverse = reverse
        self.backend = backend
        self.chunk_size = chunk_size
        self.lean = lean

        self.norm = without_bias(nn.LayerNorm(embed_dims), not bias)
        self.proj_up = nn.Linear(embed_dims, 2 * inner, bias=bias)
        self.conv = TokenConv(inner, causal=version == 1)
        self.q_proj = HeadwiseLinear(inner, num_heads, bias=bias)
        self.k_proj = HeadwiseLinear(inner, num_heads, bias=bias)
        self.v_proj = HeadwiseLinear(inner, num_heads, bias=bias)
        self.igate = nn.Linear(3 * inner, num_heads)
        self.fgate = nn.Linear(3 * inner, num_heads)
        self.out_norm = without_bias(nn.GroupNorm(num_heads, inner), not bias)
        self.skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, embed_dims, bias=bias)
        self.drop_path = DropPath(drop_path_rate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as the released models were (section 1 of the model's published
        configuration).

        The down-projection's deviation is Wang's 2 / (L sqrt(D)) with L = 1.
        """
        embed_dims = self.proj_up.in_features
        small = math.sqrt(2 / (5 * embed_dims))
        for module in (self.proj_up, self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(module.weight, std=small)
        nn.init.normal_(self.proj_down.weight, std=2 / math.sqrt(embed_dims))
        for module in (self.proj_up, self.q_proj, self.k_proj, self.v_proj, self.proj_down):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.igate.weight)
        nn.init.zeros_(self.fgate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        with torch.no_grad():  # heads that forget at different speeds
            self.fgate.bias.copy_(torch.linspace(3, 6, self.num_heads))

    def forward(self, x: Tensor, grid: Tuple[int, int]) -> Tensor:
        """Read the tokens once.

        Args:
            x (Tensor): Tokens in row-major order, shape (B, N, D).
            grid (tuple[int, int]): Rows and columns of the token grid, N in all.

        Returns:
            Tensor: Shape (B, N, D).
        """
        layer = self._lean_layer if self.lean and self.backend != 'reference' else self._layer
        return self.drop_path(x, lambda tokens: layer(tokens, grid))

    def _layer(self, x: Tensor, grid: Tuple[int, int]) -> Tensor:
        """The layer as one reads it in the paper; autograd keeps what it needs."""
        x_m, z = self.proj_up(self.norm(x)).chunk(2, dim=-1)
        c = F.silu(self.conv(x_m, grid, self.reverse))
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(x_m)  # (B, NH, N, DH)
        igate, fgate = self._gates(c, x_m)
        h = mlstm(
            q,
            k,
            v,
            igate=igate,
            fgate=fgate,
            reverse=self.reverse,
            backend=self.backend,
            chunk_size=self.chunk_size,
        )
        h = h.transpose(1, 2).flatten(2)  # (B, N, E)
        h = self.out_norm(h.flatten(0, 1)).view(h.shape)
        return self.proj_down((h + self.skip * c) * F.silu(z))

    def _gates(self, c: Tensor, x_m: Tensor) -> Tuple[Tensor, Tensor]:
        """Linear maps of [q, k, v] to one scalar per head and token (B, NH, N), without
        concatenating.
        """
        with without_autocast(x_m):  # gates are never computed in half precision
            dtype = torch.promote_types(c.dtype, torch.float32)
            projections = (self.q_proj, self.k_proj, self.v_proj)
            biases = [projection.bias for projection in projections]
            weights = fold_gates(
                torch.cat([self.igate.weight, self.fgate.weight]).to(dtype),
                torch.cat([self.igate.bias, self.fgate.bias]).to(dtype),
                torch.stack([projection.weight for projection in projections]).to(dtype),
                None if biases[0] is None else torch.stack(biases).to(dtype),
            )
            return gate_preactivations(c, x_m, weights)

    def _lean_layer(self, x: Tensor, grid: Tuple[int, int]) -> Tensor:
        """The same in one function with a small backward state."""
        weights = LayerWeights(
            self.norm.weight,
            self.norm.bias,
            self.proj_up.weight,
            self.proj_up.bias,
            self.conv.weight,
            self.conv.bias,
            self.q_proj.weight,
            self.q_proj.bias,
            self.k_proj.weight,
            self.k_proj.bias,
            self.v_proj.weight,
            self.v_proj.bias,
            self.igate.weight,
            self.igate.bias,
            self.fgate.weight,
            self.fgate.bias,
            self.out_norm.weight,
            self.out_norm.bias,
            self.skip,
            self.proj_down.weight,
            self.proj_down.bias,
        )
        head_width = len(self.skip) // self.num_heads
        dtype = autocast_dtype(x)
        settings = LayerSettings(
            grid=grid,
            heads=self.num_heads,
            reverse=self.reverse,
            form=choose_form(
                x.device, dtype, x.shape[1], head_width, self.backend, self.chunk_size
            ),
            norm_eps=self.norm.eps,
            out_norm_eps=self.out_norm.eps,
            dtype=dtype,
        )
        return lean_layer(x, weights, settings)


def without_bias(norm: nn.Module, remove: bool = True) -> nn.Module:
    """Take the bias out of a norm (the arguments of torch's own norms differ between versions)."""
    if remove:
        norm.register_parameter('bias', None)
    return norm
