# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Work dir of a training run: its lock, its checkpoints, where to resume."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config

from ..checkpoints.atomic import ATOMIC, PARTIAL
from ..checkpoints.resume import find_good_checkpoint, verify
from ..checkpoints.safe_load import DamagedCheckpointError
from ..checkpoints.sharded import is_sharded
from ..engine.config_nodes import default_hook
from .errors import UserError, as_user_error, is_first_process


def save_atomically(cfg: Config) -> list[str]:
    """Make the checkpoint hook of a config write local files atomically.

    Returns:
        list[str]: Warnings for the log.
    """
    hook = default_hook(cfg, 'checkpoint')
    if hook and '://' not in str(hook.get('out_dir')) and 'file_client_args' not in hook:
        hook.setdefault('backend_args', ATOMIC)
    if hook and hook.get('max_keep_ckpts') == 1:
        hook.max_keep_ckpts = 2
        return ['keeping 2 checkpoints: with 1, mmengine removes it before writing the next']
    return []


def choose_checkpoint(cfg: Config, newest: bool = False, trusted: bool = False) -> list[str]:
    """Choose the checkpoint to resume from: ``cfg.load_from`` if it is complete, otherwise the
    newest complete checkpoint in the work dir, or none.

    Args:
        cfg (Config): Training config; ``load_from`` and ``resume`` are set in place.
        newest (bool): Always use the newest one. Default: False.
        trusted (bool): Checkpoints may run code. Default: False.

    Returns:
        list[str]: Warnings for the log.
    """
    work_dir, notes = cfg.work_dir, []
    if newest or cfg.get('load_from') is None:
        found, notes = find_good_checkpoint(work_dir, trusted)
        if notes and found is None:
            raise UserError(
                f'no checkpoint in {work_dir} is complete: {"; ".join(notes)}. To start over, '
                'leave --resume out.'
            )
        nothing = f'nothing to resume in {work_dir}: training begins'
        notes.append(f'resuming from {found}' if found else nothing)
        cfg.resume = found is not None
        cfg.load_from = found or cfg.get('load_from')
    elif os.path.isfile(cfg.load_from):  # neither a folder of shards nor a URL
        try:
            verify(cfg.load_from, trusted)
        except DamagedCheckpointError as error:
            raise UserError(f'{error}; --resume without a name uses the newest good one') from None
    # Only FSDP can distribute the optimizer state again.
    if cfg.resume and cfg.get('strategy') is None and is_sharded(cfg.load_from):
        raise UserError(
            f'{cfg.load_from} is from sharded training: resume it with its own config. To start '
            f'from its weights: --cfg-options load_from={cfg.load_from}, without --resume.'
        )
    return notes


@contextmanager
def lock_work_dir(work_dir: str) -> Iterator[None]:
    """Lock a work dir against other training runs, and remove partial files of a killed one.

    Rank 0 holds the lock for all ranks. The operating system releases it when the process ends in
    any way. Without locks in the system or file system, nothing is locked.
    """
    if not is_first_process():
        yield
        return
    path = Path(work_dir, '.lock').absolute()
    failed = f'cannot write to the work dir {path.parent} (choose another with --work-dir)'
    with as_user_error(failed, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open('a+')
    with file:
        try:
            import fcntl

            # Unlike flock, not inherited by worker processes, which may outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f'another training is running in {path.parent}: {file.read().strip()}. Wait for '
                'it, or choose another folder with --work-dir.'
            ) from None
        except (ImportError, OSError):  # not POSIX, or a file system without locks
            pass
        else:
            file.truncate(0)
            file.write(f'process {os.getpid()} on {os.uname().nodename}, since {time.ctime()}')
            file.flush()
            for leftover in path.parent.glob('*' + PARTIAL):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
