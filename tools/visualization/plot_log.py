# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Plot the loss and the validation metric of one or more training runs."""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402


def find_log(path):
    """The newest ``vis_data/scalars.json`` of a work directory, or the file itself.

    Args:
        path (Path): A work directory of mmengine, one of its time-stamped folders, or the file.

    Returns:
        Path: The file.

    Raises:
        FileNotFoundError: If there is none.
    """
    if path.is_file():
        return path
    logs = sorted(path.glob('**/vis_data/scalars.json'), key=lambda p: p.stat().st_mtime)
    if not logs:
        raise FileNotFoundError(
            f'No vis_data/scalars.json under {path}: give the --work-dir of a training run.'
        )
    return logs[-1]


def read_log(path):
    """Collect every scalar of a log.

    Args:
        path (Path): A ``scalars.json`` of mmengine, one JSON object per line.

    Returns:
        dict[str, tuple[list, list]]: Steps and values of each scalar.
    """
    curves = {}
    for line in path.read_text().splitlines():
        scalars = json.loads(line)
        for name, value in scalars.items():
            steps, values = curves.setdefault(name, ([], []))
            steps.append(scalars['step'])
            values.append(value)
    return curves


def plot(runs, metric, out):
    """Draw the loss (left axis, line) and the metric (right axis, dots) over the iterations.

    Args:
        runs (dict[str, dict]): Curves as :func:`read_log` returns them, by the name of the run.
        metric (str): Name of the validation metric, such as 'mIoU'.
        out (Path): Picture to write.
    """
    figure, left = plt.subplots(figsize=(7, 4), layout='constrained')
    right = left.twinx()
    for i, (name, curves) in enumerate(runs.items()):
        loss, values = curves.get('loss', ([], [])), curves.get(metric, ([], []))
        left.plot(*loss, color=f'C{i}', alpha=0.6, label=f'{name}: loss')
        right.plot(*values, color=f'C{i}', marker='o', label=f'{name}: {metric}')
    left.set(xlabel='iteration', ylabel='training loss')
    left.set_ylim(bottom=0)
    right.set(ylabel=f'validation {metric}')
    right.set_ylim(0, 100)
    lines = left.get_lines() + right.get_lines()
    left.legend(lines, [line.get_label() for line in lines], loc='center right')
    left.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('runs', type=Path, nargs='+', help='work directories or scalars.json files')
    parser.add_argument('--metric', default='mIoU', help='in percent (%(default)s)')
    parser.add_argument('--out', type=Path, default=Path('curve.png'), help='(%(default)s)')
    args = parser.parse_args()
    try:
        runs = {path.name: read_log(find_log(path)) for path in args.runs}
    except FileNotFoundError as error:
        sys.exit(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(runs, args.metric, args.out)
    print(f'Curve: {args.out}')


if __name__ == '__main__':
    main()
