# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Draw what the blocks of a ViL do with images: gates, decay, receptive field, features.

python tools/visualization/look_inside.py gates street.jpg CONFIG CHECKPOINT --out gates.png

See docs/visualization.md for the four pictures and how to read them.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
from mmengine.config import DictAction

from mmvil.apis.draw_blocks import draw_decay, draw_gates, draw_pca, draw_receptive_field
from mmvil.apis.inspect_blocks import default_blocks
from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError
from mmvil.cli.images import ImageReader
from mmvil.cli.inference import build_model, find_images
from mmvil.cli.main import parse_args, run

matplotlib.use('Agg')
import numpy as np
import torch
import torch.nn.functional as F

from mmvil import VisionLSTM


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pictures = dict(
        gates='input and forget gates over the image',
        decay='how far tokens look back',
        receptive_field="gradient of the centre's features, averaged over images",
        pca='features of the blocks as colors',
    )
    parser.add_argument(
        'picture', choices=pictures, help='; '.join(f'{k}: {v}' for k, v in pictures.items())
    )
    parser.add_argument('image', help='image, or folder of images')
    parser.add_argument('config', help='config file that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', type=Path, help='picture to write (default: PICTURE.png)')
    parser.add_argument(
        '--blocks', type=int, nargs='+', help='0-based (default: pairs, or those of out_indices)'
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help="resize images (default: segmentors do not, classifiers to the training's size)",
    )
    parser.add_argument(
        '--at',
        type=float,
        nargs=2,
        default=(0.5, 0.5),
        metavar=('Y', 'X'),
        help='decay, receptive_field: the token, as parts of height and width (%(default)s)',
    )
    parser.add_argument('--head', type=int, help='gates, decay: one head (default: their mean)')
    parser.add_argument('--num', type=int, default=4, help='images of a folder (%(default)s)')
    parser.add_argument('--device', default='cpu', help='(%(default)s)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE'
    )
    parser.add_argument('--traceback', action='store_true', help='show the trace of an error')
    return parser


# -- Images ----------------------------------------------------------------------------------------


class Image(NamedTuple):
    """A picture (H, W, 3) to look at, and the same image as the backbone wants it, (1, C, H, W)."""

    picture: np.ndarray
    x: torch.Tensor


def read_images(paths, reader, model, size=None):
    """Images as the config's loader reads them, resized if a size is given."""
    images = []
    for path in paths:
        image = reader.load(path)['img']
        if size is not None:
            image = resize(image, size)
        images.append(Image(reader.picture(image), preprocess(model, image)))
    return images


def preprocess(model, image):
    """A loaded image (H, W[, C]) as the backbone wants it, (1, C, H, W), without padding."""
    preprocessor = model.data_preprocessor
    x = to_tensor(image)[None].to(next(model.parameters()).device)
    converts = getattr(preprocessor, '_channel_conversion', False)
    if x.shape[1] == 3 and (converts or getattr(preprocessor, 'to_rgb', False)):
        x = x.flip(1)
    if getattr(preprocessor, '_enable_normalize', False):
        x = (x - preprocessor.mean) / preprocessor.std
    return x


def to_tensor(image):
    """An image (H, W) or (H, W, C) as a tensor (C, H, W)."""
    image = image.reshape(*image.shape[:2], -1).astype(np.float32)
    return torch.from_numpy(image).permute(2, 0, 1)


def resize(image, size):
    """An image (H, W[, C]) of another size (height, width), in its own dtype and range."""
    x = to_tensor(image)[None]
    y = F.interpolate(x, tuple(size), mode='bicubic', antialias=True).clamp(x.min(), x.max())
    y = y if np.issubdtype(image.dtype, np.floating) else y.round()
    return y[0].permute(1, 2, 0).numpy().astype(image.dtype)


def backbone_of(model):
    """The model's VisionLSTM."""
    for module in model.modules():
        if isinstance(module, VisionLSTM):
            return module
    raise UserError('the model has no VisionLSTM')


def main():
    args = parse_args(make_parser())
    cfg = load_config(args.config, args.cfg_options)
    paths = find_images(args.image)
    many = args.picture in ('receptive_field', 'pca')
    paths = paths[:: max(1, len(paths) // args.num)][: args.num] if many else paths[:1]
    model = build_model(cfg, args.checkpoint, args.device)
    backbone = backbone_of(model)

    size = args.size
    if size is None and cfg.get('default_scope') == 'mmpretrain':
        size = [side * backbone.patch_size for side in backbone.pos_embed.shape[1:3]]
    images = read_images(paths, ImageReader(cfg), model, size)
    if args.picture == 'receptive_field' and len({image.x.shape for image in images}) > 1:
        raise UserError('the images have several sizes; --size HEIGHT WIDTH makes them equal')
    blocks = args.blocks or default_blocks(backbone, pairs=args.picture in ('gates', 'decay'))
    if not 0 <= min(blocks) <= max(blocks) < len(backbone.layers):
        raise UserError(
            f'--blocks must be between 0 and {len(backbone.layers) - 1}, but are {blocks}'
        )
    if args.head is not None and not 0 <= args.head < backbone.num_heads:
        raise UserError(f'--head must be 0 to {backbone.num_heads - 1}, but is {args.head}')

    if args.picture == 'gates':
        figure = draw_gates(backbone, images[0], blocks, args.head)
    elif args.picture == 'decay':
        figure = draw_decay(backbone, images[0], blocks, args.head, args.at)
    elif args.picture == 'receptive_field':
        figure = draw_receptive_field(backbone, images, blocks, args.at)
    else:
        figure = draw_pca(backbone, images, blocks)
    out = args.out or Path(f'{args.picture}.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(f'Picture: {out}')


if __name__ == '__main__':
    run(main)
