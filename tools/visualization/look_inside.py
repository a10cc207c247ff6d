# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Plot gates, memory decay, receptive fields or features of ViL blocks.

python tools/visualization/look_inside.py gates street.jpg CONFIG CHECKPOINT --out gates.png

See docs/visualization.md for the four pictures and how to read them.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from mmvil.apis import draw_blocks
from mmvil.apis.inspect_blocks import default_blocks, find_backbone, trained_size
from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError
from mmvil.cli.inference import ImageReader, build_model, find_images
from mmvil.cli.main import (
    add_config_arguments,
    at_least,
    device,
    figure_path,
    make_parser,
    parse_args,
    run,
)

PICTURES = dict(
    gates='input and forget gates over the image',
    decay='weights of earlier tokens, and half-lives of the memory',
    receptive_field="gradient of the center token's features, averaged over images",
    pca='features of the blocks as colors',
)


def make_picture_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('picture', choices=PICTURES, help='; '.join(f'{k}: {v}' for k, v in PICTURES.items()))
    add('image', help='image, or folder of images')
    add_config_arguments(parser, 'config file that the checkpoint was trained with')
    add('checkpoint', help='checkpoint file')
    add('--out', type=figure_path, help='picture to write (default: PICTURE.png)')
    blocks = '0-based (default: pairs, or those of out_indices)'
    add('--blocks', type=at_least(0), nargs='+', help=blocks)
    pair = dict(type=at_least(1), nargs=2, metavar=('HEIGHT', 'WIDTH'))
    add('--size', help='resize images (default: training size for classifiers, else none)', **pair)
    pair = dict(type=at_least(0, float, 1), nargs=2, default=(0.5, 0.5), metavar=('Y', 'X'))
    token = 'decay, receptive_field: the token, as fractions of height and width (%(default)s)'
    add('--at', help=token, **pair)
    head = 'gates, decay: one head (default: the mean over heads)'
    add('--head', type=at_least(0), help=head)
    number = 'number of images from a folder (%(default)s)'
    add('--num', type=at_least(1), default=4, help=number)
    add('--device', type=device, default='cpu', help='(%(default)s)')
    return parser


def read_image(path, reader, model, size=None):
    """Read an image like the config's loader, resize it if a size is given, and normalize it like
    the model, without padding.
    """
    image = reader.load(path)['img']
    if size is not None:
        image = resize(image, size)
    x = model.data_preprocessor(dict(inputs=[to_tensor(image)]))['inputs']
    return draw_blocks.ImagePair(reader.picture(image), x[..., : image.shape[0], : image.shape[1]])


def to_tensor(image):
    """Convert an image (H, W[, C]) to a float tensor (C, H, W)."""
    image = image.reshape(*image.shape[:2], -1).astype(np.float32)
    return torch.from_numpy(image).permute(2, 0, 1)


def resize(image, size):
    """Resize an image (H, W[, C]) with any number of channels, preserving dtype and range."""
    x = to_tensor(image)[None]
    y = F.interpolate(x, tuple(size), mode='bicubic', antialias=True).clamp(x.min(), x.max())
    y = y if np.issubdtype(image.dtype, np.floating) else y.round()
    return y[0].permute(1, 2, 0).numpy().astype(image.dtype)


def check(args, backbone, images):
    """Raise if a block or head does not exist, or images cannot be averaged."""
    if args.picture == 'receptive_field' and len({image.x.shape for image in images}) > 1:
        raise UserError('the images differ in size; resize them with --size HEIGHT WIDTH')
    last = len(backbone.layers) - 1
    if max(args.blocks) > last:
        raise UserError(f'--blocks must be between 0 and {last}, but are {args.blocks}')
    if args.head is not None and args.head >= backbone.num_heads:
        raise UserError(f'--head must be 0 to {backbone.num_heads - 1}, but is {args.head}')


def main():
    args = parse_args(make_picture_parser())
    matplotlib.use('Agg')
    cfg = load_config(args.config, args.cfg_options)
    paths = find_images(args.image)
    several = args.picture in ('receptive_field', 'pca')
    number = args.num if several else 1
    paths = paths[:: max(1, len(paths) // number)][:number]
    model = build_model(cfg, args.checkpoint, args.device)
    backbone = find_backbone(model)

    size = args.size
    if size is None and cfg.get('default_scope') == 'mmpretrain':
        size = trained_size(backbone)
    reader = ImageReader(cfg)
    images = [read_image(path, reader, model, size) for path in paths]
    args.blocks = args.blocks or default_blocks(backbone, args.picture in ('gates', 'decay'))
    check(args, backbone, images)

    options = dict(gates=[args.head], decay=[args.head, args.at], receptive_field=[args.at], pca=[])
    draw = getattr(draw_blocks, f'draw_{args.picture}')
    figure = draw(backbone, images if several else images[0], args.blocks, *options[args.picture])
    out = args.out or Path(f'{args.picture}.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(f'Picture: {out}')


if __name__ == '__main__':
    run(main)
