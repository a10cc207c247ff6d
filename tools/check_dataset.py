# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Look at every file of a config's data sets before a week of training does.

python tools/check_dataset.py configs/upernet_vil_t_ade20k.py -j 8

Finds images and annotations that are missing, empty, damaged or cut off; annotations of another
size than their image, with colors instead of labels, or with labels that the data set has no class
for; images whose channels, as the config's pipeline loads them, do not fit the model; classes that
never occur. Exit status: 0 if all is well, 1 if something is to be put right.
"""

import argparse
import copy
import functools
import multiprocessing
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from mmengine.config import DictAction
from mmengine.registry import DATASETS, init_default_scope
from mmengine.utils import ProgressBar
from PIL import Image, ImageOps

from mmvil.cli.config import load_config, set_data_root
from mmvil.cli.errors import UserError
from mmvil.cli.images import build_pipeline, data_preprocessor, loads, one_line
from mmvil.cli.main import parse_args, run
from mmvil.cli.preflight import check_folders, stems
from mmvil.engine.config_nodes import innermost_datasets

SPLITS = ('train', 'val', 'test')
Image.MAX_IMAGE_PIXELS = None  # large images are no attack here


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file, such as configs/upernet_vil_t_ade20k.py')
    parser.add_argument('--data-root', help="folder of the data, instead of the config's")
    parser.add_argument(
        '--splits', nargs='+', choices=SPLITS, default=SPLITS, help='default: all that differ'
    )
    parser.add_argument(
        '-j', '--jobs', type=int, default=os.cpu_count() or 1, help='processes (default: all cores)'
    )
    parser.add_argument('--out', help='text file for the names of all files that were found')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE'
    )
    parser.add_argument('--traceback', action='store_true', help='show the whole trace of an error')
    return parser


def main():
    args = parse_args(make_parser())
    cfg = load_config(args.config, args.cfg_options)
    set_data_root(cfg, args.data_root)
    found, seen = [], []
    for split in args.splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        for dataset_cfg in innermost_datasets(loader.dataset):
            source = {key: value for key, value in dataset_cfg.items() if key != 'pipeline'}
            if source not in seen:
                seen.append(source)
                check_folders(cfg, f'{split}_dataloader')
                pipeline = dataset_cfg.get('pipeline') or []
                found += check(split, build(dataset_cfg, cfg), pipeline, cfg, args.jobs)
    if not seen:
        raise UserError(f'{args.config} has no data set for {", ".join(args.splits)}')

    if args.out:
        Path(args.out).write_text(''.join(f'{file}: {what}\n' for what, file in found))
    print(f'\n{len(found)} problems.' if found else '\nAll is well.')
    sys.exit(1 if found else 0)


def build(dataset_cfg, cfg):
    """The data set with its list of files, without a pipeline.

    Raises:
        UserError: If it does not find them.
    """
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        try:
            dataset = registry.build({**dataset_cfg, 'pipeline': []})
            dataset.full_init()
        except Exception as error:
            reason = ' '.join(str(error).split())
            raise UserError(f'cannot list the files of {dataset_cfg.type}: {reason}') from error
    return dataset


def check(split, dataset, pipeline, cfg, jobs):
    """Look at all files of a data set, and print what was found.

    Args:
        split (str): Its name.
        dataset: Of :func:`build`.
        pipeline (list[dict]): What the config does with its images.
        cfg (Config): With the model.
        jobs (int): Processes.

    Returns:
        list[tuple[str, str]]: What is wrong, and with which file.
    """
    classes = (dataset.metainfo or {}).get('classes') or ()
    samples = [dataset.get_data_info(i) for i in range(len(dataset))]
    print(f'{split}: {len(samples)} images, {len(classes)} classes')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    look = functools.partial(
        look_at,
        classes=len(classes),
        ignore=getattr(dataset, 'ignore_index', 255),
        load=special_loader(pipeline),
    )
    results = list(each(look, samples, jobs))
    found = [complaint for complaints, _, _ in results for complaint in complaints]
    found += without_partner(dataset)
    sound = [(sample, loaded) for sample, (bad, _, loaded) in zip(samples, results) if not bad]
    found += channel_misfits(sound, pipeline, cfg)
    found += [(what, f'the model of {cfg.filename}') for what in misfits(classes, cfg.model)]
    report(found)
    report_classes(classes, [counts for _, counts, _ in results if counts is not None])
    return found


def each(function, items, jobs):
    """Results of a function in several processes, with a progress bar for who sits there."""
    bar = ProgressBar(len(items), file=sys.stderr) if sys.stderr.isatty() else None
    with multiprocessing.Pool(jobs) as pool:
        for result in pool.imap(function, items, chunksize=8):
            yield result
            if bar is not None:
                bar.update()
    if bar is not None:
        print(file=sys.stderr)


# -- One sample ------------------------------------------------------------------------------------


def look_at(sample, classes, ignore, load=None):
    """Look at an image and its label or annotation.

    Returns:
        tuple: list of (what is wrong, file); of each class the number of pixels, or None; and the
        number of channels where ``load`` has read the image, else None.
    """
    complaints, image, counts, channels = [], None, None, None
    try:
        image, channels = read_size(sample, load)
    except ValueError as error:
        complaints.append((f'image {error}', sample['img_path']))

    path, label = sample.get('seg_map_path'), sample.get('gt_label')
    if path is not None:
        try:
            labels = read_annotation(path, image)
            counts = count(labels, sample, classes, ignore)
        except ValueError as error:
            complaints.append((f'annotation {error}', path))
    elif label is not None:
        label = np.atleast_1d(np.asarray(label))
        if classes and not 0 <= label.min() <= label.max() < classes:
            complaints.append((f'label beyond the {classes} classes', sample['img_path']))
        else:
            counts = np.bincount(label, minlength=classes)
    return complaints, counts, channels


def special_loader(pipeline):
    """The part of a pipeline that loads images, or None if it is the usual one of photographs.

    A photograph is checked faster, and more strictly, by Pillow; it has three channels or one.
    """
    steps = [step for step in pipeline if loads(step)]
    usual = dict(imdecode_backend=('cv2', 'pillow', 'turbojpeg'), color_type=('color', 'grayscale'))
    if not steps or all(
        step['type'].endswith('LoadImageFromFile')
        and all(step.get(key, values[0]) in values for key, values in usual.items())
        for step in steps
    ):
        return None
    return build_pipeline(steps)


def read_size(sample, load):
    """Size (width, height) of an image and, where ``load`` reads it, its number of channels.

    Raises:
        ValueError: If it cannot be read.
    """
    path = sample['img_path']
    if load is None:
        with opened(path) as file:
            # What a loader shows: some cameras note down how to turn the picture.
            size = ImageOps.exif_transpose(file).size if file.getexif() else file.size
            file.draft('RGB', (file.width // 8, file.height // 8))  # to the end, but quickly
            file.load()
        return size, None
    check_is_there(path)
    try:
        image = load(dict(sample))['img']
    except Exception as error:
        raise ValueError(f'cannot be read by the config: {one_line(error)}') from error
    if not np.isfinite(image).all():
        raise ValueError('has values that are not finite')
    return image.shape[1::-1], image.shape[2] if image.ndim == 3 else 1


def check_is_there(path):
    """Make sure that a file exists and is not empty.

    Raises:
        ValueError: If it is not so.
    """
    if not os.path.exists(path):
        raise ValueError('missing')
    if os.path.getsize(path) == 0:
        raise ValueError('empty')


class opened:
    """An image file; what is wrong with it becomes a ``ValueError``, here or within the block."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        check_is_there(self.path)
        try:
            self.file = Image.open(self.path)
        except OSError as error:
            raise ValueError('damaged: no image format is recognized') from error
        return self.file

    def __exit__(self, kind, error, trace):
        self.file.close()
        if isinstance(error, (OSError, SyntaxError, EOFError)):
            cut = 'cut off' if 'truncated' in str(error) else f'damaged: {error}'
            raise ValueError(cut) from error


def read_annotation(path, image):
    """Labels of the pixels.

    Raises:
        ValueError: If they cannot be read, or cannot be labels of an image of that size.
    """
    with opened(path) as file:
        if file.mode not in ('L', 'P', '1', 'I', 'I;16'):
            raise ValueError(f'has colors (mode {file.mode}), not one label per pixel')
        labels = np.asarray(file)
        if image is not None and file.size != image:
            raise ValueError('has another size than its image')
    if labels.max() > 255:
        raise ValueError('has labels beyond 255, which the loading cuts off')
    return labels.astype(np.int64)


def count(labels, sample, classes, ignore):
    """Pixels per class, as the loading maps the labels.

    Raises:
        ValueError: If there are labels that belong to no class.
    """
    raw = np.bincount(labels.ravel(), minlength=256)
    counts = np.zeros(256, int)
    label_map = sample.get('label_map') or {}
    unknown = []
    for value in raw.nonzero()[0]:
        label = int(value)
        if sample.get('reduce_zero_label'):
            label = 255 if label in (0, 255) else label - 1
        label = label_map.get(label, label)
        if label == ignore or label == 255:
            continue
        if classes and not 0 <= label < classes:
            unknown.append(int(value))
        else:
            counts[label] += raw[value]
    if unknown:
        less = ' less 1 (reduce_zero_label)' if sample.get('reduce_zero_label') else ''
        raise ValueError(f'has labels that{less} are none of the {classes} classes: {unknown}')
    return counts[: classes or None]


# -- A data set ------------------------------------------------------------------------------------


def without_partner(dataset):
    """Annotations without an image, as after half a download."""
    prefix = getattr(dataset, 'data_prefix', {})
    images, maps = prefix.get('img_path'), prefix.get('seg_map_path')
    if not images or not maps or dataset.ann_file:
        return []
    suffix = dataset.seg_map_suffix
    alone = sorted(stems(maps, suffix) - stems(images, dataset.img_suffix))
    return [('annotation without an image', os.path.join(maps, name + suffix)) for name in alone]


def channel_misfits(samples, pipeline, cfg):
    """Images whose channels do not fit the model: one image for each number of channels that the
    loader has found goes through the whole pipeline.

    Args:
        samples (list[tuple[dict, int | None]]): Sound samples, and their channels as loaded.
        pipeline (list[dict]): The pipeline.
        cfg (Config): With the model.

    Yields:
        tuple[str, str]: What is wrong, and with which file.
    """
    kinds = defaultdict(list)
    for sample, loaded in samples:
        kinds[loaded].append(sample)
    for same in kinds.values() if pipeline else ():
        sample = same[0]
        file = sample['img_path']
        if len(same) > 1:
            file += f' and {len(same) - 1} of as many channels'
        try:
            inputs = build_pipeline(pipeline)(copy.deepcopy(sample))['inputs']
        except Exception as error:
            yield f'image cannot pass the pipeline of the config: {one_line(error)}', file
            continue
        channels = inputs.shape[-3]
        for name, expected in expected_channels(cfg):
            if channels != expected:
                yield f'image has {channels} channels after the pipeline, but {name}', file


def expected_channels(cfg):
    """For how many channels a model is made.

    Yields:
        tuple[str, int]: What the config says, and the channels that it means.
    """
    backbone = cfg.model.get('backbone') or {}
    if 'in_channels' in backbone or str(backbone.get('type')).endswith('VisionLSTM'):
        channels = backbone.get('in_channels', 3)
        yield f'the backbone has in_channels={channels}', channels
    for name in ('mean', 'std'):
        values = data_preprocessor(cfg).get(name)
        if values is not None and len(values) != 1:  # one is for all channels
            yield f'{name} of the data_preprocessor has {len(values)} values', len(values)


def misfits(classes, model):
    """Heads of a model that predict another number of classes than the data set has."""
    for name in ('decode_head', 'auxiliary_head', 'head'):
        head = model.get(name)
        number = head.get('num_classes') if isinstance(head, dict) else None
        if classes and number is not None and number != len(classes):
            yield f'num_classes={number} in {head.type}, but the data set has {len(classes)}'


def report(found):
    """Print what is wrong, and the first files of each kind."""
    kinds = defaultdict(list)
    for what, file in found:
        kinds[what].append(file)
    for what, files in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        print(f'  {len(files)} × {what}')
        for file in files[:5]:
            print(f'      {file}')
        if len(files) > 5:
            print(f'      … and {len(files) - 5} more (--out FILE lists all)')


def report_classes(classes, counts):
    """Print the share of each class, and in how many images it occurs."""
    if not classes or not counts:
        return
    counts = np.stack(counts)
    shares, images = counts.sum(0) / max(counts.sum(), 1), (counts > 0).sum(0)
    shown = range(len(classes)) if len(classes) <= 30 else shares.argsort()[:10]
    print('  share, images, class' + ('' if len(classes) <= 30 else ' (the 10 rarest)'))
    for i in shown:
        print(f'  {shares[i]:6.2%} {images[i]:6} {classes[i]}')
    never = [str(classes[i]) for i in np.flatnonzero(images == 0)]
    if never:
        more = ', …' if len(never) > 10 else ''
        print(f'  {len(never)} classes never occur: {", ".join(never[:10])}{more}')


if __name__ == '__main__':
    run(main)
