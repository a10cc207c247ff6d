# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Read checkpoint files without running code that they may contain."""

import os
import pickle
import types
import zipfile

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler


class DamagedCheckpointError(ValueError):
    """A file that is not a checkpoint, or incomplete."""


class UntrustedCheckpointError(ValueError):
    """A checkpoint that needs more than tensors and numbers, and may run code."""


def load_file(path: str | os.PathLike, map_location=None, trusted: bool = False) -> dict:
    """Load a checkpoint file in either of PyTorch's formats.

    The pickle inside a checkpoint can make Python call any function. Here it may only use the
    contents of usual checkpoints: tensors, containers, numbers, NumPy arrays, and mmengine's logs,
    which ``torch.load(weights_only=True)`` cannot be configured to accept before PyTorch 2.5.

    Args:
        path (str): The file.
        map_location: See :func:`torch.load`. Default: None.
        trusted (bool): Allow everything, including running code. Default: False.

    Raises:
        FileNotFoundError: If there is no such file.
        UntrustedCheckpointError: If the file uses anything else.
        DamagedCheckpointError: If it cannot be read.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f'Checkpoint not found: {os.path.abspath(path)}')
    pickle_module = pickle if trusted else _PICKLE
    try:
        if not trusted and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                files = [name.rpartition('/')[2] for name in archive.namelist()]
            if 'constants.pkl' in files:  # a TorchScript archive
                raise UntrustedCheckpointError('is TorchScript, which may run code')
        return torch.load(path, map_location, pickle_module=pickle_module, weights_only=False)
    except UntrustedCheckpointError as error:
        raise UntrustedCheckpointError(f'{path} {error}') from None
    except (PermissionError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # truncated files fail in many ways in zip, pickle and torch
        reason = str(error).split('. ')[0].split('\n')[0]
        raise DamagedCheckpointError(
            f'{path} is damaged or not a checkpoint: {type(error).__name__}: {reason}'
        ) from error


def check_pickle(path: str | os.PathLike) -> None:
    """Check that a bare pickle can be loaded without running code that it contains.

    Raises:
        UntrustedCheckpointError: If it uses anything that checkpoints do not need.
        DamagedCheckpointError: If it is not a pickle, or incomplete.
    """
    try:
        with open(path, 'rb') as file:
            _Unpickler(file).load()
    except UntrustedCheckpointError as error:
        raise UntrustedCheckpointError(f'{path} {error}') from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise DamagedCheckpointError(f'{path} is damaged: {error}') from error


# -- Names that the pickle in a checkpoint may use -------------------------------------------------

_NUMPY_CORE = ('numpy.core.multiarray', 'numpy._core.multiarray')
_ALLOWED = {
    'builtins': {
        *('bool', 'bytearray', 'bytes', 'complex', 'dict', 'float', 'frozenset', 'int', 'list'),
        *('range', 'set', 'slice', 'str', 'tuple'),
    },
    'collections': {'Counter', 'OrderedDict', 'defaultdict', 'deque'},
    '_codecs': {'encode'},  # bytes, in the protocol that torch.save uses
    'torch': {'Size', 'Tensor', 'device'},
    'torch._tensor': {'_rebuild_from_type_v2'},  # tensors with attributes, which FSDP sets
    'torch._utils': {'_rebuild_parameter', '_rebuild_tensor', '_rebuild_tensor_v2'},
    'numpy': {'dtype', 'ndarray'},
    **dict.fromkeys(_NUMPY_CORE, {'_reconstruct', 'scalar'}),
    'mmengine.logging.history_buffer': {'HistoryBuffer'},
    'mmengine.optim.scheduler.param_scheduler': {'OneCycleParamScheduler'},
    # The index of a sharded checkpoint: names, shapes, files.
    'torch.distributed.checkpoint.metadata': {
        *('Metadata', 'MetadataIndex', 'ChunkStorageMetadata', 'TensorStorageMetadata'),
        *('BytesStorageMetadata', 'TensorProperties', 'StorageMeta', '_MEM_FORMAT_ENCODING'),
    },
    'torch.distributed.checkpoint.filesystem': {'_StorageInfo'},
    'torch.serialization': {'_get_layout'},  # by name, from a fixed list
    **dict.fromkeys(('pathlib', 'pathlib._local'), {'PosixPath', 'WindowsPath'}),
}


# The only attributes that checkpoints use: methods stored by mmengine's logs and schedulers.
_METHODS = {
    HistoryBuffer: ('min', 'max', 'mean', 'current'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        module = 'builtins' if module == '__builtin__' else module
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == 'builtins' and name == 'getattr':
            return _method
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


def _method(owner, name: str):
    if isinstance(owner, type) and name in _METHODS.get(owner, ()):
        return getattr(owner, name)
    raise UntrustedCheckpointError(f'asks for the attribute {name!r} of {owner!r}')


def _load(file, **options):
    return _Unpickler(file, **options).load()


_PICKLE = types.SimpleNamespace(__name__='mmvil', Unpickler=_Unpickler, load=_load)
