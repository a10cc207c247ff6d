# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Build classifiers by name."""

import fnmatch
import functools
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader

from ..backbones import VisionLSTM
from ..checkpoints import (
    OFFICIAL_CHECKPOINTS,
    describe_misfit,
    find_official,
    read_checkpoint,
    weights_of,
)


def list_models(pattern: str | None = None) -> list[str]:
    """List the names of the published classifiers, which :func:`get_model` builds.

    Args:
        pattern (str, optional): Prefix of the names to list; ``*`` matches anything.

    Returns:
        list[str]: The names, sorted.

    Example:
        >>> mmvil.list_models('vil2')
        ['vil2-base', 'vil2-small', 'vil2-tiny', 'vil2-tiny-e400']
    """
    names = sorted(official.model for official in OFFICIAL_CHECKPOINTS)
    return fnmatch.filter(names, f'{pattern or ""}*')


def get_model(
    name: str,
    pretrained: bool | str | Path = False,
    device: str | torch.device | None = None,
    num_classes: int | None = None,
    out_indices: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> BaseModel:
    """Build an mmpretrain classifier by name.

    Called with normalized images, shape (B, 3, H, W), it returns logits (B, classes);
    ``extract_feat(images)`` returns the input of the linear layer. ``mmpretrain.inference_model(
    model, 'cat.jpg')`` takes files.

    Args:
        name (str): One of :func:`list_models`.
        pretrained (bool | str | Path): True for the published weights, which are downloaded once
            and cached, or an mmvil or official checkpoint as path, URL or ``mmvil://NAME``.
            Default: False, random weights.
        device (str | torch.device, optional): Device of the model.
        num_classes (int, optional): Number of classes. The linear layer of a checkpoint with other
            classes is not loaded, nor are the names of its classes.
        out_indices (int | Sequence[int], optional): Omit the classifier and return the feature maps
            (B, D, h, w) after these blocks as a tuple.
        **kwargs: Other settings of the model config, such as ``backbone=dict(img_size=384)``.

    Returns:
        ImageClassifier: The model, in evaluation mode.

    Raises:
        ImportError: If mmpretrain is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such model, or the checkpoint does not fit, is damaged, or might
            run code.
        TypeError: If an option of the backbone is given to the model.

    Example:
        >>> logits = mmvil.get_model('vil2-tiny', pretrained=True)(images)
        >>> maps = mmvil.get_model('vil2-base', out_indices=(7, 11, 15, 23))(images)
    """
    names = list_models()
    if name not in names:
        raise ValueError(f'Unknown model {name!r}; choose from {", ".join(names)}.')
    options = inspect.signature(VisionLSTM).parameters.keys() - {'init_cfg'}  # models have one, too
    if misplaced := [f'{option}={kwargs[option]!r}' for option in kwargs if option in options]:
        raise TypeError(
            'These are options of the backbone: '
            f'get_model({name!r}, backbone=dict({", ".join(misplaced)})).'
        )
    _register_mmpretrain('get_model()')
    import mmpretrain

    def add(part, **settings):
        kwargs[part] = dict(**settings, **kwargs.get(part) or {})

    if num_classes is not None:
        add('head', num_classes=num_classes)
        add('data_preprocessor', num_classes=num_classes)
    if out_indices is not None:
        kwargs['head'] = None
        add('backbone', out_indices=out_indices, out_type='featmap')
    model = mmpretrain.get_model(name, pretrained=False, **kwargs)
    named = len(model._dataset_meta['classes'])
    if getattr(model.head, 'num_classes', named) != named:
        model._dataset_meta = {}  # the names are those of ImageNet's classes
    if pretrained not in (False, None):
        address = f'mmvil://{find_official(name).name}' if pretrained is True else str(pretrained)
        _load(model, address, keep_head=num_classes is not None)
    return model.to(device) if device is not None else model


def _load(model: BaseModel, address: str, keep_head: bool) -> None:
    """Load a classifier's checkpoint; unlike mmengine, raise a ValueError if it does not fit."""
    if '://' in address:
        checkpoint = CheckpointLoader.load_checkpoint(address, map_location='cpu')
    else:
        checkpoint = read_checkpoint(Path(address).expanduser())  # unlike mmengine, runs no code
    state = model.backbone.adapt_pretrained(weights_of(checkpoint), 'backbone.')
    own = model.state_dict()
    meta = checkpoint.get('meta', {}).get('dataset_meta')
    head = {name: value for name, value in own.items() if name.startswith('head.')}
    if keep_head and describe_misfit(state, head, optional=head):
        print_log(f'{address} has other classes: head not loaded.', 'current')
        meta = None
        for name in head:
            del own[name]
            state.pop(name, None)
    if mismatch := describe_misfit(state, own):
        raise ValueError(
            f'{address} does not fit this model: {mismatch}. Choose another model or checkpoint'
            + (', or give num_classes.' if not keep_head else '.')
        )
    model.load_state_dict(state, strict=False)
    model._dataset_meta = meta or model._dataset_meta


@functools.cache
def register_models() -> None:
    """Register the ViL classifiers with mmpretrain and timm, where installed.

    Afterwards ``mmpretrain.list_models('vil2-*')`` and ``timm.list_models('mmvil*')`` list them.
    Further calls have no effect.

    Raises:
        ImportError: If neither is installed.
        FileNotFoundError: If the list of models is missing in this installation of mmvil.

    Example:
        >>> mmvil.register_models()
        >>> mmpretrain.inference_model('vil2-tiny', 'cat.jpg', pretrained=True)
        >>> timm.create_model('mmvil_tiny_patch16_224', pretrained=True)
    """
    if _installed('timm'):
        from . import timm_models  # noqa: F401
    if _installed('mmpretrain') or not _installed('timm'):
        _register_mmpretrain('register_models()')


@functools.cache
def _register_mmpretrain(caller: str) -> None:
    try:
        from mmpretrain.apis import ModelHub
    except ImportError as error:
        raise ImportError(
            f'{caller} needs mmpretrain, which cannot be imported ({error}). See '
            'README.md for installation, or use timm or mmvil.VisionLSTM itself.'
        ) from error
    root = package_root()
    if not ModelHub.has(OFFICIAL_CHECKPOINTS[0].model):
        # The other list in model-index.yml contains segmentors, which mmpretrain cannot build.
        index = root / 'configs' / 'metafile_imagenet.yml'
        ModelHub.register_model_index(index, config_prefix=root)


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def package_root() -> Path:
    """Folder that contains configs/: ``mmvil/.mim`` of an installed package, or the checkout."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / '.mim', package.parent):
        if (root / 'configs' / 'metafile_imagenet.yml').is_file():
            return root
    raise FileNotFoundError(
        f'No configs/metafile_imagenet.yml in {package / ".mim"} or {package.parent}. '
        'Install mmvil from its repository: pip install .'
    )
