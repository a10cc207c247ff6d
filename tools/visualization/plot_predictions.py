# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Plot test images with their ground truth and a segmentor's prediction, with a legend."""

from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from mmvil.cli.config import innermost_datasets, list_files, load_config
from mmvil.cli.drawing import overlay
from mmvil.cli.errors import UserError
from mmvil.cli.inference import ImageReader, build_model, build_pipeline, loads, predict
from mmvil.cli.main import at_least, device, figure_path, make_parser, parse_args, run

OPACITY = 0.65
"""Of the class colors."""


def draw(cfg, model, datasets, number, out):
    """Write a figure with one column per sample: image, ground truth, prediction."""
    meta = model.dataset_meta if model.dataset_meta['palette'] else datasets[0].metainfo
    classes, colors = meta['classes'], np.array(meta['palette'], np.float32)
    reader = ImageReader(cfg)
    steps = next(innermost_datasets(cfg.test_dataloader.dataset)).pipeline
    load_truth = build_pipeline([step for step in steps if loads(step, 'annotation')])
    columns, shown = [], set()
    samples = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
    indices = np.linspace(0, len(samples) - 1, min(number, len(samples))).round().astype(int)
    for dataset, i in map(samples.__getitem__, indices.tolist()):
        sample = dataset.get_data_info(i)
        loaded = reader.load(sample['img_path'])
        image = reader.picture(loaded['img'])
        truth = load_truth(sample)['gt_seg_map']
        prediction = predict(model, reader.prepare(loaded)).pred_sem_seg.data[0].cpu().numpy()
        labels = truth, prediction
        columns.append([image, *(overlay(image, each, colors, OPACITY) for each in labels)])
        shown.update(*map(np.unique, labels))

    height, width = columns[0][0].shape[:2]
    size = (2.6 * len(columns), 3 * 2.6 * height / width + 0.5)
    figure, axes = plt.subplots(3, len(columns), figsize=size, squeeze=False, layout='constrained')
    for axis, picture in zip(axes.T.flat, sum(columns, [])):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[:, 0], ('image', 'ground truth', 'prediction')):
        axis.set_ylabel(title)
    present = sorted(label for label in shown if label < len(classes))  # others are ignored
    keys = [Patch(color=colors[i] / 255, label=classes[i]) for i in present]
    figure.legend(handles=keys, loc='outside lower center', ncols=10, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('config', help='config of a segmentor')
    add('checkpoint', help='checkpoint of the segmentor')
    add('--out', type=figure_path, default=Path('predictions.png'), help='(%(default)s)')
    num = 'number of images, evenly spread (%(default)s)'
    add('--num', type=at_least(1), default=5, help=num)
    add('--device', type=device, default='cpu', help='(%(default)s)')
    args = parse_args(parser)
    cfg = load_config(args.config, {})
    if 'decode_head' not in cfg.model or cfg.get('test_dataloader') is None:
        raise UserError(f'{args.config} is not of a segmentor with a test_dataloader')
    model = build_model(cfg, args.checkpoint, args.device)
    inner = innermost_datasets(cfg.test_dataloader.dataset)
    datasets = [list_files(dataset, cfg.default_scope) for dataset in inner]
    draw(cfg, model, datasets, args.num, args.out)
    print(f'Pictures: {args.out}')


if __name__ == '__main__':
    run(main)
