# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Check all files of a config's datasets before training.

python tools/check_dataset.py configs/upernet_vil_t_ade20k.py -j 8

Finds missing, empty, damaged or truncated files, annotations that do not fit their image or the
classes, and images whose channels do not fit the model. Exit status: 1 if there are problems.
"""

import os
import sys
from collections import defaultdict

import numpy as np
from mmengine.fileio import put_text
from PIL import Image

from mmvil.cli.config import innermost_datasets, load_config, set_data_root
from mmvil.cli.dataset_check import BINARY_MASKS, check_dataset
from mmvil.cli.errors import UserError
from mmvil.cli.main import add_config_arguments, at_least, make_parser, parse_args, run
from mmvil.cli.preflight import check_folders

SPLITS = ('train', 'val', 'test')
Image.MAX_IMAGE_PIXELS = None  # large images are not an attack here


def main():
    args = parse_args(make_check_parser())
    cfg = load_config(args.config, args.cfg_options)
    set_data_root(cfg, args.data_root)
    problems, has_labels = [], False
    for split, dataset_cfg in distinct_datasets(cfg, args.splits):
        check_folders(cfg, f'{split}_dataloader')
        images, classes, found, counts = check_dataset(dataset_cfg, cfg, args.jobs)
        if has_labels:  # small splits may contain only background
            found = [problem for problem in found if problem.what != BINARY_MASKS]
        has_labels |= counts is not None and counts[:, 1:].any()
        print(f'{split}: {images} images, {len(classes)} classes')
        print_problems(found)
        if counts is not None:
            print_classes(classes, counts)
        problems += found

    if args.out:
        lines = (': '.join(filter(None, (x.file, x.what, x.labels))) for x in problems)
        put_text(''.join(f'{line}\n' for line in lines), args.out)
    print(f'\nProblems: {len(problems)}.' if problems else '\nNo problems found.')
    sys.exit(1 if problems else 0)


def make_check_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_config_arguments(parser)
    add('--data-root', help="data folder, instead of the config's")
    add('--splits', nargs='+', choices=SPLITS, default=SPLITS, help='default: all distinct ones')
    jobs = os.cpu_count()
    add('-j', '--jobs', type=at_least(1), default=jobs, help='processes (default: all cores)')
    add('--out', help='text file for the list of all problems')
    return parser


def distinct_datasets(cfg, splits):
    """Split name and config of each dataset that differs in more than its pipeline."""
    found, seen = [], []
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset_cfg in innermost_datasets(loader.dataset) if loader else ():
            source = {key: value for key, value in dataset_cfg.items() if key != 'pipeline'}
            if source not in seen:
                seen.append(source)
                found.append((split, dataset_cfg))
    if not found:
        raise UserError(f'{cfg.filename} has no dataset for {", ".join(splits)}')
    return found


def print_problems(problems):
    """Print each kind of problem with its first files, and their labels, if any."""
    kinds = defaultdict(list)
    for what, file, labels in problems:
        kinds[what].append(f'{file}: {labels}' if labels else file)
    for what, files in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        print(f'  {len(files)} × {what}')
        for file in files[:5]:
            print(f'      {file}')
        if len(files) > 5:
            print(f'      … and {len(files) - 5} more (--out FILE lists all)')


def print_classes(classes, counts):
    """Print the share of each class and the number of images in which it occurs."""
    shares, images = counts.sum(0) / max(counts.sum(), 1), (counts > 0).sum(0)
    few = len(classes) <= 30
    print('  share, images, class' + ('' if few else ' (the 10 rarest)'))
    for i in range(len(classes)) if few else shares.argsort()[:10]:
        print(f'  {shares[i]:6.2%} {images[i]:6} {classes[i]}')
    absent = [str(classes[i]) for i in np.flatnonzero(images == 0)]
    if absent:
        more = ', …' if len(absent) > 10 else ''
        print(f'  never occur ({len(absent)}): {", ".join(absent[:10])}{more}')


if __name__ == '__main__':
    run(main)
