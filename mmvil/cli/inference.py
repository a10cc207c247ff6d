# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Build a trained model, read images like its test pipeline, and predict."""

import itertools
import warnings
from pathlib import Path

import numpy as np
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from torch import no_grad

from ..checkpoints import weights_of
from ..engine.config_nodes import dicts, innermost_datasets, type_name
from .config import build_lazily
from .errors import UserError, as_user_error
from .preflight import check_checkpoint, check_fit

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')

# -- Model -----------------------------------------------------------------------------------------


def build_model(cfg, checkpoint, device='cpu'):
    """Build the model of a config with the weights of a checkpoint, for inference.

    Args:
        cfg (Config): Config of a segmentor, classifier or detector.
        checkpoint (str): File or URL.
        device (str): Default: 'cpu'.

    Returns:
        nn.Module: The model in evaluation mode. Its ``dataset_meta`` contains the names and colors
        of the classes, from the checkpoint or else the test dataset, or None. Outputs beyond the
        named classes are called 'class 3' and so on.
    """
    check_checkpoint(checkpoint)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model_cfg = {key: None if key == 'train_cfg' else x for key, x in cfg.model.items()}
    if cfg.get('data_preprocessor') is not None:
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)  # like runners
    model = revert_sync_batchnorm(build_untrained(model_cfg))
    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu', logger='silent')
    check_fit(model, loaded, checkpoint)
    model.load_state_dict(weights_of(loaded), strict=False)
    meta = loaded.get('meta', {}).get('dataset_meta')
    if meta is None and cfg.get('test_dataloader') is not None:
        try:
            first = next(innermost_datasets(cfg.test_dataloader.dataset))
            dataset = build_lazily(first, cfg.get('default_scope'))
        except UserError:  # its files may be missing, and not all callers need the classes
            dataset = None
        meta = getattr(dataset, 'metainfo', None)
    classes, palette = ((meta or {}).get(key) for key in ('classes', 'palette'))
    outputs = max((node.get('num_classes') or 0 for node in dicts(model_cfg)), default=0)
    if classes is not None and outputs > len(classes):
        classes = [*classes, *(f'class {label}' for label in range(len(classes), outputs))]
    if palette is not None:
        palette = [*palette, *random_palette(len(classes or ()))[len(palette) :]]
    model.dataset_meta = dict(classes=classes, palette=palette)
    return model.to(device).eval()


def build_untrained(model_cfg):
    """Build a model in the default scope."""
    kinds = (AssertionError, KeyError, TypeError)
    with warnings.catch_warnings(), as_user_error('cannot build the model', kinds):
        warnings.simplefilter('ignore')  # deprecations inside the libraries
        return MODELS.build(model_cfg)


def random_palette(number):
    """Colors for classes without, always the same ones."""
    return np.random.RandomState(0).randint(0, 256, (number, 3)).tolist()


@no_grad()
def predict(model, prepared):
    """Predict one prepared image and return its data sample, see :meth:`ImageReader.prepare`."""
    return model.test_step(pseudo_collate([prepared]))[0]


# -- Images ----------------------------------------------------------------------------------------


def find_images(path):
    """List an image, or the images in a folder, sorted by name."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f'image not found: {path.absolute()}')
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f'no images in {path.absolute()} (looked for {", ".join(IMAGE_SUFFIXES)})')
    return images


class ImageReader:
    """Test pipeline of a config, for files without annotations.

    Args:
        cfg (Config): Config of a segmentor or classifier. Without a test pipeline, ordinary images
            can be loaded but not prepared for a model.
    """

    def __init__(self, cfg):
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        loaders = [cfg.get(f'{split}_dataloader') for split in ('test', 'val')]
        datasets = [innermost_datasets(loader.dataset) for loader in loaders if loader]
        pipelines = [dataset.get('pipeline') for dataset in itertools.chain(*datasets)]
        self._complete = any(pipelines)
        pipeline = next(filter(None, pipelines), [dict(type='LoadImageFromFile')])
        pipeline = [step for step in pipeline if not loads(step, 'annotation')]
        last = max((i for i, step in enumerate(pipeline) if loads(step)), default=-1)
        self._load = build_pipeline(pipeline[: last + 1])
        self._prepare = build_pipeline(pipeline[last + 1 :])
        # Like the OpenCV and Pillow backends for three channels.
        first = next(filter(loads, pipeline), dict(type='LoadImageFromFile'))
        is_standard = type_name(first) == 'LoadImageFromFile'
        self.bgr = is_standard and first.get('imdecode_backend') != 'tifffile'

    def load(self, path):
        """Load a file like the config's pipeline, as a dict with 'img', (H, W[, C])."""
        with as_user_error(f'cannot read the image {path}'):
            results = self._load(dict(img_path=str(path)))
        if results is None:
            raise UserError(f"cannot read the image {path}: the config's loader skips it")
        return results

    def prepare(self, loaded):
        """Apply the rest of the pipeline.

        Args:
            loaded (dict | ndarray): Result of :meth:`load`, or an image in the same layout.

        Returns:
            dict: 'inputs' (C, H, W) and 'data_samples'.
        """
        if not self._complete:
            raise UserError('the config has no test_dataloader with a pipeline to prepare images')
        if isinstance(loaded, np.ndarray):
            size = loaded.shape[:2]
            loaded = dict(img=loaded, img_shape=size, ori_shape=size)
        path = loaded.get('img_path', 'the frame')
        with as_user_error(f"{path} cannot pass the config's pipeline"):
            return self._prepare(loaded)

    def picture(self, image):
        """Convert an image for display, see :func:`picture`."""
        return picture(image, self.bgr)


def loads(step, what='image'):
    """Whether a pipeline step loads an image or annotation."""
    name = type_name(step)
    return name.startswith('Load') and ('Annotation' in name) == (what == 'annotation')


def build_pipeline(steps):
    """Compose the steps of a pipeline."""
    with as_user_error('cannot build the pipeline'):
        return Compose(steps)


def picture(image, bgr=True):
    """Convert an image with any number of channels and range for display.

    Ordinary images, uint8 with three channels, keep their values. Otherwise, the first three
    channels become red, green and blue, or the first becomes gray if there are fewer, each
    stretched between its 2nd and 98th percentile.

    Args:
        image (ndarray): (H, W) or (H, W, C).
        bgr (bool): Images of three or four channels are BGR or BGRA. Default: True.

    Returns:
        ndarray: (H, W, 3) uint8, RGB.
    """
    image = image.reshape(*image.shape[:2], -1)
    channels = image.shape[2]
    shown = image[..., :3] if channels >= 3 else image[..., :1]
    if image.dtype != np.uint8 or channels != 3:
        shown = np.where(np.isfinite(shown), shown, np.nan).astype(np.float32)
        low, high = np.nanpercentile(shown, [2, 98], axis=(0, 1))
        shown = (shown - low) / np.maximum(high - low, 1e-12) * 255
        shown = np.nan_to_num(shown).clip(0, 255).astype(np.uint8)
    if bgr and channels in (3, 4):
        shown = shown[..., ::-1]
    return np.ascontiguousarray(np.broadcast_to(shown, (*image.shape[:2], 3)))
