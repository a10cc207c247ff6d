# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What the tools that use a trained model share: build it, load its weights, know its classes."""

import warnings
from pathlib import Path

from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from torch import no_grad

from .config import build_lazily
from .errors import UserError
from .preflight import check_checkpoint, check_fit

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')


def find_images(path):
    """The image, or the images in the folder, sorted by name.

    Raises:
        UserError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f'image not found: {path.absolute()}')
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
    if not images:
        raise UserError(f'no images in {path.absolute()} (looked for {", ".join(IMAGES)})')
    return images


def build_model(cfg, checkpoint, device='cpu'):
    """The model of a config with the weights of a checkpoint, for inference.

    Args:
        cfg (Config): Of a segmentor or classifier.
        checkpoint (str): File or URL.
        device (str): Default: 'cpu'.

    Returns:
        nn.Module: In evaluation mode, with its ``dataset_meta``.

    Raises:
        UserError: If the checkpoint is missing, no checkpoint, or does not fit.
    """
    check_checkpoint(checkpoint)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    cfg.model.pop('train_cfg', None)
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)  # as runners do
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the libraries' own deprecations
            model = MODELS.build(cfg.model)
    except (AssertionError, KeyError, TypeError) as error:
        raise UserError(f'cannot build the model: {error}') from error
    model = revert_sync_batchnorm(model)
    load_weights(model, checkpoint, cfg)
    return model.to(device).eval()


def load_weights(model, checkpoint, cfg):
    """Load a checkpoint into a model, and what it knows of the classes into ``dataset_meta``.

    Raises:
        UserError: If the checkpoint does not fit.
    """
    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu', logger='silent')
    check_fit(model, loaded, checkpoint)
    state = loaded.get('state_dict', loaded)
    model.load_state_dict(
        {name.removeprefix('module.'): tensor for name, tensor in state.items()}, strict=False
    )
    meta = loaded.get('meta', {}).get('dataset_meta')
    if meta is None and cfg.get('test_dataloader') is not None:
        dataset = build_lazily(cfg.test_dataloader.dataset, cfg.default_scope)
        meta = getattr(dataset, 'metainfo', None)
    meta = meta or {}
    model.dataset_meta = dict(classes=meta.get('classes'), palette=meta.get('palette'))


@no_grad()
def predict(model, prepared):
    """The data sample that a model returns for what :meth:`ImageReader.prepare` returns."""
    return model.test_step(pseudo_collate([prepared]))[0]
