# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Self-test of the kernels: cell and layer, forward and backward, at the sizes of real images.

They must agree with PyTorch and be bitwise reproducible. ``backend='auto'`` runs this in a separate
process before it uses the kernels (see :mod:`mmvil.ops.triton.verdict`). To run it manually, and
store the result for ``'auto'``::

    python -m mmvil.ops.triton.self_test --dtype bfloat16 --head-width 96 --store
"""

import argparse
import faulthandler
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import tf32_is_allowed
from ..mlstm import choose_form, mlstm
from ..vil_layer import vil_layer
from ..vil_layer_common import LayerSettings, LayerWeights
from .verdict import FAILED, IMPOSSIBLE, TIMEOUT, store

TILE = 16
"""Rows of the smallest tile. If one head's part of it is wrong, its error is about 0.5."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""Tolerance for rounding errors of a tile, in addition to four times the error of PyTorch."""


class Case(NamedTuple):
    """Input sizes and options of a layer."""

    batch: int
    grid: tuple[int, int]
    reverse: bool
    version: int
    heads: int = 4


CASES = (
    Case(3, (14, 14), reverse=False, version=2),  # one chunk; the last tiles are not full
    Case(16, (32, 33), reverse=True, version=2),  # many chunks; the larger tiles of tokens
    Case(3, (14, 14), reverse=True, version=1),
)


def check(
    device: torch.device, dtype: torch.dtype, head_width: int, cases: Sequence[Case] = CASES
) -> str | None:
    """Compare the kernels with PyTorch and with a second run.

    Args:
        device (torch.device): Device to run on.
        dtype (torch.dtype): Dtype of the features.
        head_width (int): DH.
        cases (Sequence[Case]): Inputs.

    Returns:
        str, optional: Description of the first problem, or None.
    """
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    tf32 = dtype == torch.float32 and tf32_is_allowed()  # same precision as float16
    tolerance = TOLERANCE[torch.float16 if tf32 else dtype]
    for case in cases:
        for name, run in (('cell', _run_cell), ('layer', _run_layer)):
            inputs = (case, head_width, device)
            results = run(*inputs, dtype, 'triton')
            again = run(*inputs, dtype, 'triton')
            plain = run(*inputs, dtype, 'chunkwise')
            expected = run(*inputs, exact, 'chunkwise')
            # Gradients far below the others are differences of terms as large as the others.
            floor = 1e-2 * max(_row_size(value) for value in expected.values())
            for key, value in expected.items():
                what = f'{key} of the {name} ({case})'
                error, usual = (_error(x[key], value, floor) for x in (results, plain))
                if not error <= 4 * usual + tolerance:
                    return f'got wrong numbers: {what}, error {error:.1e}, PyTorch has {usual:.1e}'
                if not torch.equal(results[key], again[key]):
                    return f'got different bits in a second run: {what}'
    return None


def _error(actual: Tensor, expected: Tensor, floor: float) -> float:
    """Largest error of a tile of rows, relative to the size of rows; NaN if there is one."""
    errors = _squares(actual.to(expected.dtype) - expected)
    rows = min(TILE, len(errors))
    tiles = F.pad(errors, (0, -len(errors) % rows)).view(-1, rows)
    return tiles.mean(1).max().sqrt().item() / max(_row_size(expected), floor)


def _row_size(x: Tensor) -> float:
    return _squares(x).mean().sqrt().item()


def _squares(x: Tensor) -> Tensor:
    """Squared norms of rows: tokens, channels, entries of a vector."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.unsqueeze(1)
    return rows.square().sum(1)


def _results(function: Callable[..., Tensor], leaves: dict[str, Tensor | None], randn):
    """Output of a function and gradients of those leaves that are not None."""
    tensors = {name: x.requires_grad_() for name, x in leaves.items() if x is not None}
    output = function(**{**leaves, **tensors})
    seed = randn(*output.shape).to(output.dtype)
    grads = torch.autograd.grad(output, tensors.values(), seed)
    return dict(output=output.detach(), **{f'gradient of {n}': g for n, g in zip(tensors, grads)})


def _generator(device: torch.device):
    """Random number generator with a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def _run_cell(case: Case, head_width: int, device, dtype, backend: str) -> dict[str, Tensor]:
    """Run the cell alone, because the layer's norm hides errors of the normalizer."""
    randn = _generator(device)
    batch, tokens = case.batch, case.grid[0] * case.grid[1]

    def features():  # exact in half precision, in the layout of tokens
        x = randn(batch, tokens, case.heads, head_width).bfloat16().to(dtype)
        return x.transpose(1, 2)

    # In max(|n|, exp(-m)), the first is larger in heads 0, 2, ..., the second in the others. Were
    # they equal, rounding would decide which of them has the gradient.
    shift = 1 - 8 * (torch.arange(case.heads, device=device)[:, None] % 2)
    leaves = dict(
        q=features().abs(),  # so that no sum near zero amplifies rounding errors
        k=features().abs(),
        v=features(),
        igate=randn(batch, case.heads, tokens) + shift,
        fgate=randn(batch, case.heads, tokens) + 3,
    )

    def cell(q, k, v, igate, fgate):
        return mlstm(q, k, v, igate=igate, fgate=fgate, reverse=case.reverse, backend=backend)

    return _results(cell, leaves, randn)


def _run_layer(case: Case, head_width: int, device, dtype, backend: str) -> dict[str, Tensor]:
    """Run the fused layer with float32 parameters, as under autocast.

    Rounding errors remain small, for any random numbers: products of queries and keys are positive
    on average, because the norm after the cell enlarges what remains of a sum that cancels; and
    forget gates are open, or their gradients would be small differences of long sums.
    """
    randn = _generator(device)
    tokens, inner = case.grid[0] * case.grid[1], case.heads * head_width
    width = inner // 2
    settings = LayerSettings(
        grid=case.grid,
        heads=case.heads,
        reverse=case.reverse,
        form=choose_form(device, dtype, tokens, head_width, backend),
        norm_eps=1e-6,
        out_norm_eps=1e-6,
        dtype=dtype,
        residual_scale=0.5 if case.reverse else None,
    )

    def weight(*shape: int, inputs: int) -> Tensor:
        return (randn(*shape) / inputs**0.5).to(torch.promote_types(dtype, torch.float32))

    def bias(size: int) -> Tensor | None:
        return weight(size, inputs=25) if case.version == 2 else None

    conv = (inner, 1, 3, 3) if case.version == 2 else (inner, 1, 4)
    weights = LayerWeights(
        norm_weight=1 + weight(width, inputs=100),
        norm_bias=bias(width),
        up_weight=weight(2 * inner, width, inputs=width),
        up_bias=bias(2 * inner),
        conv_weight=weight(*conv, inputs=4),
        conv_bias=bias(inner),
        q_weight=weight(inner // 4, 4, 4, inputs=4).abs(),
        k_weight=weight(inner // 4, 4, 4, inputs=4).abs(),
        v_weight=weight(inner // 4, 4, 4, inputs=4),
        **{f'{name}_bias': bias(inner) for name in 'qkv'},
        igate_weight=weight(case.heads, 3 * inner, inputs=3 * inner),
        igate_bias=weight(case.heads, inputs=1),
        fgate_weight=weight(case.heads, 3 * inner, inputs=3 * inner),
        fgate_bias=6 + weight(case.heads, inputs=4),
        out_norm_weight=1 + weight(inner, inputs=100),
        out_norm_bias=bias(inner),
        skip=weight(inner, inputs=1),
        down_weight=weight(width, inner, inputs=inner),
        down_bias=bias(width),
    )
    x = weight(case.batch, tokens, width, inputs=1)

    def layer(x, **weights):
        return vil_layer(x, LayerWeights(**weights), settings)

    return _results(layer, dict(x=x, **weights._asdict()), randn)


def _probe(device: torch.device, dtype: torch.dtype) -> None:
    """Run a simple kernel, which raises where none could run: without a free GPU, a C compiler, or
    a place for compiled code.
    """
    from .layer_norm import layer_norm

    x = torch.ones(1, 1, 16, device=device)
    layer_norm(x, x.flatten(), None, 1e-6, dtype).cpu()


def main(args: Sequence[str] | None = None) -> int:
    """Print the verdict as the last line and return an exit status."""
    parser = argparse.ArgumentParser(prog='python -m mmvil.ops.triton.self_test')
    parser.add_argument('--device', type=torch.device, default='cuda')
    parser.add_argument('--dtype', choices=[str(dtype)[6:] for dtype in TOLERANCE], required=True)
    parser.add_argument('--head-width', type=int, required=True)
    parser.add_argument('--tf32', action='store_true', help='round operands in float32 to TF32')
    parser.add_argument('--store', action='store_true', help="store the result for backend='auto'")
    args = parser.parse_args(args)
    faulthandler.enable()
    faulthandler.dump_traceback_later(TIMEOUT + 60, exit=True)  # if no process waits any more
    torch.set_float32_matmul_precision('high' if args.tf32 else 'highest')
    torch.backends.cudnn.allow_tf32 = False
    dtype, status = getattr(torch, args.dtype), IMPOSSIBLE
    try:
        _probe(args.device, dtype)
        status = FAILED
        problem = check(args.device, dtype, args.head_width)
        status = FAILED if problem else 0
    except Exception as error:
        traceback.print_exc()
        problem = f'raised {type(error).__name__}: {(str(error).splitlines() or [""])[0]}'
        if isinstance(error, OSError) or 'out of memory' in str(error):
            status = IMPOSSIBLE
    if args.store and status != IMPOSSIBLE:
        store(problem, args.device, dtype, args.head_width)
    print(problem or 'The kernels are right.', flush=True)
    return status


if __name__ == '__main__':
    sys.exit(main())
