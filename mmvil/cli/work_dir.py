# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Work dir of a training: its lock, its checkpoints, where to resume."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mmengine.config import Config

from ..checkpoints.atomic import ATOMIC, PARTIAL
from ..checkpoints.resume import find_good_checkpoint, verify
from ..checkpoints.safe_load import DamagedCheckpointError
from ..checkpoints.sharded import is_sharded
from .errors import UserError, is_first_process


def save_atomically(cfg: Config) -> list[str]:
    """Let checkpoints on local disks appear when they are complete.

    Args:
        cfg (Config): Of a training; its checkpoint hook is changed.

    Returns:
        list[str]: Warnings for the log.
    """
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    if hook and '://' not in str(hook.get('out_dir')) and 'file_client_args' not in hook:
        hook.setdefault('backend_args', ATOMIC)
    if hook and hook.get('max_keep_ckpts') == 1:
        hook.max_keep_ckpts = 2
        return ['keeping 2 checkpoints: of 1, mmengine removes it before it writes the next']
    return []


def find_resumable(work_dir: str, trusted: bool = False) -> tuple[str | None, list[str]]:
    """Find the newest complete checkpoint in a work dir.

    Args:
        work_dir (str): The folder.
        trusted (bool): Checkpoints in it may run code. Default: False.

    Returns:
        tuple: Its path, or None where there is no checkpoint; and warnings for the log.

    Raises:
        UserError: If there are checkpoints, but none is complete.
    """
    newest, complaints = find_good_checkpoint(work_dir, trusted)
    if newest is not None:
        return newest, [*complaints, f'resuming from {newest}']
    if complaints:
        raise UserError(
            f'no checkpoint in {work_dir} is complete: {"; ".join(complaints)}. To begin anew, '
            'leave --resume out.'
        )
    return None, [f'nothing to resume in {work_dir}: training begins']


def check_complete(checkpoint: str, trusted: bool = False) -> None:
    """Check that the checkpoint to resume from is complete. Folders and URLs are not checked.

    Raises:
        UserError: If it is damaged.
        UntrustedCheckpointError: If it is not ``trusted`` and may run code.
    """
    try:
        if os.path.isfile(checkpoint):
            verify(checkpoint, trusted)
    except DamagedCheckpointError as error:
        raise UserError(f'{error}; --resume without a name takes the newest good one') from None


def refuse_shards(checkpoint: str) -> None:
    """Raise if a training that is not sharded would resume from a sharded one.

    Raises:
        UserError: If it would: only FSDP can distribute the optimizer's state again.
    """
    if is_sharded(checkpoint):
        raise UserError(
            f'{checkpoint} is of a sharded training: resume it with its own config. To start from '
            f'its weights: --cfg-options load_from={checkpoint}, without --resume.'
        )


@contextmanager
def lock_work_dir(work_dir: str) -> Iterator[None]:
    """Keep other trainings out of a work dir, and remove what a killed one left half written.

    Rank 0 holds the lock for all ranks. The operating system releases it when the process ends,
    however it ends. Where the system or the file system has no locks, nothing is locked.

    Raises:
        UserError: If another training is running there, or files cannot be made.
    """
    if not is_first_process():
        yield
        return
    path = Path(work_dir, '.lock')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open('a+')
    except OSError as error:
        raise UserError(
            f'cannot write to the work dir {os.path.abspath(work_dir)}: {error.strerror}. Choose '
            'another by --work-dir.'
        ) from error
    with file:
        if _lock(file):
            file.truncate(0)
            file.write(f'process {os.getpid()} on {os.uname().nodename}, since {time.ctime()}')
            file.flush()
            for leftover in path.parent.glob('*' + PARTIAL):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield


def _lock(file: IO) -> bool:
    try:
        import fcntl

        # Unlike flock, not inherited by worker processes, which may outlive a killed training.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(
            f'another training is running in {os.path.dirname(file.name)}: {file.read().strip()}. '
            'Wait for it, or choose another folder by --work-dir.'
        ) from None
    except (ImportError, OSError):  # not a POSIX system, or a file system without locks
        return False
    return True
