# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""GPU kernels in Triton. Importing this package does not import Triton.

``MMVIL_TRITON=0`` in the environment switches them off.
"""

import os
import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from operator import itemgetter

import torch

from ..log import warn_once

MIN_TRITON = (3, 3)
"""Oldest version that runs and compiles the kernels; it comes with torch 2.7."""
MIN_CAPABILITY = (8, 0)
"""Ampere, the first with bfloat16 and asynchronous copies."""
MAX_HEAD_WIDTH = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@torch.compiler.assume_constant_result
def unavailable_reason(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Reason why the kernels cannot run, or None if they can.

    Args:
        device (torch.device): Device of the features; may be the CPU if Triton interprets its
            kernels (``TRITON_INTERPRET=1``).
        dtype (torch.dtype): Dtype of the features.
        head_width (int): DH.
    """
    if dtype not in DTYPES:
        return f'the dtype is {dtype}, not one of {", ".join(map(str, DTYPES))}'
    if head_width > MAX_HEAD_WIDTH:
        return f'heads are {head_width} wide, more than {MAX_HEAD_WIDTH}'
    if not _is_enabled('MMVIL_TRITON', '1'):
        return 'MMVIL_TRITON disables the kernels'
    return triton_problem() or device_problem(device.type, device.index)


@torch.compiler.assume_constant_result
def is_usable(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether the kernels can run and pass their self-test, which the first call may run.

    If not, the reason is logged once.
    """
    problem = unavailable_reason(device, dtype, head_width)
    if not problem and not is_interpreted():
        from .verdict import self_test_problem

        problem = self_test_problem(device, dtype, head_width)
    if problem:
        warn_once(f'The mLSTM runs in plain PyTorch, without GPU kernels: {problem}.')
    return not problem


@lru_cache
def triton_problem() -> str | None:
    """Reason why this installation of Triton cannot compile the kernels, or None if it can."""
    if sys.platform != 'linux':
        return f'the kernels run on Linux, but this is {sys.platform}'
    try:  # several packages contain it
        import triton
    except ImportError as error:
        return f'Triton is not installed ({error}); PyTorch for Linux comes with it'
    installed, needed = triton.__version__, '.'.join(map(str, MIN_TRITON))
    if tuple(map(int, installed.split('.')[:2])) < MIN_TRITON:
        return f'Triton is {installed}, but {needed} or later is required (in newer PyTorch)'
    return None


@lru_cache
def device_problem(kind: str, index: int | None) -> str | None:
    """Reason why a device cannot run the kernels, or None if it can."""
    if is_interpreted():
        return None
    if torch.version.hip:
        return 'the kernels compile for AMD GPUs, but have never run on one, and are disabled there'
    if kind != 'cuda':
        return f'the device is {kind}, not an NVIDIA GPU (or TRITON_INTERPRET=1 for tests)'
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        have, need = ('.'.join(map(str, x)) for x in (capability, MIN_CAPABILITY))
        return f'the GPU has compute capability {have}, and {need} is needed'
    return None


def is_interpreted() -> bool:
    """Whether Triton runs kernels as Python code, which it decides when it is imported."""
    return _is_enabled('TRITON_INTERPRET', '0')


def _is_enabled(variable: str, default: str) -> bool:
    """Read an environment variable as Triton does."""
    return os.environ.get(variable, default).lower() in ('1', 'true', 'on', 'yes', 'y')


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use."""
    if device.type != 'cuda':
        return 227 * 1024
    limits = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    return limits.get(torch.cuda.get_device_capability(device), 99) * 1024


def on_input_device(function: Callable) -> Callable:
    """Make a function launch its kernels on the GPU of its first argument; Triton takes the current
    one.
    """

    @wraps(function)
    def on_device(first: torch.Tensor, *args, **kwargs):
        with torch.cuda.device_of(first):  # nothing for the CPU
            return function(first, *args, **kwargs)

    return on_device


def launch(kernel, *programs: int, **arguments) -> None:
    """Launch a kernel on a grid of programs, unless it is empty, with fused multiply-add, which is
    off by default from Triton 3.10 on.

    Triton binds and specializes all arguments at every launch, which takes longer than many kernels
    do. Here it does so once for each combination of numbers and of types, devices and alignments of
    tensors.

    Raises:
        ValueError: If tensors are on several devices, which Triton does not notice.
    """
    if not all(programs):
        return
    kind = type(kernel)
    patched = getattr(kind, 'run', None), kind.__getitem__  # while a tool intercepts
    key = [kernel.fn, *patched, *arguments]
    values = []
    for x in arguments.values():
        if hasattr(x, 'data_ptr'):
            pointer = x.data_ptr()
            key += x.dtype, x.device, pointer % 16
            values.append(pointer)
        else:
            key.append(x)
            values.append(x)
    key = tuple(key)
    compiled, in_order = compiled_kernels.get(key, (None, None))
    if compiled is None:
        _compile_and_launch(key, kernel, programs, arguments)
    else:
        compiled[(*programs, 1, 1)](*in_order(values))


compiled_kernels: dict[tuple, tuple] = {}
"""Compiled kernels, and functions that sort their arguments, by all that they depend on."""

MAX_COMPILED = 4096
"""Launches to remember: those of about 100 sizes of images."""


def _compile_and_launch(key: tuple, kernel, programs: tuple[int, ...], arguments: dict) -> None:
    devices = {x.device for x in arguments.values() if isinstance(x, torch.Tensor)}
    if len(devices) > 1:
        names = ' and '.join(sorted(map(str, devices)))
        raise ValueError(f'the kernels need tensors on one device, not {names}.')
    compiled = kernel[programs](**arguments, enable_fp_fusion=True)
    from triton.compiler import CompiledKernel

    if isinstance(compiled, CompiledKernel):  # neither interpreted nor intercepted
        if len(compiled_kernels) >= MAX_COMPILED:
            compiled_kernels.clear()
        compiled_kernels[key] = compiled, itemgetter(*map([*arguments].index, kernel.arg_names))


def limited_registers(dtype: torch.dtype, blocks: int) -> dict[str, int]:
    """Launch option that lets several blocks of four warps fit a multiprocessor, for kernels that
    wait for memory. Not for float32, which needs more; Triton for AMD rejects it.
    """
    if dtype == torch.float32 or torch.version.hip:
        return {}
    return dict(maxnreg=65536 // (blocks * 4 * 32) // 8 * 8)


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up; ``triton.cdiv`` takes ten times as long, as does the next function's
    namesake.
    """
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two of at least n."""
    return 1 << (n - 1).bit_length()


def default_chunk_size(length: int) -> int:
    """Number of tokens in a chunk: the fastest on an H100, at head widths 96, 192 and 384."""
    return length if length < 450 else 256
