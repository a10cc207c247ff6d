# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Predict an image or a folder of images, and draw the predictions.

python tools/demo.py street.jpg configs/upernet_vil_t_ade20k.py checkpoint.pth --out-dir pictures
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
from _common import (
    DictAction,
    UserError,
    build_lazily,
    check_checkpoint,
    check_fit,
    load_config,
    parse_args,
    run,
)
from mmengine.runner import CheckpointLoader
from PIL import Image

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('image', help='image, or folder of images')
    parser.add_argument('config', help='config file that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out-dir', default='pictures', help='folder for the pictures (PNG)')
    parser.add_argument(
        '--opacity', type=float, default=0.5, help='of the classes over the image, 0 to 1'
    )
    parser.add_argument('--device', help='cuda, cuda:1, cpu (default: a GPU if there is one)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE'
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load the checkpoint even if it asks for functions that may run code',
    )
    parser.add_argument('--traceback', action='store_true', help='show the trace of an error')
    return parser


def find_images(path):
    """The image, or the images in the folder, sorted by name."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f'image not found: {path.absolute()}')
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not images:
        raise UserError(f'no images in {path.absolute()} (looked for {", ".join(SUFFIXES)})')
    return images


def build_inferencer(cfg, checkpoint, device):
    """mmseg's or mmpretrain's inferencer, with the weights and class names of a checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # they warn of random weights, which are replaced below
        if cfg.default_scope == 'mmseg':
            from mmseg.apis import MMSegInferencer

            inferencer = MMSegInferencer(cfg, device=device)
        else:
            from mmpretrain import ImageClassificationInferencer

            inferencer = ImageClassificationInferencer(cfg, pretrained=False, device=device)
    inferencer.show_progress = False

    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    check_fit(inferencer.model, loaded, checkpoint)
    state = loaded.get('state_dict', loaded)
    inferencer.model.load_state_dict(
        {name.removeprefix('module.'): tensor for name, tensor in state.items()}, strict=False
    )
    meta = loaded.get('meta', {}).get('dataset_meta')
    if meta is None:
        meta = build_lazily(cfg.test_dataloader.dataset, cfg.default_scope).metainfo
    inferencer.classes = meta['classes']
    inferencer.model.dataset_meta = dict(classes=meta['classes'], palette=meta.get('palette'))
    return inferencer


def segment(inferencer, image, out_file, opacity):
    """Draw the classes over an image; return which cover most of it."""
    result = inferencer(str(image), return_vis=True, opacity=opacity)
    Image.fromarray(result['visualization']).save(out_file)
    labels, counts = np.unique(result['predictions'], return_counts=True)
    order = np.argsort(-counts)[:5]
    shares = counts / counts.sum()
    return ', '.join(f'{inferencer.classes[labels[i]]} {shares[i]:.0%}' for i in order)


def classify(inferencer, image, out_file):
    """Write the class on an image; return its name and score."""
    result = inferencer(str(image), show_dir=str(out_file.parent))[0]
    return f'{result["pred_class"]} {result["pred_score"]:.1%}'


def main():
    args = parse_args(make_parser())
    cfg = load_config(args.config, args.cfg_options)
    images = find_images(args.image)
    check_checkpoint(args.checkpoint)
    inferencer = build_inferencer(cfg, args.checkpoint, args.device)

    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for image in images:
        out_file = out_dir / f'{image.stem}.png'
        if cfg.default_scope == 'mmseg':
            found = segment(inferencer, image, out_file, args.opacity)
        else:
            found = classify(inferencer, image, out_file)
        print(f'{image} -> {out_file}: {found}')


if __name__ == '__main__':
    run(main)
