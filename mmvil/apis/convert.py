# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Checkpoints of Vision-LSTM: read without trust, converted, fetched by name.

Importing this lets mmengine load the official checkpoints by ``mmvil://NAME`` and by their URL, in
``init_cfg``, ``load_from`` and wherever else it takes a checkpoint.
"""

import hashlib
import os
import pickle
import re
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import barrier, get_dist_info
from mmengine.runner import CheckpointLoader
from torch import Tensor

from ..backbones import VisionLSTM
from ..checkpoints import (
    OFFICIAL_URL,
    OfficialCheckpoint,
    find_official,
    infer_architecture,
    is_official,
    official_names,
    vil_to_mmvil,
)
from ..version import __version__

# ------------------------------------------------------------------------------------------ reading


def read_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """Read a checkpoint that may come from anywhere: nothing in it is executed.

    Args:
        path (str | Path): The file.

    Returns:
        dict: What it holds, on the CPU; under 'state_dict' a dict of tensors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, damaged, or cannot be read without executing code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'Checkpoint not found: {path.absolute()}')
    with path.open('rb') as file:
        start = file.read(4)
    if not start.startswith((b'PK\x03\x04', b'\x80')):  # a zip file, a pickle of older PyTorch
        raise ValueError(f'{path} is not a PyTorch checkpoint.')
    if start.startswith(b'PK') and not zipfile.is_zipfile(path):
        raise ValueError(f'{path} is truncated: its table of contents, at the end, is missing.')
    try:
        with _numpy_numbers_allowed():
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        named = re.findall(r'(?:GLOBAL|global|class|[Ff]unction)\W+([\w.]+\.\w+)', str(error))
        if isinstance(error, pickle.UnpicklingError) and named or 'TorchScript' in str(error):
            raise ValueError(
                f'{path} is refused, because reading it would execute code '
                f'({named[0] if named else "TorchScript"}), which could do anything. If you trust '
                'its source, let PyTorch read it with weights_only=False and save '
                "dict(state_dict=checkpoint['state_dict']) to another file."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f'{path} is truncated or damaged: {reason}') from error
    if isinstance(checkpoint, Mapping) and 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    if not isinstance(checkpoint, Mapping) or not _is_state_dict(checkpoint['state_dict']):
        raise ValueError(f'{path} holds no state dict, that is, names with tensors.')
    return checkpoint


def _numpy_numbers_allowed():
    """Training code leaves NumPy's numbers in checkpoints, which are as harmless as Python's."""
    if not hasattr(torch.serialization, 'safe_globals'):  # before PyTorch 2.5
        return nullcontext()
    scalar = np.float64(0).__reduce__()[0]
    names = ('numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar')
    kinds = ('bool', 'int32', 'int64', 'float16', 'float32', 'float64')
    return torch.serialization.safe_globals(
        [*((scalar, name) for name in names), np.dtype, *(type(np.dtype(kind)) for kind in kinds)]
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(x, Tensor) for x in value.values())
    )


# --------------------------------------------------------------------------------------- converting


def convert_checkpoint(path: Union[str, Path], stride: Optional[int] = None) -> Dict[str, Any]:
    """Convert an official checkpoint to one of mmpretrain's ``ImageClassifier``.

    Version, width, depth, patch size, image size and number of classes are read off the tensors.
    The stride of the patches is not in them. It is, in this order, ``stride``, what the training
    code noted in the file, what the name of the file says, or the patch size.

    Args:
        path (str | Path): An official file, in the layout of the training checkpoints or of the
            standalone models. It is read without executing anything in it.
        stride (int, optional): Pixels from patch to patch.

    Returns:
        dict: ``state_dict``, and in ``meta`` the text of a config with the model (``cfg``), the
        name of the source file (``source``) and its SHA-256 (``source_sha256``), and what was found
        out about the model (``architecture``, with ``stride_from`` where the stride comes from).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a Vision-LSTM in an official layout or not safe to read, or
            has missing, extra or misshapen tensors; all of them are named.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    source = checkpoint['state_dict']
    if not is_official(source):
        ours = any(re.match(r'(backbone\.)?layers\.\d+\.igate\.', name) for name in source)
        raise ValueError(
            f"{path} already has mmvil's layout; use it as it is."
            if ours
            else f'{path} is not a Vision-LSTM in an official layout: it has no mLSTM cells, '
            f"neither 'xlstm.blocks.*.mlstm_cell.*' nor 'blocks.*.mlstm_cell.*', but "
            f'{", ".join(list(source)[:3])} …'
        )
    names = official_names(source)
    known = {official: source[official] for official, name in names.items() if name is not None}
    state_dict = {
        name: value.to(torch.promote_types(known_value.dtype, torch.float32))
        for (name, value), known_value in zip(vil_to_mmvil(known).items(), known.values())
    }
    try:
        architecture = infer_architecture(state_dict)
    except ValueError as error:
        raise ValueError(f'{path} is no complete Vision-LSTM classifier. {error}') from error
    architecture['stride'], architecture['stride_from'] = _find_stride(
        stride, checkpoint, path, architecture['patch_size']
    )
    model = _classifier_config(architecture)
    _check_complete(path, state_dict, names, model)
    return dict(
        state_dict=state_dict,
        meta=dict(
            cfg=Config(dict(default_scope='mmpretrain', model=model)).pretty_text,
            architecture=architecture,
            source=path.name,
            source_sha256=_sha256(path),
            mmvil_version=__version__,
        ),
    )


def _find_stride(
    given: Optional[int], checkpoint: Mapping, path: Path, patch_size: int
) -> Tuple[int, str]:
    noted = checkpoint.get('ctor_kwargs')
    noted = noted.get('stride') if isinstance(noted, Mapping) else None
    noted = noted[0] if isinstance(noted, (list, tuple)) and noted else noted
    by_name = re.search(r'stride(\d+)', path.stem)
    if given is not None:
        return given, 'as given'
    if isinstance(noted, int):
        return noted, 'noted in the file'
    if by_name:
        return int(by_name[1]), 'by the name of the file'
    return patch_size, 'assumed: the patch size, because tensors do not tell'


def _classifier_config(architecture: Mapping) -> dict:
    """Config of the ``ImageClassifier``."""
    sizes = {key: architecture[key] for key in ('embed_dims', 'depth')}
    names = [name for name, value in VisionLSTM.arch_settings.items() if value == sizes]
    backbone = dict(
        type='mmvil.VisionLSTM',
        arch=names[-1] if names else sizes,  # 'tiny' rather than 't'
        version=architecture['version'],
        img_size=architecture['img_size'],
        patch_size=architecture['patch_size'],
        stride=architecture['stride'],
        in_channels=architecture['in_channels'],
        out_type=architecture['out_type'],
    )
    pooled = 2 if architecture['out_type'] == 'bilateral_concat' else 1
    return dict(
        type='ImageClassifier',
        data_preprocessor=dict(
            num_classes=architecture['num_classes'],
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            to_rgb=True,
        ),
        backbone=backbone,
        head=dict(
            type='LinearClsHead',
            num_classes=architecture['num_classes'],
            in_channels=pooled * architecture['embed_dims'],
            loss=dict(type='CrossEntropyLoss'),
        ),
    )


def _check_complete(
    path: Path, state_dict: Mapping[str, Tensor], names: Mapping[str, Optional[str]], model: dict
) -> None:
    """Compare names and shapes with those of the model.

    Raises:
        ValueError: Naming every tensor that is missing, extra or misshapen.
    """
    kwargs = {key: value for key, value in model['backbone'].items() if key != 'type'}
    try:
        with torch.device('meta'):
            backbone = VisionLSTM(**kwargs)
    except ValueError as error:
        raise ValueError(f'{path} is no Vision-LSTM that can be built: {error}') from error
    head = model['head']
    wanted = {f'backbone.{name}': tuple(x.shape) for name, x in backbone.state_dict().items()}
    wanted['head.fc.weight'] = (head['num_classes'], head['in_channels'])
    wanted['head.fc.bias'] = (head['num_classes'],)

    official = {name: key for key, name in names.items()}
    given = {name: tuple(value.shape) for name, value in state_dict.items()}
    missing = [name for name in wanted if name not in given]
    extra = [key for key, name in names.items() if name not in wanted]
    misshapen = [
        f'{official[name]}: {given[name]} instead of {shape}'
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    complaints = [
        f'{kind} {len(tensors)}: {", ".join(tensors)}.'
        for kind, tensors in (
            ('Missing tensors (as they are called here),', missing),
            ('Extra tensors,', extra),
            ('Misshapen tensors,', misshapen),
        )
        if tensors
    ]
    if complaints:
        sizes = f'version {backbone.version}, {backbone.embed_dims} wide, {len(backbone.layers)} '
        raise ValueError(
            f'{path} is not the Vision-LSTM that its tensors suggest ({sizes}blocks). '
            + ' '.join(complaints)
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------- fetching


def cached_path(official: OfficialCheckpoint) -> Path:
    """Where mmengine, PyTorch and timm keep an official file after downloading it."""
    return Path(torch.hub.get_dir(), 'checkpoints', official.file)


def fetch_checkpoint(address: str) -> Path:
    """Make sure that an official checkpoint is in the cache. In a distributed run, process 0 goes
    first, and all processes have to call this.

    Args:
        address (str): ``mmvil://NAME`` or the URL, see
            :func:`mmvil.converters.find_official`.

    Returns:
        Path: The file.

    Raises:
        ValueError: If there is no official checkpoint of this name.
        FileNotFoundError: If it can neither be found nor downloaded; the message says which file to
            put where.
    """
    official = find_official(address)
    rank, world_size = get_dist_info()
    if rank == 0:
        _download(official, address)
    if world_size > 1:
        barrier()
        if rank > 0:
            _download(official, address)  # on other machines
    return cached_path(official)


def _download(official: OfficialCheckpoint, address: str) -> None:
    path = cached_path(official)
    if path.is_file():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under a temporary name until it is complete.
        torch.hub.download_url_to_file(official.url, str(path), progress=os.isatty(2))
    except OSError as error:
        raise FileNotFoundError(
            f'{official.file} is not in the cache and cannot be downloaded ({error}). '
            f'On a machine with internet access, download {official.url} and put it at {path}, '
            f'or name your copy of the file instead of {address}.'
        ) from error


@CheckpointLoader.register_scheme(('mmvil://', re.escape(OFFICIAL_URL)), force=True)
def load_from_mmvil(filename: str, map_location=None) -> Dict[str, Any]:
    """How mmengine loads an official checkpoint: fetched, read safely, converted."""
    official = find_official(filename)
    path = fetch_checkpoint(filename)
    try:
        checkpoint = convert_checkpoint(path, stride=official.stride)
    except ValueError as error:
        raise ValueError(f'{error} Remove {path}, and it will be downloaded again.') from error
    if map_location is not None and str(map_location) != 'cpu':
        checkpoint['state_dict'] = {
            name: value.to(map_location) for name, value in checkpoint['state_dict'].items()
        }
    return checkpoint
