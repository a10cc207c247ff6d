# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Compute mean and standard deviation of each channel of a config's training images.

python tools/analysis_tools/channel_statistics.py CONFIG --data-root data/fields

Images are read by the config's test pipeline up to the data preprocessor, so any loader works. The
printed line belongs in the config. Images that cannot be read, values that are not finite, and
channels that differ in number or are constant are errors. See docs/multiband.md.
"""

import os

import numpy as np
from torch.utils.data import DataLoader, Dataset

from mmvil.cli.config import build_lazily, innermost_datasets, load_config, set_data_root
from mmvil.cli.errors import UserError, one_line
from mmvil.cli.inference import ImageReader, data_preprocessor
from mmvil.cli.main import add_config_arguments, make_parser, parse_args, run
from mmvil.cli.preflight import check_folders

MULTIBAND = 'mmvil.apis.data_preprocessor.MultibandSegDataPreProcessor'


def make_statistics_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_config_arguments(parser, 'config file with the loader of the images')
    add('--data-root', help="folder of the data, instead of the config's")
    add('--num', type=int, help='number of images, evenly spread (default: all)')
    jobs = os.cpu_count() or 1
    add('-j', '--jobs', type=int, default=jobs, help='processes (default: all cores)')
    return parser


class FileStatistics(Dataset):
    """Number of pixels, channel means (C,) and channel variances (C,) of each file, in float64; a
    line of text for a file that cannot be used.
    """

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
        if self.flip and len(image) == 3:
            image = image[::-1]
        # Channel by channel, because float64 copies of large images are large.
        moments = [(channel.mean(dtype='f8'), channel.var(dtype='f8')) for channel in image]
        return image[0].size, *np.transpose(moments)


def merge(numbers, means, variances):
    """Combine statistics of files without the cancellation of large sums.

    Args:
        numbers (Sequence[int]): Number of pixels of each file.
        means, variances (Sequence[ndarray]): Channel means and variances (C,) of each file.

    Returns:
        tuple[ndarray, ndarray]: Mean and standard deviation (C,) of all pixels.
    """
    mean = np.average(means, axis=0, weights=numbers)
    variance = np.average(variances + np.square(means - mean), axis=0, weights=numbers)
    return mean, np.sqrt(variance)


def compute(files, reader, flip, jobs=0):
    """Compute statistics of the pixels of all files.

    Args:
        files (list[str]): Images.
        reader (ImageReader): Reads them.
        flip (bool): Whether the data preprocessor swaps red and blue before it normalizes.
        jobs (int): Processes. Default: 0, the current one.

    Returns:
        tuple[int, ndarray, ndarray]: Number of pixels, mean (C,) and standard deviation (C,).

    Raises:
        UserError: If an image cannot be read, is not finite, or differs in channels.
    """
    found = []
    dataset = FileStatistics(files, reader, flip)
    loader = DataLoader(dataset, batch_size=None, num_workers=jobs, collate_fn=_unchanged)
    for path, statistics in zip(files, loader):
        if isinstance(statistics, str):
            raise UserError(statistics)
        found.append(statistics)
        channels, expected = len(statistics[1]), len(found[0][1])
        if channels != expected:
            raise UserError(
                f'{path} has {channels} channels, the images before have {expected}: {files[0]}, …'
            )
    numbers, means, variances = zip(*found)
    return sum(numbers), *merge(numbers, means, variances)


def _unchanged(statistics):
    return statistics


def training_files(cfg, config):
    """List the images of the training dataset."""
    if cfg.get('train_dataloader') is None:
        raise UserError(f'{config} has no train_dataloader')
    check_folders(cfg, 'train_dataloader')
    files = []
    for each in innermost_datasets(cfg.train_dataloader.dataset):
        dataset = build_lazily(each, cfg.get('default_scope'))
        try:
            dataset.full_init()
        except Exception as error:  # any dataset's own
            raise UserError(f'cannot list the files of {each.type}: {one_line(error)}') from error
        files += [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
    return files


def main():
    args = parse_args(make_statistics_parser())
    cfg = load_config(args.config, args.cfg_options)
    set_data_root(cfg, args.data_root)
    files = training_files(cfg, args.config)
    found = len(files)
    if args.num:
        files = [files[i * found // args.num] for i in range(min(args.num, found))]
    normalizer = data_preprocessor(cfg)
    flip = any(normalizer.get(key) for key in ('bgr_to_rgb', 'rgb_to_bgr', 'to_rgb'))
    pixels, mean, std = compute(files, ImageReader(cfg), flip, args.jobs)

    channels = len(mean)
    print(f'{len(files)} of {found} images, {pixels} pixels, {channels} channels')
    constant = np.flatnonzero(std == 0).tolist()
    if constant:
        raise UserError(
            f'channels {constant} (from 0) are constant and cannot be divided by their standard '
            'deviation 0; leave them out when loading'
        )
    mean, std = ([float(f'{x:.6g}') for x in values] for values in (mean, std))
    needs_multiband = cfg.get('default_scope') == 'mmseg' and channels not in (1, 3)
    kind = f"type='{MULTIBAND}', " if needs_multiband else ''
    print(f'data_preprocessor=dict({kind}mean={mean}, std={std})')


if __name__ == '__main__':
    run(main)
