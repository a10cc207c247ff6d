# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Errors that users can fix, reported in one line."""

import errno
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mmvil

from ..checkpoints.safe_load import UntrustedCheckpointError
from ..engine import SampleError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
PATH_ERRORS = (errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EPERM, errno.EROFS)


class UserError(Exception):
    """Error that the user can fix. The message states the problem and how to fix it."""


def is_first_process() -> bool:
    """Whether this is rank 0 according to the launcher's environment, before processes connect."""
    return os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0')) == '0'


def user_message(error: Exception) -> str | None:
    """Return one line for an error that the user can fix, None for any other.

    The user can fix a ``UserError``, a ``ValueError`` raised by mmvil itself about an argument, an
    unusable sample, a non-finite loss, an unusable path, and a full disk.
    """
    if isinstance(error, SampleError):  # in a worker process, torch packs it into its trace
        return str(error).strip().splitlines()[-1].rpartition('SampleError: ')[2]
    if isinstance(error, UntrustedCheckpointError):
        return f'{error}. If you trust its source, add --trust-checkpoint.'
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in PATH_ERRORS:
            return f'{error.strerror}: {error.filename}'
        if error.errno not in DISK_ERRORS:
            return None
        file = f' while writing {error.filename}' if error.filename else ''
        return (
            f'{error.strerror}{file}. Earlier checkpoints are complete; continue with '
            '--resume when there is space.'
        )
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_ours = raised_in.is_relative_to(Path(mmvil.__file__).parent)
    return str(error) if is_ours or isinstance(error, (UserError, FloatingPointError)) else None


def one_line(error: Exception) -> str:
    """Type and message of an exception in one line."""
    if 'need at least one array to concatenate' in str(error):  # numpy, in mmengine's BaseDataset
        return 'a dataset has no samples; does the config name the classes of its annotations?'
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


@contextmanager
def as_user_error(what: str, kinds: type | tuple = Exception) -> Iterator[None]:
    """Convert errors of some kinds within the block to a ``UserError`` that says what failed."""
    try:
        yield
    except kinds as error:
        raise UserError(f'{what}: {one_line(error)}') from error
