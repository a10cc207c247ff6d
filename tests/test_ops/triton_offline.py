# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Compile Triton kernels for absent GPUs, and read the resources that they need.

Host code that launches kernels runs on small CPU tensors, and its launches are compiled exactly as
they would have been specialized:

    for launch in record_launches(lambda: mlstm_forward(q, k, v, igate, fgate, False)):
        print(launch.name, compile_launch(launch, 'sm_90'))

This does not work under TRITON_INTERPRET=1, where kernels are Python functions.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

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


class Launch(NamedTuple):
    """One call ``kernel[grid](*args, **kwargs)``."""

    kernel: JITFunction
    grid: Any
    args: tuple
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


def record_launches(function: Callable[[], Any]) -> list[Launch]:
    """Call a function and record its kernel launches instead of running them, on any device."""
    launches = []

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append(Launch(kernel, grid, args, kwargs))

    with mock.patch.object(JITFunction, 'run', note):
        function()
    return launches


def compile_launch(launch: Launch, arch: str) -> dict[str, int]:
    """Compile the kernel of a launch, with the same specialization of its arguments.

    Args:
        launch (Launch): Result of :func:`record_launches`.
        arch (str): A key of :data:`SHARED_LIMIT`.

    Returns:
        dict: ``registers`` (per thread), ``spills`` (bytes of local memory per thread),
        ``shared_bytes`` (per block).
    """
    kernel, target = launch.kernel, _target(arch)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = dict(launch.kwargs, debug=False)
    bound, specialization, options = binder(*launch.args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    return _resources(triton.compile(source, target=target, options=options.__dict__), target)


def _target(arch: str) -> GPUTarget:
    if arch.startswith('gfx'):
        return GPUTarget('hip', arch, 64)
    return GPUTarget('cuda', int(arch.partition('_')[2]), 32)


def _resources(compiled, target: GPUTarget) -> dict[str, int]:
    if target.backend == 'hip':
        text = compiled.asm['amdgcn']

        def number(key):
            return int(re.search(rf'\.{key}:\s+(\d+)', text).group(1))

        registers, spills = number('vgpr_count'), 4 * number('vgpr_spill_count')
    else:
        usage = _cuobjdump(compiled.asm['cubin'])
        registers = int(re.search(r'REG:(\d+)', usage).group(1))
        spills = sum(int(size) for size in re.findall(r'(?:STACK|LOCAL):(\d+)', usage))
    return dict(registers=registers, spills=spills, shared_bytes=compiled.metadata.shared)


def _cuobjdump(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), '--dump-resource-usage', file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
