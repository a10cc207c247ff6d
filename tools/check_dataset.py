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


# -- One sample ------------------------------------------------------------------------------------


# -- A data set ------------------------------------------------------------------------------------


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
