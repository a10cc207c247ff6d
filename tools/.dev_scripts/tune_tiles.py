# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Time tiles of the mLSTM kernels on this GPU, and print a table sorted by time.

python tools/.dev_scripts/tune_tiles.py --width 96 192 384 --dtype bfloat16

The current choice of mmvil.ops.triton.mlstm_launch.tiling is marked with a star. If you change it,
note the GPU and versions, which are printed, next to it.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
import triton
from triton.testing import do_bench

from mmvil.ops.triton import mlstm_launch, shared_memory
from mmvil.ops.triton.mlstm_launch import Tiling, mlstm_backward, mlstm_forward, tiling

SIZES = {224: (128, 196), 512: (16, 1024), 1024: (4, 4096)}
"""Batch size and number of tokens by image size."""


def candidates(usual: Tiling) -> Iterator[Tiling]:
    """Iterate over variants of a choice, itself first, in which no warp repeats another's work."""
    yield usual
    options = itertools.product((64, 128), (16, 32, 64), (1, 2, 3), {1, usual.tiles})
    for rows, columns, stages, parts in options:
        tiles = usual._replace(
            rows=rows, columns=columns, stages=stages, parts=parts, warps=rows // 16
        )
        if tiles != usual:
            yield tiles


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
    parser.add_argument('--width', nargs='+', type=int, default=[96, 192, 384], help='of a head')
    parser.add_argument('--size', nargs='+', type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument('--dtype', choices=['bfloat16', 'float16', 'float32'], default='bfloat16')
    args = parser.parse_args(args)
    if not torch.cuda.is_available():
        parser.error('tiles are timed on a GPU, and there is none')
    dtype, device = getattr(torch, args.dtype), torch.device('cuda')
    versions = f'PyTorch {torch.__version__}, Triton {triton.__version__}'
    print(f'{torch.cuda.get_device_name()}, {versions}, {args.dtype}\n')
    print('| width | size | rows | columns | stages | parts | forward ms | backward ms |')
    print('|---|---|---|---|---|---|---|---|')
    for width, size in itertools.product(args.width, args.size):
        usual, rows = tiling(width, dtype, shared_memory(device)), []
        for tiles in candidates(usual):
            try:
                times = milliseconds(tiles, width, dtype, size)
            except triton.runtime.errors.OutOfResources:
                continue
            star = '*' if tiles == usual else ''
            chosen = (f'{tiles.rows}{star}', tiles.columns, tiles.stages, tiles.parts)
            rows.append((sum(times), width, size, *chosen, *(f'{x:.3f}' for x in times)))
        for _, *cells in sorted(rows):
            print('|', ' | '.join(map(str, cells)), '|', flush=True)


if __name__ == '__main__':
    main()
