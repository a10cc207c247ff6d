# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Convert official Vision-LSTM checkpoints to checkpoints of mmpretrain's ``ImageClassifier``."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from ..backbones import VisionLSTM
from ..checkpoints import (
    cached_path,
    describe_misfit,
    fetch_checkpoint,
    infer_architecture,
    official_names,
    read_checkpoint,
    vil_to_mmvil,
)
from ..checkpoints.loaders import sha256
from ..version import __version__

__all__ = ['cached_path', 'convert_checkpoint', 'fetch_checkpoint', 'read_checkpoint']


def convert_checkpoint(path: str | Path, stride: int | None = None) -> dict[str, Any]:
    """Convert an official checkpoint to one for mmpretrain's ``ImageClassifier``.

    The architecture is inferred from the tensors. The patch stride is not in them; it is taken
    from, in this order, ``stride``, metadata of the training code in the file, the file name, or
    the patch size.

    Args:
        path (str | Path): An official file, in the layout of the training checkpoints or of the
            standalone models. It is read without running any code in it.
        stride (int, optional): Step between patches in pixels.

    Returns:
        dict: ``state_dict``, and ``meta`` with the text of a model config (``cfg``), the name of
        the source file (``source``) and its SHA-256 (``source_sha256``), and the sizes of the model
        (``architecture``, with the origin of the stride in ``stride_from``).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a Vision-LSTM in an official layout, is not safe to read, or
            has missing, unknown or misshapen tensors, all of which are listed.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    state = checkpoint['state_dict']
    source = {name.removeprefix('module.'): value for name, value in state.items()}
    if any(re.match(r'(backbone\.)?layers\.\d+\.igate\.', name) for name in source):
        raise ValueError(f"{path} already has mmvil's layout; use it as it is.")
    try:
        names = official_names(source)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    unknown = {key: source[key] for key, name in names.items() if name is None}
    known = {key: source[key] for key, name in names.items() if name is not None}
    state_dict = {
        name: value.to(torch.promote_types(original.dtype, torch.float32))
        for (name, value), original in zip(vil_to_mmvil(known).items(), known.values())
    }
    architecture = describe_architecture(state_dict, checkpoint, path, stride)
    model = _classifier_config(architecture)
    _check_complete(path, {**state_dict, **unknown}, model)
    return dict(
        state_dict=state_dict,
        meta=dict(
            cfg=Config(dict(default_scope='mmpretrain', model=model)).pretty_text,
            architecture=architecture,
            source=path.name,
            source_sha256=sha256(path),
            mmvil_version=__version__,
        ),
    )


def describe_architecture(
    state_dict: Mapping, checkpoint: Mapping, path: str | Path, stride: int | None = None
) -> dict[str, Any]:
    """Infer the sizes of a classifier, and find its stride with its origin, ``stride_from``."""
    try:
        sizes = infer_architecture(state_dict)
    except ValueError as error:
        raise ValueError(f'{path} is not a complete Vision-LSTM classifier. {error}') from error
    origin = 'as given'
    if stride is None:
        stride, origin = find_stride(checkpoint, path, sizes['patch_size'])
    return dict(sizes, stride=stride, stride_from=origin)


def find_stride(checkpoint: Mapping, path: str | Path, patch_size: int) -> tuple[int, str]:
    """Find the patch stride, which the tensors do not contain, and its origin: metadata in our, the
    authors' or mmengine's checkpoint, the file name, or the assumption that patches do not overlap.
    """
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    stored = _read_stored_config(meta.get('cfg'))
    for notes in (meta.get('architecture'), stored, checkpoint.get('ctor_kwargs')):
        noted = notes.get('stride') if isinstance(notes, Mapping) else None
        noted = noted[0] if isinstance(noted, (list, tuple)) and noted else noted
        if isinstance(noted, int):
            return noted, 'noted in the file'
    if by_name := re.search(r'stride(\d+)', Path(path).stem):
        return int(by_name[1]), 'by the name of the file'
    return patch_size, 'assumed: the patch size, because tensors do not tell'


def _read_stored_config(text: Any) -> dict[str, int]:
    """Read the patch stride from the config text that mmengine stores, without executing it."""
    try:
        tree = ast.parse(text) if isinstance(text, str) else ast.Module([], [])
    except SyntaxError:
        return {}
    for node in ast.walk(tree):
        options = {each.arg: each.value for each in getattr(node, 'keywords', ())}
        options = {k: v.value for k, v in options.items() if isinstance(v, ast.Constant)}
        if str(options.get('type')).endswith('VisionLSTM'):
            return dict(stride=options.get('stride') or options.get('patch_size', 16))
    return {}


def _classifier_config(architecture: Mapping) -> dict:
    """Build the config of the ``ImageClassifier``."""
    sizes = {key: architecture[key] for key in ('embed_dims', 'depth')}
    names = [name for name, value in VisionLSTM.arch_settings.items() if value == sizes]
    same = ('version', 'img_size', 'patch_size', 'stride', 'in_channels', 'out_type')
    backbone = dict(
        type='mmvil.VisionLSTM',
        arch=names[-1] if names else sizes,  # 'tiny' rather than 't'
        **{key: architecture[key] for key in same},
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


def _check_complete(path: Path, state_dict: Mapping[str, Tensor], model: dict) -> None:
    """Raise a ValueError that lists all missing, unknown or misshapen tensors."""
    kwargs = {key: value for key, value in model['backbone'].items() if key != 'type'}
    head = model['head']
    try:
        with torch.device('meta'):
            backbone = VisionLSTM(**kwargs)
            fc = torch.nn.Linear(head['in_channels'], head['num_classes'])
    except ValueError as error:
        raise ValueError(f'{path} is no Vision-LSTM that can be built: {error}') from error
    wanted = {**backbone.state_dict(prefix='backbone.'), **fc.state_dict(prefix='head.fc.')}
    if mismatch := describe_misfit(state_dict, wanted, strict=True, limit=None):
        raise ValueError(
            f'{path} is not the Vision-LSTM that its tensors suggest (version {backbone.version}, '
            f'{backbone.embed_dims} wide, {len(backbone.layers)} blocks). By the names of mmvil, '
            f'{mismatch}.'
        )
