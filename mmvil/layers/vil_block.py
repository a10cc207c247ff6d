# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The ViL block: x + layer(norm(x)) in one reading direction."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call

from ..ops import mlstm
from ..ops.compat import (
    autocast_dtype,
    has_global_module_hooks,
    is_compiling,
    is_exporting,
    is_tracing,
    is_transforming,
    without_autocast,
)
from ..ops.layout import split_heads
from ..ops.log import warn_once
from ..ops.mlstm import BACKENDS, choose_form
from ..ops.projections import dense_blocks, headwise_linear, token_conv
from ..ops.vil_layer import vil_layer
from ..ops.vil_layer_common import LayerSettings, LayerWeights
from .drop_path import DropPath


class ViLBlock(nn.Module):
    """Pre-norm residual mLSTM block (ViL, arXiv 2406.04303, section 3 and figure 2).

    Args:
        embed_dims (int): D, a multiple of 2 * num_heads; the inner width is E = 2D.
        num_heads (int): NH. Default: 4.
        reverse (bool): Read the tokens from last to first. Default: False.
        version (int): 2 (3x3 convolution over the grid, biases) or 1 (causal convolution, no
            biases). Default: 2.
        drop_path_rate (float): Default: 0.
        backend (str): Backend of the mLSTM, see :func:`mmvil.ops.mlstm`. Default: 'auto'.
        chunk_size (int, optional): See :func:`mmvil.ops.mlstm`.
        lean (bool | str): Save about 7D values per token for backward and recompute the rest, with
            equal results. With 'cell', also save q, k, v and the convolution's output, 15D in
            total, for a tenth less memory traffic in the backward pass on GPUs. False allows second
            derivatives up to the cell. Default: True.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int = 4,
        reverse: bool = False,
        version: int = 2,
        drop_path_rate: float = 0.0,
        backend: str = 'auto',
        chunk_size: int | None = None,
        lean: bool | str = True,
    ) -> None:
        super().__init__()
        if embed_dims % (2 * num_heads):
            raise ValueError(
                f'embed_dims must be a multiple of 2 * num_heads = {2 * num_heads}, so that heads '
                f'consist of blocks of 4 channels, but is {embed_dims}.'
            )
        if backend not in BACKENDS:
            raise ValueError(f'Unknown mLSTM backend {backend!r}; choose from {BACKENDS}.')
        if lean not in (True, False, 'cell'):
            raise ValueError(f"lean must be True, False or 'cell', but is {lean!r}.")
        inner = 2 * embed_dims
        bias = version == 2
        self.num_heads = num_heads
        self.reverse = reverse
        self.backend = backend
        self.chunk_size = chunk_size
        self.lean = lean

        self.norm = nn.LayerNorm(embed_dims, bias=bias)
        self.proj_up = nn.Linear(embed_dims, 2 * inner, bias=bias)
        self.conv = TokenConv(inner, causal=version == 1)
        self.q_proj = HeadwiseLinear(inner, num_heads, bias=bias)
        self.k_proj = HeadwiseLinear(inner, num_heads, bias=bias)
        self.v_proj = HeadwiseLinear(inner, num_heads, bias=bias)
        self.igate = nn.Linear(3 * inner, num_heads)
        self.fgate = nn.Linear(3 * inner, num_heads)
        self.out_norm = nn.GroupNorm(num_heads, inner)
        if not bias:  # torch < 2.12 has no argument for it
            self.out_norm.register_parameter('bias', None)
        self.skip = nn.Parameter(torch.empty(inner))
        self.proj_down = nn.Linear(inner, embed_dims, bias=bias)
        self.drop_path = DropPath(drop_path_rate)
        self._weight_shapes = [None if w is None else tuple(w.shape) for w in self._weights()]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize like the authors' models.

        The down-projection's standard deviation is Wang's 2 / (L sqrt(D)) with L = 1.
        """
        embed_dims = self.proj_up.in_features
        small = math.sqrt(2 / (5 * embed_dims))
        for module in (self.proj_up, self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(module.weight, std=small)
        nn.init.normal_(self.proj_down.weight, std=2 / math.sqrt(embed_dims))
        for module in (self.proj_up, self.q_proj, self.k_proj, self.v_proj, self.proj_down):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.ones_(self.skip)
        nn.init.zeros_(self.igate.weight)
        nn.init.zeros_(self.fgate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        with torch.no_grad():  # heads forget at different speeds
            self.fgate.bias.copy_(torch.linspace(3, 6, self.num_heads))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Apply the block to tokens.

        Args:
            x (Tensor): Tokens in row-major order, shape (B, N, D).
            grid (tuple[int, int]): Rows and columns of the token grid, N in all.

        Returns:
            Tensor: Shape (B, N, D).
        """
        weights = self._fusible_weights()
        if weights is None:
            return self.drop_path(x, lambda tokens: self._layer(tokens, grid))

        def residual_layer(tokens, scale=1.0, samples=None):
            return self._fused_layer(tokens, grid, weights, scale, samples)

        return self.drop_path(x, partial(residual_layer, scale=None), residual_layer)

    def gates(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Compute the gate pre-activations.

        Args:
            x (Tensor): The block's input, shape (B, N, D).
            grid (tuple[int, int]): Rows and columns of the token grid.

        Returns:
            tuple[Tensor, Tensor]: igate and fgate, shape (B, NH, N).
        """
        *_, igate, fgate = self._cell_inputs(self.proj_up(self.norm(x)).chunk(2, dim=-1)[0], grid)
        return igate, fgate

    def _layer(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Compute the layer by calling every submodule, with autograd's own backward pass."""
        x_m, z = self.proj_up(self.norm(x)).chunk(2, dim=-1)
        c, q, k, v, igate, fgate = self._cell_inputs(x_m, grid)
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

    def _cell_inputs(self, x_m: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Compute convolved tokens (B, N, E); q, k, v (B, NH, N, DH); and gates (B, NH, N), never
        in half precision.
        """
        c = F.silu(self.conv(x_m, grid, self.reverse))
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(x_m)
        with without_autocast(q):
            qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
            qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))  # (B, N, 3E)
            gates = (_call_promoted(gate, qkv) for gate in (self.igate, self.fgate))
            igate, fgate = (gate.transpose(1, 2) for gate in gates)
        return c, q, k, v, igate, fgate

    def _fused_layer(
        self,
        x: Tensor,
        grid: tuple[int, int],
        weights: LayerWeights,
        residual_scale: float | None,
        samples: Tensor | None,
    ) -> Tensor:
        """Compute the layer, with or without its residual connection, as one function of all
        weights, which saves little for backward.
        """
        dtype = autocast_dtype(x)
        settings = LayerSettings(
            grid=grid,
            heads=self.num_heads,
            reverse=self.reverse,
            form=choose_form(
                x.device,
                dtype,
                x.shape[1],
                len(self.skip) // self.num_heads,
                self.backend,
                self.chunk_size,
            ),
            norm_eps=self.norm.eps,
            out_norm_eps=self.out_norm.eps,
            dtype=dtype,
            save_cell_inputs=self.lean == 'cell',
            residual_scale=residual_scale,
        )
        return vil_layer(x, weights, settings, samples)

    def _fusible_weights(self) -> LayerWeights | None:
        """Weights of all submodules, or None if the submodules have to be called.

        The fused layer replaces its submodules only while they are as constructed: one that is
        replaced, hooked, parametrized, quantized or traced has to be called.
        """
        lean = self.lean or is_exporting()  # in a graph, the function is faster, too
        if not lean or self.backend == 'reference':
            return None
        if is_tracing() or is_transforming():
            return None
        weights, reason = self._plain_weights()
        if weights is None and not is_compiling():
            warn_once(
                f'ViLBlock calls its submodules one by one, because {reason}. Results are the '
                'same; the fused layer is faster and saves less for backward.'
            )
        return weights

    def _plain_weights(self) -> tuple[LayerWeights | None, str | None]:
        """Weights of all submodules, or None and the reason to call the submodules instead."""
        reason = self._unfusible_reason()
        if reason is not None:
            return None, reason
        weights = self._weights()
        # By the fields of the class: older compilers do not know those of an instance.
        for name, weight, built in zip(LayerWeights._fields, weights, self._weight_shapes):
            if type(weight) not in PLAIN_TENSORS:
                return None, f'{name} is a {type(weight).__name__}'
            shape = None if weight is None else tuple(weight.shape)
            if shape != built:
                return None, f'{name} has the shape {shape} instead of {built}'
        return weights, None

    def _weights(self) -> LayerWeights:
        modules = (self._modules[name] for name in FUSED_SUBMODULES)
        *before, weight, bias = (
            _parameter(m, name) for m in modules for name in ('weight', 'bias')
        )
        return LayerWeights(*before, self.skip, weight, bias)

    def _unfusible_reason(self) -> str | None:
        """Describe the first submodule that is not as constructed, or return None."""
        for (name, kind), forward in zip(FUSED_SUBMODULES.items(), FUSED_FORWARDS):
            module = self._modules[name]
            if type(module) is not kind:
                return f'{name} is a {type(module).__name__}'
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                return f'{name} has a hook'
            if 'forward' in module.__dict__ or kind.forward is not forward:
                return f'{name} has its own forward method'
        if self.out_norm.num_groups != self.num_heads:
            return f'out_norm has {self.out_norm.num_groups} groups for {self.num_heads} heads'
        return 'there are hooks on all modules' if has_global_module_hooks() else None


class HeadwiseLinear(nn.Module):
    """Linear layer with a block-diagonal weight, with its output split into heads.

    Args:
        channels (int): E, input and output width.
        num_heads (int): NH, heads of the output.
        block_size (int): Width of a diagonal block. Default: 4.
        bias (bool): Default: True.
    """

    def __init__(
        self, channels: int, num_heads: int, block_size: int = 4, bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.empty(channels // block_size, block_size, block_size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, E) to (B, NH, N, E / NH)."""
        if is_tracing():  # blocks are not joined, so that FLOP counters count no zeros
            size = self.weight.shape[-1]
            y = torch.einsum('bngi,goi->bngo', x.unflatten(2, (-1, size)), self.weight).flatten(2)
            return split_heads(y if self.bias is None else y + self.bias, self.num_heads)
        dense = dense_blocks(self.weight, x.shape[-1] // self.num_heads)
        return split_heads(headwise_linear(x, dense, self.bias), self.num_heads)

    def extra_repr(self) -> str:
        blocks, size, _ = self.weight.shape
        bias = self.bias is not None
        return f'{blocks * size}, heads={self.num_heads}, block_size={size}, bias={bias}'


class TokenConv(nn.Module):
    """Depthwise convolution of tokens: 3x3 over the token grid (ViL v2) or causal along the
    sequence (ViL v1).

    Args:
        channels (int): E.
        causal (bool): Use a 1D convolution of kernel size 4, causal in reading direction. Default:
            False.
    """

    def __init__(self, channels: int, causal: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, *((4,) if causal else (3, 3))))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize like torch's convolutions."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, grid: tuple[int, int], reverse: bool) -> Tensor:
        """Convolve tokens (B, N, E), in row-major order for both directions."""
        return token_conv(x, self.weight, self.bias, grid, reverse)

    def extra_repr(self) -> str:
        return f'{len(self.weight)}, kernel_size={tuple(self.weight.shape[2:])}'


FUSED_SUBMODULES = dict(
    norm=nn.LayerNorm,
    proj_up=nn.Linear,
    conv=TokenConv,
    q_proj=HeadwiseLinear,
    k_proj=HeadwiseLinear,
    v_proj=HeadwiseLinear,
    igate=nn.Linear,
    fgate=nn.Linear,
    out_norm=nn.GroupNorm,
    proj_down=nn.Linear,
)
"""Submodules of a block that the fused layer replaces, in the order of :class:`LayerWeights`, with
their exact types.
"""

FUSED_FORWARDS = [kind.forward for kind in FUSED_SUBMODULES.values()]
"""Forward methods that the fused layer replaces; other libraries may patch those of a class."""

PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor, type(None))
"""Types of weights that the fused layer supports; other subclasses may override operations."""


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """The attribute ``module.name``, which modules look up slowly; replicas have no parameters."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _call_promoted(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module on x, with parameters of lower precision promoted to the dtype of x."""
    promoted = {
        name: parameter.to(x.dtype)
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and parameter.element_size() < x.element_size()
    }
    return functional_call(module, promoted, (x,)) if promoted else module(x)
