# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Cached result of the kernels' self-test on this machine.

Some versions of Triton and of ptxas, NVIDIA's assembler, compile such kernels into code that is
wrong on one GPU and right on another, or that crashes or hangs. So on the first use of a
combination of GPU model, dtype, head width and these versions, :mod:`mmvil.ops.triton.self_test`
runs in a separate process, for which other processes wait. The result is stored next to torch's
other caches, in ``~/.cache/torch/mmvil`` unless ``TORCH_HOME`` or ``XDG_CACHE_HOME`` is set, or in
a temporary folder if that is not writable.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from functools import cache
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch

from ..compat import tf32_is_allowed

TIMEOUT = 480
"""Seconds after which the self-test counts as hung. Other processes of the node wait for it, and
those of other nodes may wait for these, in collective operations that time out after 600 seconds.
"""
FAILED = 10
IMPOSSIBLE = 75
"""Exit statuses of the self-test: the kernels are faulty; the test could not run (EX_TEMPFAIL)."""

_logger = logging.getLogger('mmvil')


class CacheKey(NamedTuple):
    """Combination of hardware, software and sizes that a verdict applies to."""

    gpu: str
    dtype: str
    head_width: int
    tf32: bool
    triton: str
    ptxas: str
    ptxas_variable: str
    """Environment variable for the path of another ptxas."""
    kernels: str
    """Digest of the kernels' source."""

    def __str__(self) -> str:
        return (
            f'{self.gpu}, {self.dtype}, heads {self.head_width} wide, Triton {self.triton}, '
            f'ptxas {self.ptxas}'
        )


class Verdict(NamedTuple):
    """Outcome of a self-test."""

    problem: str | None
    days: float = math.inf
    """How long it is cached; 0 if the kernels remain untested."""


def self_test_problem(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Reason not to trust the kernels, or None. The first call takes a minute or more.

    Args:
        device (torch.device): A GPU that meets the kernels' requirements.
        dtype (torch.dtype): Dtype of the features.
        head_width (int): DH.
    """
    return _cached_problem(*_case(device, dtype, head_width))


def store(problem: str | None, device: torch.device, dtype: torch.dtype, head_width: int) -> None:
    """Cache the result of a self-test that was run manually."""
    key = _cache_key(*_case(device, dtype, head_width))
    _store(_file_to_write(_files(key)), key, Verdict(problem))


def _case(device: torch.device, dtype: torch.dtype, head_width: int) -> tuple:
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, dtype, head_width, dtype == torch.float32 and tf32_is_allowed()


@cache
def _cached_problem(index: int, dtype: torch.dtype, head_width: int, tf32: bool) -> str | None:
    try:
        key = _cache_key(index, dtype, head_width, tf32)
    except Exception as error:  # versions of Triton without a compiler, or with another interface
        return f"the compiler's version cannot be read ({type(error).__name__}: {error})"
    files = _files(key)
    # A folder that cannot be written, of an image or another user, may have the verdict.
    found = ((file, verdict) for file in files if (verdict := _read(file, key)))
    file, verdict = next(found, (None, None))
    if verdict is None:
        file = _file_to_write(files)
        verdict = _test_or_wait(file, key, index)
    if verdict.problem is None:
        return None
    problem = f'their self-test {verdict.problem} ({key})'
    if not verdict.days:
        command = ' '.join(['python', *_arguments(key, index), '--store'])
        return (
            f'{problem}; the next process tries again. If the GPU is full or takes one process '
            f'(exclusive mode), run `{command}` first'
        )
    return (
        f'{problem}. Try another ptxas ({key.ptxas_variable}=/path/to/ptxas, from another CUDA '
        f'toolkit) or another Triton. To test again, remove {file}'
    )


# -- Cache key -------------------------------------------------------------------------------------


def _cache_key(index: int, dtype: torch.dtype, head_width: int, tf32: bool) -> CacheKey:
    import triton

    major, minor = torch.cuda.get_device_capability(index)
    ptxas, variable = assembler(10 * major + minor)
    sources = sorted(Path(__file__).parent.glob('*.py'))
    return CacheKey(
        gpu=f'{torch.cuda.get_device_name(index)} (sm_{major}{minor})',
        dtype=str(dtype)[6:],
        head_width=head_width,
        tf32=tf32,
        triton=triton.__version__,
        ptxas=ptxas,
        ptxas_variable=variable,
        kernels=hashlib.sha256(b''.join(file.read_bytes() for file in sources)).hexdigest(),
    )


def assembler(arch: int) -> tuple[str, str]:
    """Version of the ptxas that Triton uses for an architecture (90 for sm_90), and the variable
    that selects another.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    # Newer versions of Triton ship one for older and one for newer GPUs.
    tool = get_ptxas(arch) if signature(get_ptxas).parameters else get_ptxas()
    if isinstance(tool, tuple):  # Triton 3.3
        path, version = tool
        variables = ['TRITON_PTXAS_PATH' if arch < 100 else 'TRITON_PTXAS-BLACKWELL_PATH']
    else:
        from triton import knobs

        path, version = tool.path, tool.version
        variables = [
            knob.key
            for name, knob in knobs.nvidia.knob_descriptors.items()
            if name in ('ptxas', 'ptxas_blackwell') and getattr(knobs.nvidia, name) == tool
        ]
    text = subprocess.run([path, '--version'], capture_output=True, text=True).stdout
    full = re.search(r'\bV([\d.]+)', text)
    return full.group(1) if full else version, ' or '.join(variables)


# -- Files -----------------------------------------------------------------------------------------


def _folders() -> list[Path]:
    """Folders for verdicts, the preferred one first."""
    cache = Path(torch.hub.get_dir()).parent / 'mmvil'
    temporary = Path(tempfile.gettempdir()) / f'mmvil_{os.getuid()}'
    return [temporary] if cache.parts[0] == '~' else [cache, temporary]  # a user without a home


def _files(key: CacheKey) -> list[Path]:
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return [folder / f'kernels_{digest}.json' for folder in _folders()]


def _file_to_write(files: list[Path]) -> Path:
    return next(filter(_is_writable, files), files[-1])


def _is_writable(file: Path) -> bool:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(file.parent, os.W_OK)


def _read(file: Path, key: CacheKey) -> Verdict | None:
    """Read a verdict, or None if there is no valid one."""
    try:
        content = json.loads(file.read_text())
        problem = content['problem']
        known = content['subject'] == key._asdict() and time.time() < content['until']
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return Verdict(problem) if known and isinstance(problem, (str, type(None))) else None


def _test_or_wait(file: Path, key: CacheKey, index: int) -> Verdict:
    """Test, or wait for the verdict of another process that does."""
    deadline = time.monotonic() + TIMEOUT + 60
    try:
        lock = file.with_suffix(f'.{os.getuid()}.lock').open('w')  # others could not open it
    except OSError as error:
        _logger.warning(f'GPU kernels are tested in every process, as nothing can be kept: {error}')
        return _test(key, index)
    with lock:
        while not _acquire(lock.fileno()):
            if verdict := _read(file, key):  # the lock lives on in forks of its process
                return verdict
            if time.monotonic() > deadline:
                problem = f'timed out waiting for the process with {lock.name}'
                return Verdict(problem, days=0)
            time.sleep(0.2)
        verdict = _read(file, key)
        if verdict is None:
            verdict = _test(key, index)
            if verdict.days:
                _store(file, key, verdict)
        return verdict


def _acquire(lock: int) -> bool:
    """Take a lock, which its process releases when it ends, or return False if another has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system: test in every process
        pass
    return True


def _store(file: Path, key: CacheKey, verdict: Verdict) -> None:
    """Write a verdict atomically, for all users to read."""
    until = time.time() + 86400 * verdict.days
    content = dict(subject=key._asdict(), problem=verdict.problem, until=until)
    partial = file.with_suffix(f'.{uuid.uuid4().hex}.tmp')
    try:
        partial.write_text(json.dumps(content, indent=2))
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        _logger.warning(f'GPU kernels are tested in every process, as nothing can be kept: {error}')


# -- The test in a separate process ----------------------------------------------------------------


def _test(key: CacheKey, index: int) -> Verdict:
    _logger.info(f'Testing the GPU kernels, once for this machine: {key}.')
    path = [*sys.path, Path(__file__).parents[3]]  # the last for programs that change directory
    try:
        process = subprocess.Popen(
            _command(key, index),
            env={**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, filter(None, path)))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors='replace',
            start_new_session=True,  # so that its compilers end with it
        )
    except OSError as error:
        return Verdict(f'could not start: {error}', days=0)
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        # Perhaps the machine was overloaded.
        return Verdict(f'gave no result within {TIMEOUT} seconds', days=1)
    finally:
        if process.poll() is None:  # hangs, or this process is interrupted: end its children, too
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # in a driver, where signals do not arrive
                process.communicate(timeout=10)
    last_line = (out.strip() or err.strip() or 'no output').splitlines()[-1]
    status = process.returncode
    if status == 0:
        return Verdict(None)
    if status == FAILED:
        return Verdict(last_line)
    if status == IMPOSSIBLE:
        return Verdict(f'was impossible: {last_line}', days=0)
    if status < 0:
        name = signal.Signals(-status).name
        ended_by_others = name in ('SIGKILL', 'SIGTERM', 'SIGINT', 'SIGHUP')
        return Verdict(f'crashed with {name}', days=0 if ended_by_others else math.inf)
    error = (err.strip() or last_line).splitlines()[-1]
    return Verdict(f'could not run: {error}', days=0)


def _command(key: CacheKey, index: int) -> list[str]:
    return [sys.executable, *_arguments(key, index)]


def _arguments(key: CacheKey, index: int) -> list[str]:
    arguments = ['-m', f'{__package__}.self_test', f'--device=cuda:{index}']
    arguments += [f'--dtype={key.dtype}', f'--head-width={key.head_width}']
    return arguments + ['--tf32'] * key.tf32
