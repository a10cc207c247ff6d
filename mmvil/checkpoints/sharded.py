# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Sharded checkpoints: folders to which every process writes its share.

The tensors are written and read by ``torch.distributed.checkpoint``: any number of processes can
read what any other number wrote, including a single one without a process group. Everything that is
not sharded (schedules, logs, the config) is stored next to them in one ordinary checkpoint file.
"""

import errno
import os
import shutil
import warnings

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.runner import save_checkpoint

from .atomic import ATOMIC, PARTIAL, replace
from .safe_load import DamagedCheckpointError, check_pickle, load_file

INDEX = '.metadata'  # torch's name for it
REST = 'rest.pth'
WEIGHTS = 'state_dict'


def require_shards() -> None:
    """Raise a ValueError if the installed PyTorch is too old for sharded checkpoints."""
    if torch.__version__ < (2, 7):
        raise ValueError(
            f'sharded checkpoints need PyTorch 2.7 or later, but this is {torch.__version__}. '
            "Use state_dict_cfg='full', which writes a single file."
        )


def is_sharded(path) -> bool:
    """Whether a path is a folder that :func:`save_shards` wrote."""
    return all(os.path.isfile(os.path.join(path, name)) for name in (INDEX, REST))


def save_shards(folder: str, tensors: dict[str, dict], rest: dict) -> None:
    """Write a checkpoint atomically; a collective call of all processes.

    Args:
        folder (str): Target, on a disk that all machines share.
        tensors (dict[str, dict]): Nested dicts of sharded tensors, such as ``state_dict``.
        rest (dict): The rest of the checkpoint, equal in all processes.

    Raises:
        OSError: If it cannot be written, for instance because the disk is full.
    """
    from torch.distributed import checkpoint

    folder = os.fspath(folder).rstrip('/')
    partial = folder + PARTIAL
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)  # left over from an interrupted run
    barrier()
    try:
        checkpoint.save(tensors, checkpoint_id=partial)
    except checkpoint.CheckpointException as error:  # one for all processes
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0]
        if 'inline_container' in str(cause):  # torch's check of the written bytes
            cause = OSError(errno.EIO, 'No more could be written (is the disk full?)', folder)
        raise cause from error
    if is_main_process():
        save_checkpoint(rest, os.path.join(partial, REST), backend_args=ATOMIC)
        replace(partial, folder)
    barrier()


def load_rest(folder: str) -> dict:
    """Load the part that is not sharded. Raises like :func:`load_file`."""
    return load_file(os.path.join(folder, REST), 'cpu')


def load_shards(folder: str, tensors: dict[str, dict]) -> None:
    """Load tensors in place into nested dicts, by the names under which they were saved; a
    collective call of all processes.

    Raises:
        UntrustedCheckpointError: If the folder's index might run code.
        DamagedCheckpointError: If a tensor is missing or has another shape, or the checkpoint
            cannot be read.
    """
    from torch.distributed import checkpoint

    try:
        checkpoint.load(tensors, storage_reader=_reader(folder))
    except checkpoint.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        reason = str(cause).split('\n')[0]
        raise DamagedCheckpointError(
            f'{folder} is damaged or from another model: {type(cause).__name__}: {reason}'
        ) from error


def join_shards(folder: str) -> dict:
    """Join a sharded checkpoint into an ordinary one, in a single process without a GPU.

    Returns:
        dict: The checkpoint with full tensors on the CPU, without optimizer state.

    Raises:
        UntrustedCheckpointError, DamagedCheckpointError: See :func:`load_shards`.
        ValueError: See :func:`require_shards`.
    """
    require_shards()
    from torch.distributed import checkpoint

    reader = _reader(folder)
    prefix = WEIGHTS + '.'
    weights = {
        name.removeprefix(prefix): torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix)
    }
    with warnings.catch_warnings():  # about the missing process group
        warnings.simplefilter('ignore', UserWarning)
        checkpoint.load({WEIGHTS: weights}, storage_reader=reader, no_dist=True)
    rest = load_rest(folder)
    rest.pop('optimizer', None)
    return {**rest, WEIGHTS: weights}


def _reader(folder: str):
    """A reader of tensors whose index, a pickle, has been checked."""
    from torch.distributed.checkpoint import FileSystemReader

    check_pickle(os.path.join(folder, INDEX))
    return FileSystemReader(folder)
