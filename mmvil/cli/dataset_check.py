# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Check all files of a dataset, their labels, and whether images fit the model."""

import copy
import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import track_progress_rich
from PIL import Image, ImageOps

from ..engine.config_nodes import type_name
from ..engine.sampling import UnknownLabelsError
from .config import list_files
from .errors import one_line
from .inference import build_pipeline, loads
from .preflight import class_mismatches, expected_channels, image_and_annotation_stems


class Problem(NamedTuple):
    """What is wrong, with which file, and the labels in it that are wrong, if any."""

    what: str
    file: str
    labels: str = ''


BINARY_MASKS = (
    'annotations have only the labels 0 and 255, and 255 is ignored; where it is a class, declare '
    'values: [0, 255] in classes.yaml (docs/own_data.md)'
)
NO_LABELS = 'every pixel of every annotation is ignored, so nothing is learned or evaluated'
DEEP_IMAGE = 'image has 16 or 32 bits, but the config loads 8 (docs/multiband.md)'


def check_dataset(
    dataset_cfg: dict, cfg: Config, jobs: int = 1
) -> tuple[int, Sequence[str], list[Problem], np.ndarray | None]:
    """Check all files of a dataset.

    Args:
        dataset_cfg (dict): Config of the dataset, with its pipeline.
        cfg (Config): The whole config, including the model.
        jobs (int): Number of processes. Default: 1.

    Returns:
        tuple: Number of images; names of the classes, possibly none; problems; pixels (images for
        classifiers, objects for detectors) of each class in each valid image, (N, classes), or None
        without classes.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    dataset = list_files(dataset_cfg, cfg.get('default_scope'))
    classes = tuple((dataset.metainfo or {}).get('classes') or ())
    samples = [dataset.get_data_info(i) for i in range(len(dataset))]
    pipeline = dataset_cfg.get('pipeline') or []
    check = functools.partial(
        _check_sample,
        classes=len(classes),
        ignore=getattr(dataset, 'ignore_index', 255),
        load=_special_loader(pipeline),
        to_labels=_label_mapping(pipeline),
    )
    count = len(samples)
    results = track_progress_rich(check, samples, count, jobs, chunksize=8, description='images')

    problems = [problem for found, _, _ in results for problem in found]
    images, annotations = image_and_annotation_stems(dataset)
    for stem in sorted(annotations - images):
        file = os.path.join(dataset.data_prefix['seg_map_path'], stem + dataset.seg_map_suffix)
        problems.append(Problem('annotation without an image', file))
    valid = [(channels, sample) for sample, (bad, _, channels) in zip(samples, results) if not bad]
    problems += _channel_mismatches(valid, pipeline, cfg)
    model = f'the model of {cfg.filename}'
    problems += [Problem(what, model) for what in class_mismatches(classes, cfg.model)]
    counts = [counts for _, counts, _ in results if counts is not None]
    if not counts or not classes:
        return count, classes, problems, None
    counts, ignored = np.split(np.stack(counts), [len(classes)], axis=1)
    folder = (getattr(dataset, 'data_prefix', None) or {}).get('seg_map_path')
    if ignored.any() and counts[:, 0].any() and not counts[:, 1:].any():
        problems.append(Problem(BINARY_MASKS, folder))
    if folder and not counts.any():
        problems.append(Problem(NO_LABELS, folder))
    return count, classes, problems, counts


# -- One sample; a ValueError describes the problem of a file --------------------------------------


def _check_sample(sample, classes, ignore, load, to_labels):
    """Check an image and its label or annotation. Returns problems; pixels per class, followed by
    those of label 255, or None; and the number of channels if ``load`` reads the image instead of
    Pillow, which is faster and stricter.
    """
    problems, size, counts, channels = [], None, None, None
    path, annotation, label = map(sample.get, ('img_path', 'seg_map_path', 'gt_label'))
    if 'instances' in sample:
        label = [instance['bbox_label'] for instance in sample['instances']]
    try:
        size, channels, is_deep = _read_size(sample, load)
        if is_deep:
            problems.append(Problem(DEEP_IMAGE, path))
    except ValueError as error:
        problems.append(Problem(f'image {error}', path))
    if annotation is not None:
        try:
            labels = _read_annotation(annotation, size, to_labels)
            counts = _count(labels, sample, classes, ignore)
        except UnknownLabelsError as error:
            problems.append(Problem(f'annotation {error.what}', annotation, error.labels))
        except ValueError as error:
            problems.append(Problem(f'annotation {error}', annotation))
    elif label is not None:
        label = np.array(label, dtype=int, ndmin=1)
        if classes and not np.isin(label, range(classes)).all():
            problems.append(Problem(f'label beyond the {classes} classes', path))
        else:
            counts = np.bincount(label, minlength=classes + 1)
    return problems, counts, channels


def _special_loader(pipeline):
    """The loading part of a pipeline, or None if it loads ordinary images of 3 channels or 1."""
    steps = [step for step in pipeline if loads(step)]
    is_usual = all(
        type_name(step) == 'LoadImageFromFile'
        and step.get('imdecode_backend', 'cv2') in ('cv2', 'pillow', 'turbojpeg')
        and step.get('color_type', 'color') in ('color', 'grayscale')
        for step in steps
    )
    return None if is_usual else build_pipeline(steps)


def _label_mapping(pipeline):
    """The method of a pipeline that maps annotation pixels to labels, or None."""
    steps = [step for step in pipeline if loads(step, 'annotation')]
    transforms = build_pipeline(steps).transforms
    return next((step.to_labels for step in transforms if hasattr(step, 'to_labels')), None)


def _read_size(sample, load):
    """Read the size (width, height) of an image, its number of channels if ``load`` reads it, and
    otherwise whether it has more than 8 bits per channel.
    """
    path = sample['img_path']
    if load is None:
        with _open_image(path) as file:
            is_deep = bool(file.mode[0] in 'IF' or re.search('(RGBA?|LA);16', str(file.tile)))
            # Loaders apply the orientation that the camera recorded.
            size = ImageOps.exif_transpose(file).size if file.getexif() else file.size
            file.draft('RGB', tuple(-(-side // 8) for side in file.size))  # decode all, but quickly
            file.load()
        return size, None, is_deep
    _check_not_empty(path)
    try:
        image = load(dict(sample))['img']
    except Exception as error:  # loaders raise anything
        raise ValueError(f'cannot be read by the config: {one_line(error)}') from error
    if not np.isfinite(image).all():
        raise ValueError('has values that are not finite')
    return image.shape[1::-1], image.shape[2] if image.ndim == 3 else 1, False


def _check_not_empty(path):
    if not os.path.exists(path):
        raise ValueError('missing')
    if os.path.getsize(path) == 0:
        raise ValueError('empty')


@contextmanager
def _open_image(path):
    """Open an image file; errors here or within the block become a ``ValueError``."""
    _check_not_empty(path)
    try:
        file = Image.open(path)
    except OSError as error:
        raise ValueError('damaged: no image format is recognized') from error
    with file:
        try:
            yield file
        except (OSError, SyntaxError, EOFError) as error:
            cut = 'cut off' if 'truncated' in str(error) else f'damaged: {error}'
            raise ValueError(cut) from error


def _read_annotation(path, image_size, to_labels):
    """Labels of the pixels, (H, W) int64."""
    with _open_image(path) as file:
        if to_labels is None and file.mode not in ('L', 'P', '1', 'I', 'I;16'):
            raise ValueError(
                f'has colors (mode {file.mode}), not one label per pixel; declare the colors of '
                'the classes (docs/own_data.md)'
            )
        labels = np.asarray(file)
        if image_size not in (None, file.size):
            turned = image_size == file.size[::-1]
            raise ValueError(
                'has height and width of its image swapped: images, but not annotations, are '
                'loaded with their EXIF orientation'
                if turned
                else 'has another size than its image'
            )
    if to_labels is not None:
        labels = to_labels(labels)
    elif labels.max() > 255:
        raise UnknownLabelsError(
            'has labels beyond 255, which loading truncates; declare the values of the classes '
            '(docs/own_data.md)',
            np.unique(labels).tolist(),
        )
    return labels.astype(np.int64)


def _count(labels, sample, classes, ignore):
    """Count the pixels per class, after the pipeline's label mapping, then those of label 255."""
    shift = 1 if sample.get('reduce_zero_label') else 0
    label_map = sample.get('label_map') or {}
    pixels = np.bincount(labels.ravel(), minlength=256)
    counts, unknown = np.zeros(256, int), []
    for value in pixels.nonzero()[0].tolist():
        label = 255 if shift and value in (0, 255) else value - shift
        label = label_map.get(label, label)
        if label in (ignore, 255):
            continue
        if classes and not 0 <= label < classes:
            unknown.append(value)
        else:
            counts[label] += pixels[value]
    if unknown:
        less = ' less 1 (reduce_zero_label)' if shift else ''
        what = f'has labels that{less} are none of the {classes} classes'
        raise UnknownLabelsError(what, unknown)
    return np.append(counts[:classes], pixels[255])


# -- The model -------------------------------------------------------------------------------------


def _channel_mismatches(samples, pipeline, cfg) -> Iterator[Problem]:
    """Pass one image for each number of loaded channels through the whole pipeline."""
    kinds = {}
    for channels, sample in samples if pipeline else ():
        kinds.setdefault(channels, []).append(sample)
    for alike in kinds.values():
        file, others = alike[0]['img_path'], len(alike) - 1
        file += f' and {others} of as many channels' if others else ''
        transformed = map(build_pipeline(pipeline), map(copy.deepcopy, alike))
        try:
            results = next(filter(None, transformed), None)  # as in training, None drops an image
            inputs = results and results['inputs']
        except Exception as error:  # transforms raise anything
            yield Problem(f'image cannot pass the pipeline of the config: {one_line(error)}', file)
            continue
        if inputs is None:
            yield Problem('image is dropped by the pipeline of the config', file)
            continue
        views = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        channels = views[0].shape[-3]
        for name, expected in expected_channels(cfg):
            if channels != expected:
                what = f'image has {channels} channels after the pipeline, but {name}'
                yield Problem(what, file)
