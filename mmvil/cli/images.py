# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""How the tools read and show images: what a model is given comes from its config's pipeline."""

import numpy as np
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope

from .errors import UserError


class ImageReader:
    """The test pipeline of a config, for files that have no annotation.

    Args:
        cfg (Config): Of a segmentor or classifier. One without a test pipeline loads photographs,
            but cannot prepare them for a model.

    Raises:
        UserError: If the pipeline cannot be built.
    """

    def __init__(self, cfg):
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        loaders = [cfg.get(f'{split}_dataloader') for split in ('test', 'val')]
        pipelines = [loader.dataset.get('pipeline') for loader in loaders if loader]
        self._complete = any(pipelines)
        pipeline = next(filter(None, pipelines), [dict(type='LoadImageFromFile')])
        pipeline = [step for step in pipeline if not loads(step, 'annotation')]
        last = max((i for i, step in enumerate(pipeline) if loads(step)), default=-1)
        self._load = build_pipeline(pipeline[: last + 1])
        self._prepare = build_pipeline(pipeline[last + 1 :])
        self.bgr = loads_bgr(pipeline)

    def load(self, path):
        """What the loader of the config makes of a file: a dict with 'img', (H, W[, C]).

        Raises:
            UserError: If it cannot read the file.
        """
        try:
            results = self._load(dict(img_path=str(path)))
        except Exception as error:
            raise UserError(f'cannot read the image {path}: {one_line(error)}') from error
        if results is None:
            raise UserError(f"cannot read the image {path}: the config's loader leaves it out")
        return results

    def prepare(self, loaded):
        """What the rest of the pipeline makes of it: 'inputs' (C, H, W) and 'data_samples'.

        Args:
            loaded (dict | ndarray): Of :meth:`load`, or an image as it would load it.

        Raises:
            UserError: If the config has no test pipeline, or it does not take the image.
        """
        if not self._complete:
            raise UserError('the config has no test_dataloader with a pipeline, to prepare images')
        if isinstance(loaded, np.ndarray):
            size = loaded.shape[:2]
            loaded = dict(img=loaded, img_shape=size, ori_shape=size)
        try:
            return self._prepare(loaded)
        except Exception as error:
            path = loaded.get('img_path', 'the frame')
            raise UserError(
                f"{path} cannot pass the config's pipeline: {one_line(error)}"
            ) from error

    def picture(self, image):
        """An image to look at, see :func:`picture`."""
        return picture(image, self.bgr)


def loads(step, what='image'):
    """Whether a step of a pipeline loads an image, or an annotation."""
    name = str(step.get('type')).rpartition('.')[2]
    return name.startswith('Load') and ('Annotation' in name) == (what == 'annotation')


def loads_bgr(pipeline):
    """Whether images of three channels come in the order BGR, which OpenCV and Pillow give."""
    first = next((step for step in pipeline if loads(step)), {})
    is_standard = str(first.get('type')).endswith('LoadImageFromFile')
    return is_standard and first.get('imdecode_backend') != 'tifffile'


def build_pipeline(steps):
    """The steps as one function.

    Raises:
        UserError: If one cannot be built.
    """
    try:
        return Compose(steps)
    except Exception as error:
        raise UserError(f'cannot build the pipeline: {one_line(error)}') from error


def picture(image, bgr=True):
    """A picture of an image of any channels and range.

    Photographs, uint8 with three channels, stay as they are. Of others, the first three channels
    are shown as red, green and blue, or the first in gray where there are less than three; each
    from its 2nd to its 98th percentile.

    Args:
        image (ndarray): (H, W) or (H, W, C).
        bgr (bool): Three channels are blue, green and red, also before an alpha channel. Default:
            True.

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


def data_preprocessor(cfg):
    """The config of the data preprocessor, which normalizes images; empty if there is none."""
    return cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}


def one_line(error):
    """An exception in one line."""
    return ' '.join(str(error).split()) or type(error).__name__
