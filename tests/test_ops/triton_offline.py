# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Compile Triton kernels for absent GPUs, and read what the compiled code needs and does.

Host code that launches kernels runs on tensors without memory, and its launches are compiled
exactly as they would have been specialized:

    for launch in record_launches(lambda: mlstm_forward(q, k, v, igate, fgate, False)):
        print(launch.label, compile_launch(launch, 'sm_90'))

This does not work under TRITON_INTERPRET=1, where kernels are Python functions. A table of all
kernels at the sizes of real models:

    python -m tests.test_ops.triton_offline --arch sm_90 --width 96 384 --size 1024
"""

import argparse
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mmvil.ops.mlstm import Form
from mmvil.ops.triton import default_chunk_size
from mmvil.ops.vil_layer_common import LayerSettings, LayerWeights

SHARED_LIMIT = {
    'sm_80': 163 * 1024,
    'sm_86': 99 * 1024,
    'sm_89': 99 * 1024,
    'sm_90': 227 * 1024,
    'sm_100': 227 * 1024,
    'sm_120': 99 * 1024,
    'gfx942': 64 * 1024,
}
"""Bytes of shared memory that one block may have."""

COMPILER = tuple(map(int, triton.__version__.split('.')[:2]))
OLD_COMPILER = COMPILER < (3, 9)
"""Older versions compile the kernels to more registers or instructions."""


class Launch(NamedTuple):
    """One call ``kernel[grid](*args, **kwargs)``."""

    kernel: JITFunction
    grid: Any
    args: tuple
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def label(self) -> str:
        """Name, and which of its two results it computes."""
        flags = [x for x in ('GRAD', 'OPERAND') if self.kwargs.get(x)]
        return ' '.join([self.name, *flags])


def record_launches(function: Callable[[], Any]) -> list[Launch]:
    """Call a function and record its kernel launches instead of running them, on any device."""
    launches = []

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append(Launch(kernel, grid, args, kwargs))

    with mock.patch.object(JITFunction, 'run', note):
        function()
    return launches


def compile_launch(launch: Launch, arch: str) -> dict[str, Any]:
    """Compile the kernel of a launch, with the same specialization of its arguments.

    Args:
        launch (Launch): Result of :func:`record_launches`.
        arch (str): A key of :data:`SHARED_LIMIT`.

    Returns:
        dict: ``registers`` (per thread), ``spills`` (bytes of local memory per thread),
        ``shared_bytes`` (per block). On NVIDIA GPUs also ``blocks`` (that fit a multiprocessor),
        ``loops`` (list[Loop], the innermost ones in the order of the code), ``serialized`` (whether
        the assembler lets each of Hopper's products wait for the one before), and
        ``rows_per_warp`` (the fewest rows of a product that a warp has for itself; with less than
        16, warps compute the same).
    """
    target = _target(arch)
    gpu = SimpleNamespace(
        get_current_device=lambda: arch,
        get_current_stream=lambda device: None,
        get_current_target=lambda: target,
    )
    with mock.patch('triton.runtime.jit.driver', SimpleNamespace(active=gpu)):
        compiled = launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.kwargs)
    if target.backend == 'hip':
        return _amd_resources(compiled)
    facts = _nvidia_resources(compiled) | _code_facts(compiled)
    by_registers = 65536 // (facts['registers'] * 32 * compiled.metadata.num_warps)
    by_memory = (SHARED_LIMIT[arch] + 1024) // (facts['shared_bytes'] + 1024)
    return facts | dict(blocks=min(by_registers, by_memory))


def _target(arch: str) -> GPUTarget:
    if arch.startswith('gfx'):
        return GPUTarget('hip', arch, 64)
    return GPUTarget('cuda', int(arch.partition('_')[2]), 32)


def _amd_resources(compiled) -> dict[str, int]:
    def number(key):
        return int(re.search(rf'\.{key}:\s+(\d+)', compiled.asm['amdgcn']).group(1))

    return dict(
        registers=number('vgpr_count'),
        spills=4 * number('vgpr_spill_count'),
        shared_bytes=compiled.metadata.shared,
    )


def _nvidia_resources(compiled) -> dict[str, int]:
    usage = _disassemble('cuobjdump', '--dump-resource-usage', compiled.asm['cubin'])
    return dict(
        registers=int(re.search(r'REG:(\d+)', usage).group(1)),
        spills=sum(int(size) for size in re.findall(r'(?:STACK|LOCAL):(\d+)', usage)),
        shared_bytes=compiled.metadata.shared,
    )


class Loop(NamedTuple):
    """Machine code of one iteration of an innermost loop."""

    instructions: int
    barriers: int
    exponentials: int

    def per_score(self, launch: Launch) -> tuple[float, float]:
        """Instructions and exponentials of a thread by its share of a (ROWS, COLUMNS) tile."""
        sizes = launch.kwargs
        share = sizes['ROWS'] * sizes['COLUMNS'] / (32 * sizes['num_warps'])
        return self.instructions / share, self.exponentials / share


def _code_facts(compiled) -> dict[str, Any]:
    code = _disassemble('nvdisasm', '-c', compiled.asm['cubin'])
    lines = re.findall(r'^(\.L_x_\d+):|^\s+/\*[0-9a-f]+\*/\s+(.*?) *;', code, re.MULTILINE)
    labels, instructions, loops = {}, [], []
    for label, instruction in lines:
        if label:
            labels[label] = len(instructions)
            continue
        instructions.append(instruction)
        jump = re.search(r'BRA.*`\((\.L_x_\d+)\)', instruction)
        if jump and jump.group(1) in labels:  # backwards
            loops.append((labels[jump.group(1)], len(instructions)))
    inner = [
        (start, end)
        for start, end in loops
        if end - start > 8  # not a wait
        and not any((start, end) != x and start <= x[0] and x[1] <= end for x in loops)
    ]
    asynchronous = [i for i in instructions if 'HGMMA' in i]
    dots = re.findall(r'dot.*-> tensor<(\d+)x\d+xf32, (#mma\d*)>', compiled.asm['ttgir'])
    warps = dict(re.findall(r'(#mma\d*) = .*warpsPerCTA = \[(\d+), ', compiled.asm['ttgir']))
    return dict(
        loops=[_loop(instructions[start:end]) for start, end in sorted(inner)],
        serialized=bool(asynchronous) and all('gsb0' in i for i in asynchronous),
        rows_per_warp=min((int(rows) // int(warps[layout]) for rows, layout in dots), default=None),
    )


def _loop(instructions: list[str]) -> Loop:
    def count(word):
        return sum(bool(re.search(rf'\b{word}\b', i)) for i in instructions)

    return Loop(len(instructions), count('BAR'), count(r'MUFU\.EX2'))


def _disassemble(tool: str, option: str, cubin: bytes) -> str:
    path = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / tool
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        command = [str(path), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# -- The table of all kernels ----------------------------------------------------------------------

SIZES = {224: (128, 14), 512: (16, 32), 1024: (4, 64)}
"""Batch and side of the token grid by the side of images."""
HEADS = 4


def cell_launches(
    arch: str, width: int, size: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Launch]:
    """Launches of the mLSTM, forward and backward, by label.

    Args:
        arch (str): A key of :data:`SHARED_LIMIT`.
        width (int): DH.
        size (int): A key of :data:`SIZES`.
        dtype (torch.dtype): Dtype of the features.
    """
    from mmvil.ops.triton import mlstm_launch

    batch, side = SIZES[size]
    tokens = side**2
    x = torch.empty(batch, tokens, HEADS, width, dtype=dtype, device='meta').transpose(1, 2)
    gate = torch.empty(batch, HEADS, tokens, device='meta')

    def run():
        h, normalizer = mlstm_launch.mlstm_forward(x, x, x, gate, gate, False)
        mlstm_launch.mlstm_backward(x, x, x, x, gate, gate, h, normalizer, False)

    with mock.patch.object(mlstm_launch, 'shared_memory', lambda device: SHARED_LIMIT[arch]):
        return _launches(run, arch)


def layer_launches(
    arch: str, width: int, size: int, dtype: torch.dtype = torch.bfloat16, version: int = 2
) -> dict[str, Launch]:
    """Launches of a layer, forward and backward, by label, those of the mLSTM excepted.

    Args:
        arch, width, size, dtype: As for :func:`cell_launches`.
        version (int): Of ViL; 1 has a causal convolution and no biases.
    """
    from mmvil.ops.triton.conv_qkv_gates import BeforeCellWeights, before_cell
    from mmvil.ops.triton.conv_qkv_gates_backward import before_cell_backward
    from mmvil.ops.triton.layer_norm import layer_norm, layer_norm_backward
    from mmvil.ops.triton.norm_skip_gate import after_cell, after_cell_backward
    from mmvil.ops.triton.reduction import add_partial_sums, convert_and_sum

    x, w, settings = layer_inputs(width, size, dtype, version)
    grid, reverse = settings.grid, settings.reverse
    weights = BeforeCellWeights(*(getattr(w, name) for name in BeforeCellWeights._fields))
    weights = weights._replace(conv_weight=w.conv_weight.movedim(0, -1).contiguous())
    x_m, z = x.new_empty(*x.shape[:2], 2 * HEADS * width, dtype=dtype).chunk(2, -1)
    a, gate = torch.empty_like(x_m), x.new_empty(len(x), HEADS, x.shape[1])
    h = a.unflatten(2, (HEADS, width)).transpose(1, 2)
    after = (h, a, z, w.out_norm_weight, w.out_norm_bias, w.skip, 1e-6)
    norm = (w.norm_weight, w.norm_bias, 1e-6)

    def run():
        layer_norm(x, *norm, dtype)
        before_cell(x_m, weights, grid, HEADS, reverse)
        after_cell(*after)
        _, *sums = convert_and_sum(x, dtype)
        sums.append(after_cell_backward(a, *after)[-1])
        grads = (h, h, h, gate, gate, a)
        sums.append(before_cell_backward(*grads, a, x_m, weights, grid, reverse, x_m))
        sums.append(layer_norm_backward(x.to(dtype), x, *norm, x)[-1])
        add_partial_sums(sums[0], sums[1:])

    return _launches(run, arch)


def _launches(run: Callable[[], None], arch: str) -> dict[str, Launch]:
    with mock.patch.object(torch.version, 'hip', '6' if arch.startswith('gfx') else None):
        return {launch.label: launch for launch in record_launches(run)}


def layer_inputs(
    head_width: int, size: int, dtype: torch.dtype = torch.bfloat16, version: int = 2
) -> tuple[Tensor, LayerWeights, LayerSettings]:
    """Input, weights and settings of a layer under autocast, without memory."""
    batch, side = SIZES[size]
    inner, width = HEADS * head_width, HEADS * head_width // 2

    def empty(*shape):
        return torch.empty(*shape, device='meta')

    def bias(channels):
        return empty(channels) if version == 2 else None

    weights = LayerWeights(
        norm_weight=empty(width),
        norm_bias=bias(width),
        up_weight=empty(2 * inner, width),
        up_bias=bias(2 * inner),
        conv_weight=empty(inner, 1, 3, 3) if version == 2 else empty(inner, 1, 4),
        conv_bias=empty(inner),
        **{f'{name}_weight': empty(inner // 4, 4, 4) for name in 'qkv'},
        **{f'{name}_bias': bias(inner) for name in 'qkv'},
        **{f'{name}gate_weight': empty(HEADS, 3 * inner) for name in 'if'},
        **{f'{name}gate_bias': empty(HEADS) for name in 'if'},
        out_norm_weight=empty(inner),
        out_norm_bias=bias(inner),
        skip=empty(inner),
        down_weight=empty(width, inner),
        down_bias=bias(width),
    )
    form = Form(default_chunk_size(side**2), triton=True)
    settings = LayerSettings((side, side), HEADS, version == 1, form, 1e-6, 1e-6, dtype)
    return empty(batch, side**2, width), weights, settings


WORKLOADS = {'cell': cell_launches, 'layer': layer_launches}
"""Functions of (arch, width, size, dtype) that give launches by label."""


def main(args: Sequence[str] | None = None) -> None:
    """Print a table in Markdown; an iteration of a loop as instructions/barriers."""
    parser = argparse.ArgumentParser(prog='python -m tests.test_ops.triton_offline')
    parser.add_argument('--workload', nargs='+', choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument('--arch', nargs='+', default=['sm_80', 'sm_90', 'sm_100'])
    parser.add_argument('--width', nargs='+', type=int, default=[96, 192, 384], help='of a head')
    parser.add_argument('--size', nargs='+', type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument('--dtype', choices=['bfloat16', 'float16', 'float32'], default='bfloat16')
    parser.add_argument('--kernel', default='', help='part of a label')
    args = parser.parse_args(args)
    columns = ('registers', 'spills', 'shared_bytes', 'blocks', 'serialized', 'rows_per_warp')
    print('| arch | width | size | kernel | warps |', ' | '.join(columns), '| loops |')
    print('|---' * (len(columns) + 6) + '|')
    for workload, arch, width, size in itertools.product(
        args.workload, args.arch, args.width, args.size
    ):
        launches = WORKLOADS[workload](arch, width, size, getattr(torch, args.dtype))
        for label, launch in launches.items():
            if args.kernel in label:
                facts = compile_launch(launch, arch)
                loops = ', '.join(f'{x.instructions}/{x.barriers}' for x in facts.get('loops', ()))
                warps = launch.kwargs.get('num_warps', 4)
                cells = [arch, width, size, label, warps, *map(facts.get, columns), loops]
                print('|', ' | '.join(map(str, cells)), '|', flush=True)


if __name__ == '__main__':
    main()
