# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Compute mean and standard deviation of each channel of a config's training images.

python tools/analysis_tools/channel_statistics.py CONFIG --data-root data/fields

Images are those that the config's test pipeline gives to the data preprocessor, so any loader
works. What it prints belongs in the config. Images that cannot be read, values that are not finite,
channels that differ in number or are constant are errors. See docs/multiband.md.
"""

import argparse
import os
from typing import NamedTuple

import numpy as np
import torch
from check_dataset import build
from mmengine.config import DictAction

from mmvil.cli.config import load_config, set_data_root
from mmvil.cli.errors import UserError
from mmvil.cli.images import ImageReader, data_preprocessor
from mmvil.cli.main import parse_args, run
from mmvil.cli.preflight import check_folders
from mmvil.engine.config_nodes import innermost_datasets

MULTIBAND = 'mmvil.apis.data_preprocessor.MultibandSegDataPreProcessor'


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file with the loader of the images')
    parser.add_argument('--data-root', help="folder of the data, instead of the config's")
    parser.add_argument('--num', type=int, help='so many images, evenly spread (default: all)')
    parser.add_argument(
        '-j', '--jobs', type=int, default=os.cpu_count() or 1, help='processes (default: all cores)'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE'
    )
    parser.add_argument('--traceback', action='store_true', help='show the whole trace of an error')
    return parser


# -- Statistics ------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Number of pixels, mean (C,) and sum of squared deviations (C,) of channels, in float64."""

    number: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, image):
        """Those of an image (C, H, W)."""
        means, squares = [], []
        for channel in image:  # one by one, because float64 copies of large images are large
            channel = channel.astype(np.float64)
            means.append(channel.mean())
            squares.append(np.square(channel - means[-1]).sum())
        return cls(image[0].size, np.array(means), np.array(squares))

    def merge(self, other):
        """Those of both, without the cancellation of large sums (Chan, Golub and LeVeque, 1983)."""
        number = self.number + other.number
        delta = other.mean - self.mean
        return Moments(
            number,
            self.mean + delta * (other.number / number),
            self.squares + other.squares + delta**2 * (self.number * other.number / number),
        )

    @property
    def std(self):
        return np.sqrt(self.squares / self.number)


class MomentsOfFiles(torch.utils.data.Dataset):
    """Moments of each of some files as a tuple, or in one line what is wrong with it."""

    def __init__(self, files, reader, flip):
        self.files, self.reader, self.flip = files, reader, flip

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path = self.files[index]
        try:
            image = self.reader.prepare(self.reader.load(path))['inputs'].numpy()
        except UserError as error:
            return str(error)
        if not np.isfinite(image).all():
            return f'{path} has values that are not finite, which no training survives'
        return tuple(Moments.of(image[::-1] if self.flip and len(image) == 3 else image))


def compute(files, reader, flip, jobs=0):
    """Moments of the pixels of all files.

    Args:
        files (list[str]): Images.
        reader (ImageReader): Reads them.
        flip (bool): The data preprocessor swaps red and blue before it normalizes.
        jobs (int): Processes. Default: 0, this one.

    Returns:
        Moments: Of all.

    Raises:
        UserError: If an image cannot be read, is not finite, or has other channels than the first.
    """
    loader = torch.utils.data.DataLoader(
        MomentsOfFiles(files, reader, flip), batch_size=None, num_workers=jobs, collate_fn=_same
    )
    total = None
    for path, moments in zip(files, loader):
        if isinstance(moments, str):
            raise UserError(moments)
        moments = Moments(*moments)
        if total is not None and len(moments.mean) != len(total.mean):
            raise UserError(
                f'{path} has {len(moments.mean)} channels, the images before have '
                f'{len(total.mean)}: {files[0]}, …'
            )
        total = moments if total is None else total.merge(moments)
    return total


def _same(moments):
    return moments


# -- Command line ----------------------------------------------------------------------------------


def training_files(cfg, config):
    """The images of the config's training data set."""
    if cfg.get('train_dataloader') is None:
        raise UserError(f'{config} has no train_dataloader')
    check_folders(cfg, 'train_dataloader')
    datasets = [build(each, cfg) for each in innermost_datasets(cfg.train_dataloader.dataset)]
    return [
        dataset.get_data_info(i)['img_path'] for dataset in datasets for i in range(len(dataset))
    ]


def main():
    args = parse_args(make_parser())
    cfg = load_config(args.config, args.cfg_options)
    set_data_root(cfg, args.data_root)
    files = training_files(cfg, args.config)
    found = len(files)
    if args.num:
        files = [files[i * found // args.num] for i in range(min(args.num, found))]
    normalizer = data_preprocessor(cfg)
    flip = any(normalizer.get(key) for key in ('bgr_to_rgb', 'rgb_to_bgr', 'to_rgb'))
    total = compute(files, ImageReader(cfg), flip, args.jobs)

    channels = len(total.mean)
    print(f'{len(files)} of {found} images, {total.number} pixels, {channels} channels')
    constant = np.flatnonzero(total.std == 0).tolist()
    if constant:
        raise UserError(
            f'channels {constant} (from 0) are constant, and their standard deviation 0 would '
            'divide; leave them out when loading'
        )
    mean, std = ([float(f'{x:.6g}') for x in values] for values in (total.mean, total.std))
    needs_help = cfg.get('default_scope') == 'mmseg' and channels not in (1, 3)
    kind = f"type='{MULTIBAND}', " if needs_help else ''
    print(f'data_preprocessor=dict({kind}mean={mean}, std={std})')


if __name__ == '__main__':
    run(main)
