# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Plot the loss and the validation metric of one or more training runs."""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase


def read_run(path):
    """Collect all scalars of a run, from several logs if it was resumed; later logs override
    earlier ones step by step.

    Args:
        path (Path): A work directory of mmengine, one of its timestamped folders, or a log.

    Returns:
        dict[str, dict[int, float]]: Values of each scalar by iteration.
    """
    logs = [path] if path.is_file() else sorted(path.glob('**/vis_data/scalars.json'))
    if not logs:
        sys.exit(f'No vis_data/scalars.json under {path}: give the --work-dir of a training run.')
    curves, trained = {}, 0
    try:
        lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    except ValueError:
        sys.exit(f'{path} is not a log of scalars, vis_data/scalars.json in a work dir.')
    for scalars in lines:
        step = scalars['step']
        if 'loss' in scalars:
            trained = step
        else:  # validation, whose step may be an epoch
            step = max(step, trained)
        for name, value in scalars.items():
            curves.setdefault(name, {})[step] = value
    return curves


def plot(runs, metric, out):
    """Plot loss (left axis, line) and metric (right axis, dots) against iterations."""
    figure, left = plt.subplots(figsize=(7, 4), layout='constrained')
    right = left.twinx()
    for i, (name, curves) in enumerate(runs.items()):
        loss, values = (sorted(curves.get(key, {}).items()) for key in ('loss', metric))
        left.plot(*zip(*loss), color=f'C{i}', alpha=0.6, label=f'{name}: loss')
        right.plot(*zip(*values), color=f'C{i}', marker='o', label=f'{name}: {metric}')
    left.set(xlabel='iteration', ylabel='training loss')
    left.set_ylim(bottom=0)
    right.set(ylabel=f'validation {metric}')
    values = [value for curves in runs.values() for value in curves.get(metric, {}).values()]
    right.set_ylim(0, 100 if max(values, default=100) > 1 else 1)  # COCO's are fractions
    lines = left.get_lines() + right.get_lines()
    left.legend(lines, [line.get_label() for line in lines], loc='center right')
    left.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('runs', type=Path, nargs='+', help='work directories or scalars.json files')
    parser.add_argument('--metric', default='mIoU', help='metric of the validation (%(default)s)')
    parser.add_argument('--out', type=Path, default=Path('curve.png'), help='(%(default)s)')
    args = parser.parse_args()
    # As figure_path of mmvil.cli.main, whose import would take most of the time.
    known = FigureCanvasBase.get_supported_filetypes()
    if args.out.suffix[1:].lower() not in known:
        suffixes = ', '.join(f'.{each}' for each in known)
        parser.error(f'argument --out: must end with one of {suffixes}, but is {args.out}')
    runs = {str(path): read_run(path) for path in args.runs}
    for path, curves in runs.items():
        if args.metric not in curves:
            print(f'{path} has no {args.metric}. --metric accepts: {", ".join(sorted(curves))}')
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        plot(runs, args.metric, args.out)
    except OSError as error:
        sys.exit(f'{error.strerror}: {error.filename}')
    print(f'Curve: {args.out}')


if __name__ == '__main__':
    main()
