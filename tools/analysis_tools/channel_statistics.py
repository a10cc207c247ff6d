# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Compute the mean and standard deviation of each channel of a config's training images.

python tools/analysis_tools/channel_statistics.py CONFIG --data-root data/fields

Images are read by the config's test pipeline up to the data preprocessor, so any loader works. The
printed line belongs in the config. See docs/multiband.md.
"""

import functools
import os

import numpy as np
from mmengine.utils import track_progress_rich

from mmvil.cli.config import innermost_datasets, list_files, load_config, require, set_data_root
from mmvil.cli.errors import UserError
from mmvil.cli.inference import ImageReader
from mmvil.cli.main import add_config_arguments, at_least, make_parser, parse_args, run
from mmvil.cli.preflight import check_folders, data_preprocessor

MULTIBAND = 'mmvil.apis.data_preprocessor.MultibandSegDataPreProcessor'


def main():
    args = parse_args(make_statistics_parser())
    cfg = load_config(args.config, args.cfg_options)
    set_data_root(cfg, args.data_root)
    files = training_files(cfg)
    found = len(files)
    number = min(args.num or found, found)
    files = [files[i * found // number] for i in range(number)]
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


def make_statistics_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_config_arguments(parser, 'config file with the loader of the images')
    add('--data-root', help="data folder, instead of the config's")
    add('--num', type=at_least(1), help='number of images, evenly spread (default: all)')
    jobs = os.cpu_count()
    add('-j', '--jobs', type=at_least(1), default=jobs, help='processes (default: all cores)')
    return parser


def training_files(cfg):
    """List the images of the training dataset."""
    require(cfg, 'train_dataloader')
    check_folders(cfg, 'train_dataloader')
    files = []
    for each in innermost_datasets(cfg.train_dataloader.dataset):
        dataset = list_files(each, cfg.get('default_scope'))
        files += [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
    return files


def compute(files, reader, flip, jobs):
    """Compute the number of pixels, mean (C,) and standard deviation (C,) of all files."""
    of_file = functools.partial(statistics_of, reader=reader, flip=flip)
    found = track_progress_rich(of_file, files, nproc=jobs, description='images')
    numbers, means, variances = zip(*found)
    expected = len(means[0])
    for path, mean in zip(files, means):
        if len(mean) != expected:
            raise UserError(
                f'{path} has {len(mean)} channels, the images before have {expected}: {files[0]}, …'
            )
    return sum(numbers), *merge(numbers, means, variances)


def statistics_of(path, reader, flip):
    """Compute the number of pixels, channel means (C,) and channel variances (C,) of a file, in
    float64. With ``flip``, the data preprocessor swaps red and blue before it normalizes.
    """
    image = reader.prepare(reader.load(path))['inputs'].numpy()
    if not np.isfinite(image).all():
        raise UserError(f'{path} has values that are not finite; training would fail')
    if flip and len(image) == 3:
        image = image[::-1]
    # Channel by channel, because float64 copies of whole images would be large.
    moments = [(channel.mean(dtype='f8'), channel.var(dtype='f8')) for channel in image]
    return image[0].size, *np.transpose(moments)


def merge(numbers, means, variances):
    """Merge the statistics of all files into the mean and standard deviation (C,) of all pixels,
    without cancellation of large sums.
    """
    mean = np.average(means, axis=0, weights=numbers)
    variance = np.average(variances + np.square(means - mean), axis=0, weights=numbers)
    return mean, np.sqrt(variance)


if __name__ == '__main__':
    run(main)
