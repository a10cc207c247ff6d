# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Draw what the blocks of a ViL do with images: gates, decay, receptive field, features.

python tools/visualization/look_inside.py gates street.jpg CONFIG CHECKPOINT --out gates.png

See docs/visualization.md for the four pictures and how to read them.
"""

import argparse
import copy
import math
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib
from mmengine.config import DictAction

from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError
from mmvil.cli.images import ImageReader
from mmvil.cli.inference import build_model, find_images
from mmvil.cli.main import parse_args, run

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import MaxNLocator

from mmvil import VisionLSTM
from mmvil.ops.gates import gate_statistics

DIRECTIONS = ('forward', 'backward')
COLORS = ('tab:blue', 'tab:orange')


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


# -- What is drawn ---------------------------------------------------------------------------------


@contextmanager
def recorded(backbone):
    """Collect what every block is given and returns.

    Yields:
        list[tuple]: Filled by a forward pass with input (B, N, D), grid and output (B, N, D) of
        each block.
    """
    records = []
    hooks = [
        block.register_forward_hook(lambda _, given, y: records.append((*given, y)))
        for block in backbone.layers
    ]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def gates_of(block, x, grid):
    """Pre-activations of a block's gates.

    Args:
        block (ViLBlock): The block.
        x (Tensor): Its input, shape (B, N, D).
        grid (tuple[int, int]): Rows and columns of tokens.

    Returns:
        tuple[Tensor, Tensor]: Input and forget gate, shape (B, NH, N).
    """
    x_m, _ = block.proj_up(block.norm(x)).chunk(2, dim=-1)
    c = F.silu(block.conv(x_m, grid, block.reverse))
    by_head = block.q_proj(c), block.k_proj(c), block.v_proj(x_m)  # (B, NH, N, DH)
    qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in by_head], dim=-1)  # (B, N, 3E)
    return block.igate(qkv).transpose(1, 2), block.fgate(qkv).transpose(1, 2)


def decay_weights(igate, fgate, reverse, token):
    r"""Weights :math:`D_{tj}` with which a token sees what others have written; 1 is the largest.

    Args:
        igate, fgate (Tensor): Pre-activations, shape (..., N).
        reverse (bool): Tokens are read from last to first.
        token (int): t.

    Returns:
        Tensor: Shape (..., N), 0 for tokens that have not been read yet.
    """
    stats = gate_statistics(igate, fgate, reverse)
    weights = torch.exp(stats.source - stats.running_max[..., token, None])
    unread = slice(0, token) if reverse else slice(token + 1, None)
    weights[..., unread] = 0
    return weights


def half_life(fgate):
    """After how many tokens half is forgotten, if the forget gate stays as it is."""
    return math.log(2) / -F.logsigmoid(fgate.double())


def receptive_field(backbone, images, blocks, at):
    """Gradient of the features of one token, absolute and averaged over images.

    Args:
        backbone (VisionLSTM): The backbone.
        images (list[Tensor]): Each of shape (1, C, H, W), all of one size.
        blocks (list[int]): After which blocks.
        at (tuple[float, float]): Place of the token, as parts of height and width.

    Returns:
        ndarray: Shape (blocks, H, W); the largest value of each map is 1.
    """
    total = 0
    for image in images:
        image = image.clone().requires_grad_()
        with recorded(backbone) as records, torch.enable_grad():
            backbone(image)
        token = token_at(records[0][1], at)
        maps = []
        for block in blocks:
            features = records[block][2][0, token].sum()
            (gradient,) = torch.autograd.grad(features, image, retain_graph=True)
            maps.append(gradient[0].abs().sum(0))
        total = total + torch.stack(maps)
    return (total / total.amax((1, 2), keepdim=True)).cpu().numpy()


def principal_colors(features):
    """The three strongest principal components as colors, the same for all images.

    Args:
        features (list[Tensor]): Tokens of each image, (N, D).

    Returns:
        list[ndarray]: (N, 3) in [0, 1].
    """
    tokens = torch.cat(features).double()
    tokens = tokens - tokens.mean(0)
    components = tokens @ torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]).to(components), dim=0)
    colors = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return [color.cpu().numpy() for color in colors.split([len(x) for x in features])]


def token_at(grid, at):
    """Index of the token at a place given as parts of height and width."""
    row, column = (min(int(part * side), side - 1) for part, side in zip(at, grid))
    return row * grid[1] + column


def default_blocks(backbone, pairs):
    """A pair of blocks at the beginning, in the middle and at the end; or the blocks that are
    returned.
    """
    count = len(backbone.layers)
    if not pairs and len(backbone.out_indices) > 1:
        return list(backbone.out_indices)
    starts = sorted({0, (count // 4) * 2, count - 2 - count % 2}) if count > 1 else [0]
    both = [block for start in starts for block in (start, start + 1) if 0 <= block < count]
    return sorted(set(both)) if pairs else sorted({both[-1], *both[1::2]})


# -- Pictures --------------------------------------------------------------------------------------


def name_of(block):
    return f'block {block}, {DIRECTIONS[block % 2]}'


def show(axis, picture, title='', **options):
    """Draw a picture or a map without ticks."""
    drawn = axis.imshow(picture, **options)
    axis.set(xticks=[], yticks=[], title=title)
    return drawn


def mean_over_heads(x, head):
    """(NH, N) to (N, ): one head, or the mean."""
    return x.mean(0) if head is None else x[head]


def make_figure(rows, columns, aspect, width=2.3, extra=0.6):
    """A figure whose panels have the shape of the images."""
    size = (width * columns + extra, rows * (width * aspect + 0.1) + 0.6)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained')


def draw_gates(model, image, blocks, head):
    """Both gates of some blocks over the image."""
    backbone = backbone_of(model)
    with torch.no_grad(), recorded(backbone) as records:
        backbone(image.x)
    aspect = image.picture.shape[0] / image.picture.shape[1]
    figure, axes = make_figure(2, len(blocks) + 1, aspect, extra=1)
    show(axes[0, 0], image.picture, 'image')
    axes[1, 0].axis('off')
    rows = [[], []]
    for block in blocks:
        x, grid, _ = records[block]
        with torch.no_grad():
            igate, fgate = gates_of(backbone.layers[block], x, grid)
        for row, values in zip(rows, (igate[0], fgate[0].sigmoid())):
            row.append(mean_over_heads(values, head).view(grid).cpu().numpy())
    labels = (r'input gate $\tilde{i}$', r'forget gate $\sigma(\tilde{f})$')
    for line, maps, label, colors in zip(axes, rows, labels, ('magma', 'viridis')):
        # The range is that of each block: blocks differ more than places do.
        for axis, values in zip(line[1:], maps):
            drawn = show(axis, values, cmap=colors)
            bar = figure.colorbar(drawn, ax=axis, location='bottom', shrink=0.9, pad=0.02)
            bar.locator = MaxNLocator(3)
        line[1].set_ylabel(label)
    for axis, block in zip(axes[0, 1:], blocks):
        axis.set_title(name_of(block))
    heads = 'mean over heads' if head is None else f'head {head}'
    figure.suptitle(f'What is written, and what is kept ({heads})')
    return figure


def draw_decay(model, image, blocks, head, at):
    """What one token sees in some blocks, and the half-life of the memory in all blocks."""
    backbone = backbone_of(model)
    with torch.no_grad(), recorded(backbone) as records:
        backbone(image.x)
        gates = [gates_of(block, x, grid) for block, (x, grid, _) in zip(backbone.layers, records)]
    grid = records[0][1]
    token = token_at(grid, at)
    height, width = image.picture.shape[:2]
    center = ((token % grid[1] + 0.5) / grid[1], (token // grid[1] + 0.5) / grid[0])

    panel = 2.3 * height / width
    figure = plt.figure(figsize=(2.3 * (len(blocks) + 1) + 0.6, panel + 3.4), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=[panel + 0.5, 2.9])
    axes = above.subplots(1, len(blocks) + 1, squeeze=False)[0]
    show(axes[0], image.picture, 'image and token')
    for axis, block in zip(axes[1:], blocks):
        igate, fgate = gates[block]
        weights = decay_weights(igate[0], fgate[0], backbone.layers[block].reverse, token)
        weights = mean_over_heads(weights, head).view(grid).cpu().numpy()
        extent = (0, width, height, 0)
        drawn = show(axis, weights, name_of(block), cmap='inferno', vmin=0, vmax=1, extent=extent)
    for axis in axes:
        axis.plot(center[0] * width, center[1] * height, 's', mfc='none', mec='cyan', ms=6)
    above.colorbar(drawn, ax=axes, label='weight $D_{tj}$', shrink=0.8)

    axis = below.subplots()
    heads = gates[0][1].shape[1]
    for block, (_, fgate) in enumerate(gates):
        rows = half_life(fgate[0]).cpu().numpy() / grid[1]  # (NH, N), in rows of tokens
        low, middle, high = np.quantile(rows, [0.1, 0.5, 0.9], axis=1)
        places = block + np.linspace(-0.27, 0.27, heads)
        color = COLORS[block % 2]
        axis.vlines(places, low, high, color=color, alpha=0.5, linewidth=2)
        axis.scatter(places, middle, s=12, color=color, zorder=3)
    for direction, color in zip(DIRECTIONS, COLORS):
        axis.scatter([], [], color=color, s=12, label=direction)
    axis.axhline(grid[0], color='gray', linestyle='--', linewidth=1, label='height of the image')
    axis.axhline(1 / grid[1], color='gray', linestyle=':', linewidth=1, label='one token')
    axis.set(
        yscale='log',
        xlabel='block',
        ylabel='half-life [rows]',
        title='How long a head remembers: median over tokens, line from 10% to 90%',
        xticks=range(0, len(gates), max(1, len(gates) // 12)),
    )
    axis.grid(axis='y', alpha=0.3)
    axis.legend(ncols=4, fontsize='small', loc='best')
    return figure


def draw_receptive_field(model, images, blocks, at):
    """Receptive fields after some blocks, trained (above) and with random weights (below)."""
    trained = backbone_of(model)
    torch.manual_seed(0)
    untrained = copy.deepcopy(trained)
    for block in untrained.layers:
        block.reset_parameters()
    inputs = [image.x for image in images]
    aspect = images[0].picture.shape[0] / images[0].picture.shape[1]
    figure, axes = make_figure(2, len(blocks), aspect, extra=1)
    for line, backbone, label in zip(axes, (trained, untrained), ('trained', 'random blocks')):
        maps = receptive_field(backbone, inputs, blocks, at)
        for axis, values, block in zip(line, maps, blocks):
            values = np.log10(np.maximum(values, 1e-8))
            title = f'after block {block}' if backbone is trained else ''
            drawn = show(axis, values, title, cmap='magma', vmin=-4, vmax=0)
        line[0].set_ylabel(label)
    figure.colorbar(drawn, ax=axes, label='log10 of the relative gradient', shrink=0.8)
    number = f'{len(images)} image{"s" if len(images) > 1 else ""}'
    figure.suptitle(f'Effective receptive field of one token, mean of {number}')
    return figure


def draw_pca(model, images, blocks):
    """Features after some blocks, one row per image."""
    backbone = backbone_of(model)
    features, grids = [], []
    for image in images:
        with torch.no_grad(), recorded(backbone) as records:
            backbone(image.x)
        features.append([records[block][2][0] for block in blocks])
        grids.append(records[0][1])
    aspect = max(image.picture.shape[0] / image.picture.shape[1] for image in images)
    figure, axes = make_figure(len(images), len(blocks) + 1, aspect)
    for line, image in zip(axes, images):
        show(line[0], image.picture)
    axes[0, 0].set_title('image')
    for column, block in enumerate(blocks):
        colors = principal_colors([each[column] for each in features])
        for line, color, grid in zip(axes, colors, grids):
            show(line[column + 1], color.reshape(*grid, 3))
        axes[0, column + 1].set_title(f'after block {block}')
    figure.suptitle('Features as colors: three principal components')
    return figure


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
        figure = draw_gates(model, images[0], blocks, args.head)
    elif args.picture == 'decay':
        figure = draw_decay(model, images[0], blocks, args.head, args.at)
    elif args.picture == 'receptive_field':
        figure = draw_receptive_field(model, images, blocks, args.at)
    else:
        figure = draw_pca(model, images, blocks)
    out = args.out or Path(f'{args.picture}.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(f'Picture: {out}')


if __name__ == '__main__':
    run(main)
