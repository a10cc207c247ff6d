# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Checkpoints that are whole or not there, and that run no code when they are loaded."""

import os
import pickle
import re
import shutil
import types
import zipfile
from pathlib import Path
from typing import List, Optional, Tuple, Union
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

PARTIAL = '.partial'


class DamagedCheckpointError(ValueError):
    """A file that is no checkpoint, or only a part of one."""


class UntrustedCheckpointError(ValueError):
    """A checkpoint that asks for more than tensors and numbers, and might run code."""


class AtomicLocalBackend(LocalBackend):
    """Local files that appear under their name only when they are complete and on the disk.

    mmengine writes a checkpoint to its final name; killed on the way, or with a full disk, it
    leaves half a file as the newest checkpoint. A ``CheckpointHook`` uses this one instead with
    ``backend_args=dict(backend='mmvil_atomic')``.
    """

    def put(self, obj: Union[bytes, memoryview], filepath: Union[str, os.PathLike]) -> None:
        """Write bytes to a file, or leave it as it was."""
        filepath = os.fspath(filepath)
        folder = os.path.dirname(filepath) or '.'
        os.makedirs(folder, exist_ok=True)
        partial = filepath + PARTIAL
        try:
            with open(partial, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, filepath)
        except BaseException as error:
            if os.path.exists(partial):
                os.remove(partial)
            if isinstance(error, OSError):  # say which file, in words that the caller may show
                raise OSError(error.errno, os.strerror(error.errno or 0), filepath) from error
            raise
        if os.name == 'posix':  # the new name, too, survives a loss of power
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


register_backend('mmvil_atomic', AtomicLocalBackend, force=True)
ATOMIC = dict(backend='mmvil_atomic')  # as mmengine's ``backend_args``


def replace(source: str, target: str) -> None:
    """Give a complete file or folder its final name, which a checkpoint of before may have."""
    if os.path.isdir(target):
        shutil.rmtree(target)
    os.replace(source, target)


def load_safely(path: Union[str, os.PathLike], map_location=None) -> dict:
    """Load a checkpoint file without running code that it may bring along.

    The pickle inside a checkpoint can name any function for Python to call. Here it may name what
    checkpoints are made of: tensors, containers, numbers, NumPy arrays, mmengine's logs. Instead of
    ``torch.load(weights_only=True)``, which refuses the logs, and before PyTorch 2.5 cannot be told
    to take them.

    Args:
        path (str): File, in either of PyTorch's formats; or the folder of a sharded checkpoint,
            whose weights are joined.
        map_location: See :func:`torch.load`. Default: None.

    Raises:
        UntrustedCheckpointError: If the file names something else.
        DamagedCheckpointError: If it cannot be read.
    """
    if os.path.isdir(path):
        from .sharded import join_shards  # which loads files by this function

        return join_shards(path)
    return _load_file(path, map_location, _PICKLE)


def _load_file(path, map_location, pickle_module) -> dict:
    try:
        return torch.load(path, map_location, pickle_module=pickle_module, weights_only=False)
    except UntrustedCheckpointError as error:
        raise UntrustedCheckpointError(f'{path} {error}') from None
    except (FileNotFoundError, PermissionError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # zip, pickle and torch fail in many ways on half a file
        reason = str(error).split('. ')[0].split('\n')[0]
        raise DamagedCheckpointError(
            f'{path} is damaged or no checkpoint: {type(error).__name__}: {reason}'
        ) from error


def check_pickle(path: Union[str, os.PathLike]) -> None:
    """Make sure that a bare pickle can be loaded without running code that it brings along.

    Raises:
        UntrustedCheckpointError: If it names what checkpoints are not made of.
        DamagedCheckpointError: If it is none, or only a part of one.
    """
    try:
        with open(path, 'rb') as file:
            _Unpickler(file).load()
    except UntrustedCheckpointError as error:
        raise UntrustedCheckpointError(f'{path} {error}') from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise DamagedCheckpointError(f'{path} is damaged: {error}') from error


def load_safely_from_now_on() -> None:
    """Let all that mmengine loads from local files and from the web go through ``load_safely``.

    ``load_from``, ``--resume``, ``init_cfg``, and OpenMMLab's inference functions.
    """

    def load_from_local(filename, map_location=None):
        return load_safely(os.path.expanduser(filename), map_location)

    def load_from_http(filename, map_location=None):
        name = os.path.basename(urlparse(filename).path)
        path = os.path.join(torch.hub.get_dir(), 'checkpoints', name)
        if is_main_process() and not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(filename, path)
        barrier()
        return load_safely(path, map_location)

    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), load_from_http, force=True)


def verify(path: Union[str, os.PathLike], trusted: bool = False) -> None:
    """Make sure that a checkpoint file is complete: every byte is there, and it loads.

    Args:
        path (str): The file.
        trusted (bool): It may run code. Default: False.

    Raises:
        DamagedCheckpointError: If it is not complete.
        UntrustedCheckpointError: If it is not trusted and may run code.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            try:
                broken = archive.testzip()
            except (zipfile.BadZipFile, EOFError) as error:
                broken = error
        if broken is not None:
            raise DamagedCheckpointError(f'{path} is damaged: {broken}')
    _load_file(path, 'cpu', pickle if trusted else _PICKLE)


def find_good_checkpoint(
    work_dir: Union[str, os.PathLike], trusted: bool = False
) -> Tuple[Optional[str], List[str]]:
    """Find the newest checkpoint in a work dir that is complete.

    Args:
        work_dir (str): The folder.
        trusted (bool): Checkpoints in it may run code. Default: False.

    Returns:
        tuple: Its path, or None if there is no good one; and for each newer one, what is wrong.
    """
    paths = {path for path in Path(work_dir).glob('*.pth') if _step(path) >= 0}
    named = Path(work_dir, 'last_checkpoint')  # where the hook has another out_dir
    if named.is_file() and named.read_text().strip():
        paths.add(Path(named.read_text().strip()))
    complaints = []
    for path in sorted(filter(Path.exists, paths), key=_age):
        try:
            if path.is_file():  # else the folder that a sharded training writes
                verify(path, trusted)
            return str(path), complaints
        except DamagedCheckpointError as error:
            complaints.append(str(error))
    return None, complaints


def _step(path: Path) -> int:
    match = re.fullmatch(r'(?:iter|epoch)_(\d+)\.pth', path.name)
    return int(match[1]) if match else -1


def _age(path: Path) -> Tuple[float, int]:
    return -path.stat().st_mtime, -_step(path)


# -- What the pickle in a checkpoint may name ------------------------------------------------------

_NUMPY_CORE = ('numpy.core.multiarray', 'numpy._core.multiarray')
_ALLOWED = {
    'builtins': {
        *('bool', 'bytearray', 'bytes', 'complex', 'dict', 'float', 'frozenset', 'int', 'list'),
        *('range', 'set', 'slice', 'str', 'tuple'),
    },
    'collections': {'OrderedDict', 'defaultdict', 'deque'},
    '_codecs': {'encode'},  # bytes, in the protocol that torch.save uses
    'torch': {'Size', 'Tensor', 'device'},
    'torch._tensor': {'_rebuild_from_type_v2'},  # tensors with attributes: FSDP marks its own
    'torch._utils': {'_rebuild_parameter', '_rebuild_tensor', '_rebuild_tensor_v2'},
    'numpy': {'dtype', 'ndarray'},
    **dict.fromkeys(_NUMPY_CORE, {'_reconstruct', 'scalar'}),
    'mmengine.logging.history_buffer': {'HistoryBuffer'},
    # The index of a sharded checkpoint: names, shapes, files.
    'torch.distributed.checkpoint.metadata': {
        *('Metadata', 'MetadataIndex', 'ChunkStorageMetadata', 'TensorStorageMetadata'),
        *('BytesStorageMetadata', 'TensorProperties', 'StorageMeta', '_MEM_FORMAT_ENCODING'),
    },
    'torch.distributed.checkpoint.filesystem': {'_StorageInfo'},
    'torch.serialization': {'_get_layout'},  # by name, from a fixed list
    **dict.fromkeys(('pathlib', 'pathlib._local'), {'PosixPath', 'WindowsPath'}),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        module = 'builtins' if module == '__builtin__' else module
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == 'builtins' and name == 'getattr':
            return _statistics_method
        known = {'torch': torch, 'numpy': np, 'numpy.dtypes': getattr(np, 'dtypes', None)}
        value = getattr(known.get(module), name, None) if '.' not in name else None
        if isinstance(value, (torch.dtype, torch.layout)) or (
            isinstance(value, type) and issubclass(value, (np.generic, np.dtype))
        ):
            return value
        raise UntrustedCheckpointError(
            f'asks for {module}.{name}, which checkpoints of tensors and numbers do not need and '
            'which may run code'
        )


def _statistics_method(owner, name: str):
    """The only attributes that checkpoints look up: mmengine's logs hold methods of their own."""
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(owner, name)
    raise UntrustedCheckpointError(f'asks for the attribute {name!r} of {owner!r}')


def _load(file, **options):
    return _Unpickler(file, **options).load()


_PICKLE = types.SimpleNamespace(__name__='mmvil', Unpickler=_Unpickler, load=_load)
