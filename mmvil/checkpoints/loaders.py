# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Load checkpoints from files, folders of shards and the web, directly or through mmengine.

Importing this lets mmengine load the official checkpoints by ``mmvil://NAME`` and by URL, in
``init_cfg``, ``load_from`` and wherever else it accepts a checkpoint.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.runner import CheckpointLoader
from torch import Tensor

from .keys import check_blocks, infer_architecture, vil_to_mmvil
from .official import OFFICIAL_URL, OfficialCheckpoint, find_official
from .safe_load import UntrustedCheckpointError, load_file
from .sharded import join_shards


def load_safely(path: str | os.PathLike, map_location=None) -> dict:
    """Load a checkpoint without running code that it may contain.

    Args:
        path (str): A file, see :func:`mmvil.checkpoints.safe_load.load_file`, or the folder of a
            sharded checkpoint, whose weights are joined.
        map_location: See :func:`torch.load`. Default: None.
    """
    return join_shards(path) if os.path.isdir(path) else load_file(path, map_location)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint from any source without running code, and check that it contains weights.

    Args:
        path (str | Path): The file.

    Returns:
        dict: The checkpoint on the CPU, with a dict of tensors as 'state_dict'.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint, damaged, or cannot be read without running code.
    """
    try:
        checkpoint = load_safely(path, 'cpu')
    except UntrustedCheckpointError as error:
        raise ValueError(
            f'{error}. If you trust its source, load it with torch.load(weights_only=False) and '
            "save dict(state_dict=checkpoint['state_dict']) to another file."
        ) from error
    if not (isinstance(checkpoint, Mapping) and 'state_dict' in checkpoint):
        checkpoint = dict(state_dict=checkpoint)
    state = checkpoint['state_dict']
    if not (isinstance(state, Mapping) and state) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(f'{path} contains no state dict (a mapping from names to tensors).')
    return checkpoint


def register_safe_loaders() -> None:
    """Make mmengine load checkpoints from local files and the web with :func:`load_safely`.

    This covers ``load_from``, ``--resume``, ``init_cfg``, and OpenMMLab's inference functions.
    """

    def load_from_local(filename, map_location=None):
        return load_safely(os.path.expanduser(filename), map_location)

    def load_from_http(filename, map_location=None):
        return load_safely(_fetch(filename), map_location)

    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), load_from_http, force=True)


def cached_path(official: OfficialCheckpoint) -> Path:
    """Path at which mmengine, PyTorch and timm cache an official file."""
    return _cache_path(official.url)


def fetch_checkpoint(address: str) -> Path:
    """Download an official checkpoint unless it is cached, and return its path. A collective call
    of all processes, in which process 0 goes first.

    Args:
        address (str): ``mmvil://NAME`` or the URL, see :func:`mmvil.checkpoints.find_official`.

    Raises:
        ValueError: If there is no official checkpoint with this name.
        FileNotFoundError: If it cannot be downloaded; the message says where to put the file.
    """
    return _fetch(find_official(address).url, address)


@CheckpointLoader.register_scheme(('mmvil://', re.escape(OFFICIAL_URL)), force=True)
def load_from_mmvil(filename: str, map_location=None) -> dict[str, Any]:
    """Load an official checkpoint for mmengine: download, read safely, and convert it.

    Returns:
        dict: ``state_dict``, and ``meta`` with the ``architecture``, the name of the ``source``
        file and its SHA-256 (``source_sha256``).
    """
    path = fetch_checkpoint(filename)
    try:
        state = vil_to_mmvil(read_checkpoint(path)['state_dict'])
        check_blocks(state)  # mmengine would only warn, and continue with random weights
        architecture = dict(infer_architecture(state), stride=find_official(filename).stride)
    except ValueError as error:
        reason = str(error).rstrip('.')
        raise ValueError(f'{reason}. Remove {path}, and it will be downloaded again.') from error
    return dict(
        state_dict={name: value.to(map_location or 'cpu') for name, value in state.items()},
        meta=dict(architecture=architecture, source=path.name, source_sha256=sha256(path)),
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file as a hexadecimal string."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _cache_path(url: str) -> Path:
    return Path(torch.hub.get_dir(), 'checkpoints', os.path.basename(urlparse(url).path))


def _fetch(url: str, address: str = '') -> Path:
    """Download a file unless it is cached, process 0 first."""
    path = _cache_path(url)
    if not is_main_process():
        barrier()
    if not path.is_file():  # in other processes, on other machines only
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Under a temporary name until it is complete.
            torch.hub.download_url_to_file(url, str(path), progress=os.isatty(2))
        except OSError as error:
            raise FileNotFoundError(
                f'{path.name} is not in the cache and cannot be downloaded ({error}). '
                f'On a machine with internet access, download {url} and put it at {path}, '
                f'or name your copy of the file instead of {address or url}.'
            ) from error
    if is_main_process():
        barrier()
    return path
