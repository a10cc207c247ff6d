# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The work dir of a training: its lock, its checkpoints, where to resume."""

import os
import shutil
import time
from pathlib import Path

from ..checkpoints.atomic import ATOMIC, PARTIAL
from ..checkpoints.resume import find_good_checkpoint, verify
from ..checkpoints.safe_load import DamagedCheckpointError
from ..checkpoints.sharded import is_sharded
from .errors import UserError


def save_safely(cfg):
    """Let checkpoints on local disks appear when they are complete, whatever config they are of.

    Returns:
        list[str]: What was changed, for the log.
    """
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    if hook and '://' not in str(hook.get('out_dir')) and 'file_client_args' not in hook:
        hook.setdefault('backend_args', ATOMIC)
    if hook and hook.get('max_keep_ckpts') == 1:
        hook.max_keep_ckpts = 2
        return ['keeping 2 checkpoints: of 1, mmengine removes it before it writes the next']
    return []


def choose_checkpoint(cfg, resume, trusted):
    """For --resume without a name: the newest checkpoint in the work dir that is complete.

    Returns:
        list[str]: What to say about it.
    """
    if not cfg.get('resume'):
        return []
    if resume != 'auto' and cfg.get('load_from') is not None:
        try:
            if os.path.isfile(cfg.load_from):
                verify(cfg.load_from, trusted)
        except DamagedCheckpointError as error:
            raise UserError(f'{error}; --resume without a name takes the newest good one') from None
        return []
    newest, complaints = find_good_checkpoint(cfg.work_dir, trusted)
    if newest is not None:
        cfg.load_from = newest
        return [*complaints, f'resuming from {newest}']
    if complaints:
        raise UserError(
            f'no checkpoint in {cfg.work_dir} is complete: {"; ".join(complaints)}. To begin anew, '
            'leave --resume out.'
        )
    cfg.resume = False
    return [f'nothing to resume in {cfg.work_dir}: training begins']


def refuse_shards_of_others(cfg):
    """Only FSDP can share out the optimizer's state again.

    Raises:
        UserError: If a plain training is to go on from a sharded one.
    """
    if is_sharded(cfg.load_from) and cfg.get('strategy') is None:
        raise UserError(
            f'{cfg.load_from} is of a sharded training: resume it with its own config. To start '
            f'from its weights: --cfg-options load_from={cfg.load_from}, without --resume.'
        )


def lock_work_dir(work_dir):
    """Keep other trainings out of a work dir.

    Returns:
        The lock, or None where there are no locks. The operating system releases it when the
        process ends, in whatever way.

    Raises:
        UserError: If a training is there already, or files cannot be made.
    """
    path = Path(work_dir, '.lock')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open('a+')
    except OSError as error:
        raise UserError(
            f'cannot write to the work dir {os.path.abspath(work_dir)}: {error.strerror}. Choose '
            'another by --work-dir.'
        ) from error
    try:
        import fcntl

        # Of this process alone: worker processes do not inherit it, and may outlive a killed one.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise UserError(
            f'another training is running in {work_dir}: {lock.read().strip()}. Wait for it, or '
            'choose another folder by --work-dir.'
        ) from None
    except (ImportError, OSError):  # not a POSIX system, or a file system without locks
        return None
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {os.uname().nodename}, since {time.ctime()}')
    lock.flush()
    for leftover in path.parent.glob('*' + PARTIAL):  # of a training that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return lock
