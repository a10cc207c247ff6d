# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Plot gates, memory decay, receptive fields and features of a ViL, see inspect_blocks.py.

Each function takes the backbone, images and block indices, and returns a figure. Without ``head``,
the mean over heads is shown; ``at`` is the position (y, x) of a token, as fractions of height and
width.
"""

import copy
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from . import inspect_blocks

DIRECTIONS = ('forward', 'backward')
COLORS = ('tab:blue', 'tab:orange')


class ImagePair(NamedTuple):
    """An image for display, (H, W, 3) uint8, and as input of the backbone, (1, C, H, W)."""

    picture: np.ndarray
    x: torch.Tensor

    @property
    def aspect(self):
        """Height divided by width."""
        return self.picture.shape[0] / self.picture.shape[1]


@torch.no_grad()
def draw_gates(backbone, image, blocks, head=None):
    """Draw both gates of some blocks over the image."""
    _, grid = backbone.embed(image.x)
    gates = inspect_blocks.block_gates(backbone, image.x)
    figure, axes = _figure(2, len(blocks) + 1, image.aspect, extra=1)
    _show(axes[0, 0], image.picture, 'image')
    axes[1, 0].axis('off')
    for column, block in zip(axes[:, 1:].T, blocks):
        igate, fgate = (_one_head(gate[0], head).view(grid).cpu() for gate in gates[block])
        # Each map has its own range, because blocks differ more than positions.
        for axis, values, colors in zip(column, (igate, fgate.sigmoid()), ('magma', 'viridis')):
            drawn = _show(axis, values, cmap=colors)
            bar = figure.colorbar(drawn, ax=axis, location='bottom', shrink=0.9, pad=0.02)
            bar.locator = MaxNLocator(3)
        column[0].set_title(_name_of(block))
    axes[0, 1].set_ylabel(r'input gate $\tilde{i}$')
    axes[1, 1].set_ylabel(r'forget gate $\sigma(\tilde{f})$')
    heads = 'mean over heads' if head is None else f'head {head}'
    figure.suptitle(f'What is written, and what is kept ({heads})')
    return figure


@torch.no_grad()
def draw_decay(backbone, image, blocks, head=None, at=(0.5, 0.5)):
    """Draw the weights of all tokens for one token, and the half-lives of all blocks' memory."""
    _, grid = backbone.embed(image.x)
    gates = inspect_blocks.block_gates(backbone, image.x)
    panel = 2.3 * image.aspect
    figure = plt.figure(figsize=(2.3 * (len(blocks) + 1) + 0.6, panel + 3.4), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=[panel + 0.5, 2.9])

    token = inspect_blocks.token_at(grid, at)
    height, width = image.picture.shape[:2]
    y, x = (token // grid[1] + 0.5) / grid[0] * height, (token % grid[1] + 0.5) / grid[1] * width
    axes = above.subplots(1, len(blocks) + 1, squeeze=False)[0]
    _show(axes[0], image.picture, 'image and token')
    colors = dict(cmap='inferno', vmin=0, vmax=1, extent=(0, width, height, 0))
    for axis, block in zip(axes[1:], blocks):
        igate, fgate = gates[block]
        weights = inspect_blocks.decay_weights(
            igate[0], fgate[0], backbone.layers[block].reverse, token
        )
        drawn = _show(axis, _one_head(weights, head).view(grid).cpu(), _name_of(block), **colors)
    for axis in axes:
        axis.plot(x, y, 's', mfc='none', mec='cyan', ms=6)
    above.colorbar(drawn, ax=axes, label='weight $D_{tj}$', shrink=0.8)
    _draw_half_lives(below.subplots(), [fgate[0] for _, fgate in gates], grid)
    return figure


def _draw_half_lives(axis, fgates, grid):
    """Draw the half-life of each head, in rows of tokens, from forget gates (NH, N) per block."""
    for block, fgate in enumerate(fgates):
        rows = inspect_blocks.half_life(fgate).cpu() / grid[1]
        low, middle, high = np.quantile(rows, [0.1, 0.5, 0.9], axis=1)
        places = block + np.linspace(-0.27, 0.27, len(fgate))
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
        xticks=range(0, len(fgates), max(1, len(fgates) // 12)),
    )
    axis.grid(axis='y', alpha=0.3)
    axis.legend(ncols=4, fontsize='small', loc='best')


def draw_receptive_field(backbone, images, blocks, at=(0.5, 0.5)):
    """Draw receptive fields after some blocks, with trained (above) and random blocks (below),
    averaged over images of one size.
    """
    torch.manual_seed(0)
    untrained = copy.deepcopy(backbone)
    for block in untrained.layers:
        block.reset_parameters()
    figure, axes = _figure(2, len(blocks), images[0].aspect, extra=1)
    for line, model, label in zip(axes, (backbone, untrained), ('trained', 'random blocks')):
        maps = inspect_blocks.receptive_field(model, [image.x for image in images], blocks, at)
        for axis, values in zip(line, maps.clamp_min(1e-8).log10().cpu()):
            drawn = _show(axis, values, cmap='magma', vmin=-4, vmax=0)
        line[0].set_ylabel(label)
    for axis, block in zip(axes[0], blocks):
        axis.set_title(f'after block {block}')
    figure.colorbar(drawn, ax=axes, label='log10 of the relative gradient', shrink=0.8)
    figure.suptitle(f'Effective receptive field of one token, mean of {len(images)} image(s)')
    return figure


@torch.no_grad()
def draw_pca(backbone, images, blocks):
    """Draw features after some blocks as colors, one row per image; image sizes may differ."""
    features = [inspect_blocks.block_features(backbone, image.x) for image in images]
    aspect = max(image.aspect for image in images)
    figure, axes = _figure(len(images), len(blocks) + 1, aspect)
    for axis, image in zip(axes[:, 0], images):
        _show(axis, image.picture)
    axes[0, 0].set_title('image')
    for column, block in zip(axes[:, 1:].T, blocks):
        colors = inspect_blocks.principal_colors([tokens[block][0] for tokens in features])
        for axis, image, color in zip(column, images, colors):
            _, grid = backbone.embed(image.x)
            _show(axis, color.view(*grid, 3).cpu())
        column[0].set_title(f'after block {block}')
    figure.suptitle('Features as colors: three principal components')
    return figure


def _name_of(block):
    return f'block {block}, {DIRECTIONS[block % 2]}'


def _show(axis, picture, title='', **options):
    """Draw a picture or a map without ticks."""
    axis.set(xticks=[], yticks=[], title=title)
    return axis.imshow(picture, **options)


def _one_head(x, head):
    """One head of (NH, N), or the mean over heads."""
    return x.mean(0) if head is None else x[head]


def _figure(rows, columns, aspect, extra=0.6):
    """Create a grid of panels with the aspect ratio of the images."""
    size = (2.3 * columns + extra, rows * (2.3 * aspect + 0.1) + 0.6)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained')
