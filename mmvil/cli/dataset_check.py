# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Check every file of a dataset, its labels, and whether images fit the model.

A problem is a tuple of what is wrong and with which file.
"""

import copy
import functools
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image, ImageOps
from rich.progress import track

from .errors import UserError, one_line
from .inference import build_pipeline, data_preprocessor, loads
from .preflight import stems

Problem = tuple[str, str]


class DatasetReport(NamedTuple):
    """Result of :func:`check_dataset`.

    Attributes:
        images (int): Number of images.
        classes (Sequence[str]): Names of the classes, maybe none.
        problems (list[Problem]): What is wrong.
        counts (ndarray, optional): Pixels (or images, of a classifier) of each class in each sound
            image, (N, classes); None without classes.
    """

    images: int
    classes: tuple
    problems: list[Problem]
    counts: np.ndarray | None


def check_dataset(dataset_cfg: dict, cfg: Config, jobs: int = 1) -> DatasetReport:
    """Check all files of a dataset.

    Args:
        dataset_cfg (dict): Config of the dataset, with its pipeline.
        cfg (Config): Config that it belongs to, with the model.
        jobs (int): Number of processes. Default: 1.

    Raises:
        UserError: If the files cannot be listed.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    dataset = _list_files(dataset_cfg, cfg.get('default_scope'))
    classes = tuple((dataset.metainfo or {}).get('classes') or ())
    samples = [dataset.get_data_info(i) for i in range(len(dataset))]
    pipeline = dataset_cfg.get('pipeline') or []
    check = functools.partial(
        check_sample,
        classes=len(classes),
        ignore=getattr(dataset, 'ignore_index', 255),
        load=_special_loader(pipeline),
    )
    with multiprocessing.Pool(jobs) as pool:
        checked = pool.imap(check, samples, chunksize=8)
        results = list(track(checked, 'images', len(samples), transient=True))

    problems = [problem for found, _, _ in results for problem in found]
    problems += _annotations_without_image(dataset)
    sound = [(sample, channels) for sample, (bad, _, channels) in zip(samples, results) if not bad]
    problems += _channel_misfits(sound, pipeline, cfg)
    problems += _class_misfits(classes, cfg)
    counts = [counts for _, counts, _ in results if counts is not None]
    counts = np.stack(counts) if counts and classes else None
    return DatasetReport(len(samples), classes, problems, counts)


def _list_files(dataset_cfg, scope):
    """The dataset with its list of files, without a pipeline."""
    with DATASETS.switch_scope_and_registry(scope) as registry:
        try:
            dataset = registry.build({**dataset_cfg, 'pipeline': []})
            dataset.full_init()
        except Exception as error:  # any dataset's own
            raise UserError(
                f'cannot list the files of {dataset_cfg["type"]}: {one_line(error)}'
            ) from error
    return dataset


# -- One sample ------------------------------------------------------------------------------------


def check_sample(sample: dict, classes: int, ignore: int = 255, load=None) -> tuple:
    """Check an image and its label or annotation.

    Args:
        sample (dict): As the dataset lists it.
        classes (int): Number of classes, 0 if unknown.
        ignore (int): Label that belongs to no class. Default: 255.
        load (Callable, optional): Loads the image. Default: Pillow, which is faster and stricter.

    Returns:
        tuple: Problems; pixels per class, or None; number of channels if ``load`` was given, or
        None.
    """
    problems, size, counts, channels = [], None, None, None
    try:
        size, channels = _read_size(sample, load)
    except ValueError as error:
        problems.append((f'image {error}', sample['img_path']))

    path, label = sample.get('seg_map_path'), sample.get('gt_label')
    if path is not None:
        try:
            counts = _count(_read_annotation(path, size), sample, classes, ignore)
        except ValueError as error:
            problems.append((f'annotation {error}', path))
    elif label is not None:
        label = np.atleast_1d(np.asarray(label))
        if classes and not 0 <= label.min() <= label.max() < classes:
            problems.append((f'label beyond the {classes} classes', sample['img_path']))
        else:
            counts = np.bincount(label, minlength=classes)
    return problems, counts, channels


def _special_loader(pipeline):
    """The loading part of a pipeline, or None if it loads photographs, of three channels or one."""
    steps = [step for step in pipeline if loads(step)]
    usual = dict(imdecode_backend=('cv2', 'pillow', 'turbojpeg'), color_type=('color', 'grayscale'))
    is_usual = all(
        step['type'].endswith('LoadImageFromFile')
        and all(step.get(key, values[0]) in values for key, values in usual.items())
        for step in steps
    )
    return None if is_usual else build_pipeline(steps)


# Below, a ValueError says what is wrong with a file.


def _read_size(sample, load):
    """Size (width, height) of an image and, where ``load`` reads it, its number of channels."""
    path = sample['img_path']
    if load is None:
        with _opened(path) as file:
            # Loaders turn a picture as its camera noted.
            size = ImageOps.exif_transpose(file).size if file.getexif() else file.size
            file.draft('RGB', (file.width // 8, file.height // 8))  # to the end, but quickly
            file.load()
        return size, None
    _check_not_empty(path)
    try:
        image = load(dict(sample))['img']
    except Exception as error:  # any loader's own
        raise ValueError(f'cannot be read by the config: {one_line(error)}') from error
    if not np.isfinite(image).all():
        raise ValueError('has values that are not finite')
    return image.shape[1::-1], image.shape[2] if image.ndim == 3 else 1


def _check_not_empty(path):
    if not os.path.exists(path):
        raise ValueError('missing')
    if os.path.getsize(path) == 0:
        raise ValueError('empty')


@contextmanager
def _opened(path):
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


def _read_annotation(path, image_size):
    """Labels of the pixels, (H, W) int64."""
    with _opened(path) as file:
        if file.mode not in ('L', 'P', '1', 'I', 'I;16'):
            raise ValueError(f'has colors (mode {file.mode}), not one label per pixel')
        labels = np.asarray(file)
        if image_size is not None and file.size != image_size:
            raise ValueError('has another size than its image')
    if labels.max() > 255:
        raise ValueError('has labels beyond 255, which the loading cuts off')
    return labels.astype(np.int64)


def _count(labels, sample, classes, ignore):
    """Pixels per class, after the mapping that the loading applies to labels."""
    raw = np.bincount(labels.ravel(), minlength=256)
    counts = np.zeros(256, int)
    label_map = sample.get('label_map') or {}
    unknown = []
    for value in map(int, raw.nonzero()[0]):
        label = value
        if sample.get('reduce_zero_label'):
            label = 255 if label in (0, 255) else label - 1
        label = label_map.get(label, label)
        if label in (ignore, 255):
            continue
        if classes and not 0 <= label < classes:
            unknown.append(value)
        else:
            counts[label] += raw[value]
    if unknown:
        less = ' less 1 (reduce_zero_label)' if sample.get('reduce_zero_label') else ''
        raise ValueError(f'has labels that{less} are none of the {classes} classes: {unknown}')
    return counts[: classes or None]


# -- The dataset as a whole ------------------------------------------------------------------------


def _annotations_without_image(dataset) -> list[Problem]:
    prefix = getattr(dataset, 'data_prefix', {})
    images, maps = prefix.get('img_path'), prefix.get('seg_map_path')
    if not images or not maps or dataset.ann_file:
        return []
    suffix = dataset.seg_map_suffix
    alone = sorted(stems(maps, suffix) - stems(images, dataset.img_suffix))
    return [('annotation without an image', os.path.join(maps, name + suffix)) for name in alone]


def _channel_misfits(samples, pipeline, cfg) -> Iterator[Problem]:
    """Pass one image of each number of channels as loaded through the whole pipeline."""
    kinds = defaultdict(list)
    for sample, channels in samples if pipeline else ():
        kinds[channels].append(sample)
    for same in kinds.values():
        file = same[0]['img_path']
        if len(same) > 1:
            file += f' and {len(same) - 1} of as many channels'
        try:
            inputs = build_pipeline(pipeline)(copy.deepcopy(same[0]))['inputs']
        except Exception as error:  # any transform's own
            yield f'image cannot pass the pipeline of the config: {one_line(error)}', file
            continue
        channels = inputs.shape[-3]
        for name, expected in _expected_channels(cfg):
            if channels != expected:
                yield f'image has {channels} channels after the pipeline, but {name}', file


def _expected_channels(cfg) -> Iterator[tuple[str, int]]:
    """Settings of the model that imply a number of channels, and the number."""
    backbone = cfg.model.get('backbone') or {}
    if 'in_channels' in backbone or str(backbone.get('type')).endswith('VisionLSTM'):
        channels = backbone.get('in_channels', 3)
        yield f'the backbone has in_channels={channels}', channels
    for name in ('mean', 'std'):
        values = data_preprocessor(cfg).get(name)
        if values is not None and len(values) != 1:  # one is for all channels
            yield f'{name} of the data_preprocessor has {len(values)} values', len(values)


def _class_misfits(classes, cfg) -> Iterator[Problem]:
    """Heads that predict another number of classes than the dataset has."""
    for name in ('decode_head', 'auxiliary_head', 'head'):
        head = cfg.model.get(name)
        number = head.get('num_classes') if isinstance(head, dict) else None
        if classes and number is not None and number != len(classes):
            what = f'num_classes={number} in {head.type}, but the dataset has {len(classes)}'
            yield what, f'the model of {cfg.filename}'
