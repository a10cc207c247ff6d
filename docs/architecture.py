# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Draw the architecture figure of README.md.

python docs/architecture.py --out docs/architecture.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import skimage.data  # noqa: E402
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon  # noqa: E402
from PIL import Image  # noqa: E402

OUTLINES = Path(__file__).parents[1] / 'tools' / 'dataset_converters' / 'demo_outlines.json'

WIDTH, HEIGHT = 1200, 672  # of the canvas; y points up
INK, MUTED, EDGE = '#24292f', '#5b6470', '#8a94a0'
FORWARD, BACKWARD = '#2f6fb3', '#e07b1f'  # reading directions
NEUTRAL, CELL, HEAD = '#eef1f4', '#dcebdc', '#ece4f5'

STAGES = (8, 4, 4, 8)  # blocks up to each tap: out_indices=(7, 11, 15, 23)
STRIDES = (4, 8, 16, 32)
SLICE, GAP, STAGE_GAP = 12, 4, 22


class Canvas:
    """Boxes, arrows and text in canvas units."""

    def __init__(self):
        self.figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor='white')
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect='equal')
        self.axes.axis('off')

    def box(self, x, y, width, height, text='', color=NEUTRAL, edge=EDGE, rotation=0, size=11):
        style = 'round,pad=0,rounding_size=6'
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, style, facecolor=color, edgecolor=edge, lw=1.1)
        )
        self.text(x + width / 2, y + height / 2, text, rotation=rotation, size=size)

    def text(self, x, y, text, size=11, color=INK, ha='center', va='center', **options):
        self.axes.text(
            x, y, text, fontsize=size, color=color, ha=ha, va=va, linespacing=1.3, **options
        )

    def arrow(self, start, *points, color=MUTED, head=True, width=1.4):
        """A polyline with an arrow head at its end."""
        path = [start, *points]
        for a, b in zip(path[:-2], path[1:-1]):
            self.axes.plot(*zip(a, b), color=color, lw=width, solid_capstyle='round')
        style = '-|>,head_length=5,head_width=2.6' if head else '-'
        self.axes.add_patch(
            FancyArrowPatch(
                path[-2], path[-1], arrowstyle=style, color=color, lw=width, shrinkA=0, shrinkB=0
            )
        )

    def image(self, picture, x, y, size):
        self.axes.imshow(picture, extent=(x, x + size, y, y + size), interpolation='antialiased')
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect='equal')

    def operator(self, x, y, sign):
        self.axes.add_patch(Circle((x, y), 10, facecolor='white', edgecolor=EDGE, lw=1.1))
        self.text(x, y, sign, size=11)


def photograph_and_labels():
    """A square photograph, and the outline of its object in units of its side."""
    image = Image.fromarray(skimage.data.astronaut())
    outline = np.array(json.loads(OUTLINES.read_text())['astronaut'], float)
    return image.resize((256, 256)), outline / image.height


def draw_image(canvas, image, x, y, size, patches=8):
    canvas.image(image, x, y, size)
    for line in np.linspace(0, size, patches + 1):
        canvas.axes.plot([x + line] * 2, [y, y + size], color='white', lw=1)
        canvas.axes.plot([x, x + size], [y + line] * 2, color='white', lw=1)


def draw_reading_order(canvas, x, y, size, color, reverse, cells=4):
    """A grid of tokens with the order in which a block reads them."""
    side = size / cells
    for row in range(cells):
        for column in range(cells):
            canvas.box(x + column * side + 1, y + row * side + 1, side - 2, side - 2, color='white')
    left, right = x + side * 0.3, x + size - side * 0.3
    rows = [y + size - (row + 0.5) * side for row in range(cells)]
    points = [point for height in rows for point in ((left, height), (right, height))]
    if reverse:
        points = points[::-1]
    for step, (a, b) in enumerate(zip(points[:-1], points[1:])):
        if step % 2:  # back to the start of the next row
            canvas.axes.plot(*zip(a, b), color=color, lw=0.8, ls=(0, (2, 2)))
        else:
            canvas.arrow(a, b, color=color, width=1.7)


def draw_blocks(canvas, x, y, height):
    """The stack of blocks in alternating colors.

    Returns:
        list[float]: x after each of the stages.
    """
    taps, index = [], 0
    for stage in STAGES:
        for _ in range(stage):
            color = BACKWARD if index % 2 else FORWARD
            canvas.box(x, y, SLICE, height, color=color, edge='none')
            x, index = x + SLICE + GAP, index + 1
        taps.append(x - GAP + STAGE_GAP / 2)
        x += STAGE_GAP
    return taps


def draw_pyramid(canvas, taps, y_blocks, floor, bus):
    """A map under each tap, all of them joined by a line below."""
    how = ('4× up', '2× up', 'identity', '2× down')
    names = ('7', '11', '15', '23')
    for tap, stride, change, block, size in zip(taps, STRIDES, how, names, (84, 58, 40, 26)):
        canvas.arrow((tap, y_blocks), (tap, floor + size + 3), color=INK)
        canvas.box(tap - size / 2, floor, size, size, color='#f6e7c8', edge='#b99a55')
        for line in np.arange(1, 4) * size / 4:
            canvas.axes.plot(
                [tap - size / 2 + line] * 2, [floor + 1, floor + size - 1], color='#d9c28c', lw=0.7
            )
            canvas.axes.plot(
                [tap - size / 2 + 1, tap + size / 2 - 1],
                [floor + line] * 2,
                color='#d9c28c',
                lw=0.7,
            )
        canvas.text(tap, floor - 13, f'stride {stride}', size=10.5)
        canvas.text(tap, floor - 29, change, size=9.5, color=MUTED)
        canvas.text(tap + 5, y_blocks - 20, f'block {block}', size=9.5, color=MUTED, ha='left')
        canvas.arrow((tap, floor - 38), (tap, bus), color=INK, head=False)
    canvas.arrow((taps[0], bus), (taps[-1], bus), color=INK, head=False)


def draw_block(canvas, x, y):
    """The layers inside one block; y is the height of the main path."""
    top, bottom = y + 44, y - 44
    canvas.text(x + 4, y, '$x$', size=13)
    canvas.arrow((x + 14, y), (x + 40, y))
    canvas.box(x + 40, y - 42, 30, 84, 'LayerNorm', rotation=90, size=10)
    canvas.arrow((x + 70, y), (x + 88, y))
    canvas.box(x + 88, y - 62, 30, 124, 'Linear $D$ → 2$E$', rotation=90, size=10)

    canvas.arrow((x + 118, top), (x + 207, top))
    canvas.text(x + 140, top + 10, '$x_m$', size=11)
    canvas.box(x + 207, top - 20, 122, 40, 'Conv 3×3, SiLU', size=10)
    canvas.arrow((x + 329, top), (x + 372, top))
    canvas.box(x + 372, top - 20, 92, 40, 'headwise\nlinear', size=10)
    canvas.text(x + 359, top + 9, '$c$', size=11)
    canvas.arrow((x + 464, top + 9), (x + 520, top + 9))
    canvas.text(x + 492, top + 19, '$q, k$', size=11)
    # v comes from before the convolution
    canvas.arrow((x + 172, top), (x + 172, top - 36), (x + 418, top - 36), (x + 418, top - 20))
    canvas.arrow((x + 464, top - 9), (x + 520, top - 9))
    canvas.text(x + 492, top + 1, '$v$', size=11)

    canvas.box(x + 520, top - 36, 172, 72, color=CELL, edge='#6f9b6f')
    canvas.text(x + 606, top + 13, 'mLSTM', size=12.5, weight='bold')
    canvas.text(x + 606, top - 11, r'$C_t = f_t\,C_{t-1} + i_t\,v_t k_t^\top$', size=10.5)
    canvas.arrow((x + 692, top), (x + 714, top))
    canvas.box(x + 714, top - 20, 94, 40, 'GroupNorm', size=10)
    canvas.arrow((x + 808, top), (x + 832, top))
    canvas.operator(x + 842, top, '+')
    # learnable skip from c
    canvas.arrow((x + 346, top), (x + 346, top + 50), (x + 842, top + 50), (x + 842, top + 10))
    canvas.text(x + 432, top + 40, 'learnable skip', size=10, color=MUTED)

    canvas.arrow((x + 118, bottom), (x + 207, bottom))
    canvas.text(x + 140, bottom + 10, '$z$', size=11)
    canvas.box(x + 207, bottom - 18, 122, 36, 'SiLU', size=10)
    canvas.arrow((x + 329, bottom), (x + 892, bottom), (x + 892, top - 10))
    canvas.arrow((x + 852, top), (x + 882, top))
    canvas.operator(x + 892, top, r'$\times$')
    canvas.arrow((x + 902, top), (x + 926, top))
    canvas.box(x + 926, y - 62, 30, 124, 'Linear $E$ → $D$', rotation=90, size=10)
    canvas.arrow((x + 956, y), (x + 982, y))
    canvas.operator(x + 992, y, '+')
    canvas.arrow((x + 22, y), (x + 22, y - 82), (x + 992, y - 82), (x + 992, y - 10))
    canvas.arrow((x + 1002, y), (x + 1032, y))


def draw(canvas):
    image, outline = photograph_and_labels()

    # Row 1: image, embedding, blocks, classifier
    base, height = 456, 144
    middle = base + height / 2
    draw_image(canvas, image, 28, base, height)
    canvas.text(100, base - 16, 'image in 16×16 patches', size=10.5)
    canvas.arrow((174, middle), (196, middle))
    canvas.box(196, base, 46, height, 'patch + position\nembedding', rotation=90, size=10.5)
    canvas.arrow((242, middle), (268, middle))
    taps = draw_blocks(canvas, 272, base, height)
    end = taps[-1] - STAGE_GAP / 2
    canvas.text((272 + end) / 2, base + height + 42, '24 mLSTM blocks', size=13, weight='bold')
    for left, color, text in (
        (294, FORWARD, 'even: first to last token'),
        (506, BACKWARD, 'odd: last to first token'),
    ):
        canvas.box(left, base + height + 12, 12, 12, color=color, edge='none')
        canvas.text(left + 19, base + height + 18, text, size=10.5, ha='left')

    canvas.arrow((end + 2, middle), (812, middle))
    canvas.box(812, middle - 27, 128, 54, 'first and last\ntoken, norm', color=HEAD, edge='#a58fc4')
    canvas.arrow((940, middle), (968, middle))
    canvas.box(968, middle - 27, 82, 54, 'linear', color=HEAD, edge='#a58fc4')
    canvas.arrow((1050, middle), (1078, middle))
    canvas.text(1084, middle, '“astronaut”', size=12, ha='left')
    canvas.text(931, middle + 44, 'classification', size=12, weight='bold')

    # Row 2: reading orders, pyramid, segmentation head
    floor = 296
    for left, color, reverse, text in (
        (30, FORWARD, False, 'even blocks'),
        (148, BACKWARD, True, 'odd blocks'),
    ):
        draw_reading_order(canvas, left, floor, 92, color, reverse)
        canvas.text(left + 46, floor - 16, text, size=10.5, color=color, weight='bold')
    bus = floor - 48
    draw_pyramid(canvas, taps, base - 6, floor, bus)
    canvas.text(taps[0] - 52, floor + 105, 'pyramid', size=12, weight='bold')
    center = floor + 20
    canvas.arrow((taps[-1], bus), (776, bus), (776, center), (812, center), color=INK)
    canvas.box(
        812, center - 33, 128, 66, 'UperNet head\n(or any other)', color=HEAD, edge='#a58fc4'
    )
    canvas.arrow((940, center), (968, center))
    size = 116
    canvas.box(968, center - size / 2, size, size, color='#2f4858', edge='none')
    canvas.axes.add_patch(
        Polygon(
            np.c_[968 + size * outline[:, 0], center + size / 2 - size * outline[:, 1]].clip(
                (968, center - size / 2), (968 + size, center + size / 2)
            ),
            color='#e8c878',
        )
    )
    canvas.text(1026, center + size / 2 + 16, 'segmentation', size=12, weight='bold')

    # Row 3: inside a block
    canvas.box(16, 14, WIDTH - 32, 204, color='#fafbfc', edge='#c8ced6')
    canvas.text(32, 199, 'inside a block', size=12, weight='bold', ha='left')
    draw_block(canvas, 76, 112)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).with_suffix('.svg')
    parser.add_argument('--out', type=Path, default=default, help='(%(default)s)')
    args = parser.parse_args()
    plt.rcParams.update({'svg.hashsalt': 'mmvil', 'mathtext.fontset': 'dejavusans'})
    canvas = Canvas()
    draw(canvas)
    metadata = {'Date': None} if args.out.suffix == '.svg' else None
    canvas.figure.savefig(args.out, dpi=200, metadata=metadata)


if __name__ == '__main__':
    main()
