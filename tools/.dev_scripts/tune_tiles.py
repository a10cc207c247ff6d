# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Time tiles of the mLSTM kernels on this GPU, and print a table sorted by time.

python tools/.dev_scripts/tune_tiles.py --width 96 192 384 --dtype bfloat16

Variants of mmvil.ops.triton.mlstm_launch.tiling are described by what differs from it. If you
change it, note the GPU and versions, which are printed, next to it.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
import triton
from triton.testing import do_bench

from mmvil.cli.main import at_least
from mmvil.ops.triton import mlstm_launch, shared_memory
from mmvil.ops.triton.mlstm_launch import Tiling, mlstm_backward, mlstm_forward, tiling

SIZES = {224: (128, 196), 512: (16, 1024), 1024: (4, 4096)}
"""Batch size and number of tokens by image size."""


def candidates(usual: Tiling) -> Iterator[Tiling]:
    """Iterate over variants of a choice in which no warp repeats another's work: itself first, then
    those with more blocks per multiprocessor or fewer products, then all others.
    """
    promising = [
        dict(columns=32, stages=3),
        dict(state=192 - usual.state),  # 64 or 128
        dict(together=False),
        dict(rows=64, columns=32, warps=4, stages=2),
    ]
    if usual.parts > 2:  # two programs share a head instead: each computes all scores
        promising.append(dict(width=usual.width // 2, tiles=2 * usual.tiles, parts=2))
    grid = itertools.product((64, 128), (16, 32, 64), (1, 2, 3), {1, usual.tiles})
    others = [
        dict(rows=rows, columns=columns, stages=stages, parts=parts, warps=rows // 16)
        for rows, columns, stages, parts in grid
    ]
    yield from dict.fromkeys(usual._replace(**change) for change in ({}, *promising, *others))


def describe(tiles: Tiling, usual: Tiling) -> str:
    """List the fields in which a choice differs from the usual one."""
    changes = (f'{k} {v}' for k, v in tiles._asdict().items() if v != getattr(usual, k))
    return ', '.join(changes) or 'current choice'


def milliseconds(tiles: Tiling, width: int, dtype: torch.dtype, size: int) -> tuple[float, float]:
    """Time the forward and backward pass of the cell."""
    batch, tokens = SIZES[size]
    features = torch.randn(4, batch, tokens, 4, width, device='cuda', dtype=dtype)
    q, k, v, h_grad = features.transpose(2, 3)
    igate, fgate = torch.randn(2, batch, 4, tokens, device='cuda') + 3
    with mock.patch.object(mlstm_launch, 'tiling', lambda *_: tiles):
        h, normalizer = mlstm_forward(q, k, v, igate, fgate, False)
        inputs = (h_grad, q, k, v, igate, fgate, h, normalizer, False)
        forward = gpu_milliseconds(lambda: mlstm_forward(q, k, v, igate, fgate, False))
        return forward, gpu_milliseconds(lambda: mlstm_backward(*inputs))


def gpu_milliseconds(function: Callable) -> float:
    """Time a function's kernels from a CUDA graph: a launch from Python takes about 0.1 ms, in
    which many of them would have ended.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return do_bench(graph.replay, return_mode='median')


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description='Time tiles of the mLSTM kernels on this GPU.')
    widths = dict(type=at_least(1), nargs='+', default=[96, 192, 384])
    parser.add_argument('--width', help='of a head', **widths)
    parser.add_argument('--size', nargs='+', type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument('--dtype', choices=['bfloat16', 'float16', 'float32'], default='bfloat16')
    args = parser.parse_args(args)
    if not torch.cuda.is_available():
        parser.error('tiles are timed on a GPU, and there is none')
    dtype, device = getattr(torch, args.dtype), torch.device('cuda')
    versions = f'PyTorch {torch.__version__}, Triton {triton.__version__}'
    print(f'{torch.cuda.get_device_name()}, {versions}, {args.dtype}\n')
    print('| width | size | tiles | forward ms | backward ms |')
    print('|---|---|---|---|---|')
    for width, size in itertools.product(args.width, args.size):
        usual, rows = tiling(width, dtype, shared_memory(device)), []
        for tiles in candidates(usual):
            try:
                times = milliseconds(tiles, width, dtype, size)
            except triton.runtime.errors.OutOfResources:
                continue
            texts = (f'{x:.3f}' for x in times)
            rows.append((sum(times), width, size, describe(tiles, usual), *texts))
        for _, *cells in sorted(rows):
            print('|', ' | '.join(map(str, cells)), '|', flush=True)


if __name__ == '__main__':
    main()
