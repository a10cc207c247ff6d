# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Pictures of what the blocks of a ViL do with images."""

import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from .inspect_blocks import (
    decay_weights,
    gates_of,
    half_life,
    principal_colors,
    receptive_field,
    recorded,
    token_at,
)

DIRECTIONS = ('forward', 'backward')
COLORS = ('tab:blue', 'tab:orange')

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


def draw_gates(backbone, image, blocks, head):
    """Both gates of some blocks over the image."""
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


def draw_decay(backbone, image, blocks, head, at):
    """What one token sees in some blocks, and the half-life of the memory in all blocks."""
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


def draw_receptive_field(backbone, images, blocks, at):
    """Receptive fields after some blocks, trained (above) and with random weights (below)."""
    trained = backbone
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


def draw_pca(backbone, images, blocks):
    """Features after some blocks, one row per image."""
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
