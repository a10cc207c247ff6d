# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Make a small segmentation dataset from bundled photographs, without any download.

Objects cut out of photographs that ship inside scikit-image and scikit-learn are laid on walls,
skies and ground of photographed texture, at random sizes, angles and places, under random light.
The result has ADE20K's layout, ``images/{training,validation}/*.jpg`` and ``annotations/.../*.png``
of the same names, and ADE20K's labels: 0 is ignored, classes count from 1.

Validation images are new compositions. Their textures come from parts of the photographs, and
their coins are coins, that training never shows; of the other objects there is one photograph each.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_sample_image

# Label i + 1 is CLASSES[i]. configs/_base_/datasets/demo.py repeats them, with colors.
CLASSES = (
    'sky', 'brick', 'grass', 'gravel',
    'astronaut', 'cat', 'coffee', 'flower', 'motorcycle', 'coin',
)  # fmt: skip
OBJECTS = CLASSES[4:]
IGNORED = 0

# Height of an object relative to that of the image, and how far it may tilt, in degrees.
HEIGHTS = dict(
    astronaut=(0.55, 0.95), cat=(0.4, 0.7), coffee=(0.35, 0.65),
    flower=(0.3, 0.6), motorcycle=(0.45, 0.75), coin=(0.2, 0.35),
)  # fmt: skip
TILTS = dict(astronaut=12, cat=25, coffee=20, flower=180, motorcycle=15, coin=180)

# The gray textures are tinted: (darkest, lightest) color.
TINTS = dict(
    brick=((74, 34, 26), (206, 128, 104)),
    grass=((20, 44, 12), (150, 178, 88)),
    gravel=((48, 46, 48), (198, 190, 178)),
)

# What lies right of this share of a texture's width is kept for validation.
TRAINING_SHARE = 0.6


class Photographs:
    """Textures and cut-out objects of one split.

    Attributes:
        textures (dict[str, Image]): RGB pictures to crop backgrounds from, by class.
        objects (dict[str, list[Image]]): RGBA pictures, transparent around the object, by class.
    """

    def __init__(self, split):
        outlines = json.loads(Path(__file__).with_name('demo_outlines.json').read_text())
        self.textures = dict(sky=_part(Image.fromarray(skimage.data.hubble_deep_field()), split))
        for name, tint in TINTS.items():
            gray = Image.fromarray(getattr(skimage.data, name)())
            self.textures[name] = _part(_tinted(gray, *tint), split)

        photos = dict(
            astronaut=skimage.data.astronaut(),
            cat=skimage.data.chelsea(),
            coffee=skimage.data.coffee(),
            flower=load_sample_image('flower.jpg'),
            motorcycle=skimage.data.stereo_motorcycle()[0],
        )
        self.objects = {
            name: [_cut_out(photo, lambda draw, points=outlines[name]: draw.polygon(points, 255))]
            for name, photo in photos.items()
        }
        # The lowest row of coins is kept for validation. A warm tint makes silver of gray.
        coins = _tinted(Image.fromarray(skimage.data.coins()), (24, 16, 8), (255, 244, 214))
        coins = np.asarray(coins)
        self.objects['coin'] = [
            _cut_out(coins, lambda draw, box=(x - r, y - r, x + r, y + r): draw.ellipse(box, 255))
            for x, y, r in outlines['coins']
            if (y > 230) == (split == 'validation')
        ]


def compose(photographs, size, rng):
    """Compose one picture.

    Args:
        photographs (Photographs): What to compose it of.
        size (tuple[int, int]): Width and height in pixels.
        rng (numpy.random.Generator): Decides everything.

    Returns:
        tuple[ndarray, ndarray]: The picture, (H, W, 3) uint8, and its labels, (H, W) uint8.
    """
    image, labels = _background(photographs.textures, size, rng)
    light = rng.choice([-1, 1])  # from the left or from the right
    for name in rng.permutation(OBJECTS)[: rng.integers(2, 5)]:
        count = rng.integers(2, 6) if name == 'coin' else 1
        for _ in range(count):
            variants = photographs.objects[name]
            sprite = _posed(variants[rng.integers(len(variants))], name, size[1], light, rng)
            _paste(image, labels, sprite, CLASSES.index(name) + 1, light, rng)
    return _photographed(image, rng), labels


def _background(textures, size, rng):
    """A wall or sky over ground, with a slanting horizon; or only one of the four."""
    width, height = size
    above, below = rng.choice(['sky', 'brick']), rng.choice(['grass', 'gravel'])
    slant = rng.uniform(-0.15, 0.15) * (np.arange(width) - width / 2)
    horizon = rng.choice([rng.uniform(0.25, 0.75), -1.0, 2.0], p=[0.8, 0.1, 0.1]) * height + slant
    is_above = np.arange(height)[:, None] < horizon
    image = np.where(
        is_above[..., None],
        _crop(textures[above], size, rng),
        _crop(textures[below], size, rng),
    )
    labels = np.where(is_above, CLASSES.index(above) + 1, CLASSES.index(below) + 1)
    return image, labels.astype(np.uint8)


def _crop(texture, size, rng):
    """A random part of a texture, enlarged or reduced to the size, as float32."""
    ratio = size[0] / size[1]
    width = rng.uniform(0.6, 1.0) * min(texture.width, texture.height * ratio)
    height = width / ratio
    left, top = rng.uniform(0, texture.width - width), rng.uniform(0, texture.height - height)
    part = texture.resize(size, Image.BICUBIC, box=(left, top, left + width, top + height))
    if rng.random() < 0.5:
        part = part.transpose(Image.FLIP_LEFT_RIGHT)
    return np.asarray(part, np.float32) * rng.uniform(0.75, 1.25)


def _posed(sprite, name, image_height, light, rng):
    """An object at random size and angle, mirrored or not, lit from one side."""
    height = rng.uniform(*HEIGHTS[name]) * image_height
    size = (max(1, round(height * sprite.width / sprite.height)), max(1, round(height)))
    sprite = sprite.resize(size, Image.BICUBIC, reducing_gap=2)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.FLIP_LEFT_RIGHT)
    tilt = rng.uniform(-TILTS[name], TILTS[name])
    sprite = np.array(sprite.rotate(tilt, Image.BICUBIC, expand=True), np.float32)
    shading = 1 - light * rng.uniform(0, 0.35) * np.linspace(-1, 1, sprite.shape[1])
    sprite[..., :3] *= rng.uniform(0.8, 1.15) * shading[:, None]
    return sprite


def _paste(image, labels, sprite, label, light, rng):
    """Lay an object, and its shadow, where it hides least of the objects before it."""
    height, width = labels.shape
    alpha = sprite[..., 3] / 255
    places = [
        (int(rng.uniform(0.1, 0.9) * width - alpha.shape[1] / 2),
         int(rng.uniform(0.3, 0.85) * height - alpha.shape[0] / 2))
        for _ in range(6)
    ]  # fmt: skip
    taken = labels > len(CLASSES) - len(OBJECTS)
    left, top = min(places, key=lambda p: (taken * _on_canvas(alpha, *p, labels.shape)).sum())

    shift = max(2, round(0.03 * height))
    soft = Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(shift))
    shadow = np.asarray(soft, np.float32) / 255
    shadow = _on_canvas(shadow, left + light * shift, top + shift, labels.shape)
    image *= 1 - rng.uniform(0.3, 0.6) * shadow[..., None]

    color = _on_canvas(sprite[..., :3], left, top, labels.shape)
    alpha = _on_canvas(alpha, left, top, labels.shape)
    image *= 1 - alpha[..., None]
    image += alpha[..., None] * color
    labels[alpha >= 0.5] = label
    labels[(alpha > 0.2) & (alpha < 0.8)] = IGNORED  # the rim is half object, half background


def _on_canvas(picture, left, top, shape):
    """A picture moved to (left, top) on an empty canvas, cut off at its borders."""
    canvas = np.zeros(shape + picture.shape[2:], np.float32)
    height, width = picture.shape[:2]
    y, x = max(top, 0), max(left, 0)
    visible = picture[y - top : shape[0] - top, x - left : shape[1] - left]
    canvas[y : top + height, x : left + width] = visible
    return canvas


def _photographed(image, rng):
    """Add what a camera does: exposure, white balance, a little blur and noise."""
    image = image * rng.uniform(0.85, 1.15) * rng.uniform(0.93, 1.07, 3)
    image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(float(rng.choice([0, 0, 0.6]))))
    noise = rng.normal(0, rng.uniform(0, 5), (image.height, image.width, 1))
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)


def _part(texture, split):
    """The left part of a texture for training, the right part for validation."""
    border = round(TRAINING_SHARE * texture.width)
    left, right = (0, border) if split == 'training' else (border, texture.width)
    return texture.crop((left, 0, right, texture.height))


def _tinted(gray, darkest, lightest):
    """Map gray values between two colors, linearly between the 2nd and the 98th percentile."""
    values = np.asarray(gray, np.float32)
    low, high = np.percentile(values, (2, 98))
    values = ((values - low) / (high - low)).clip(0, 1)[..., None]
    color = values * np.array(lightest) + (1 - values) * np.array(darkest)
    return Image.fromarray(color.astype(np.uint8))


def _cut_out(photo, draw_outline):
    """The object inside an outline, on transparent ground, cropped to its extent."""
    image = Image.fromarray(photo).convert('RGBA')
    mask = Image.new('L', image.size, 0)
    draw_outline(ImageDraw.Draw(mask))
    image.putalpha(mask.filter(ImageFilter.GaussianBlur(1)))
    return image.crop(mask.getbbox())


def make_dataset(out, train, val, size, seed):
    """Write the dataset. Image i of a split depends on the seed and i alone."""
    for split_id, (split, count) in enumerate((('training', train), ('validation', val))):
        image_dir, label_dir = out / 'images' / split, out / 'annotations' / split
        image_dir.mkdir(parents=True, exist_ok=True)
        label_dir.mkdir(parents=True, exist_ok=True)
        photographs = Photographs(split)
        for i in range(count):
            image, labels = compose(photographs, size, np.random.default_rng([seed, split_id, i]))
            Image.fromarray(image).save(image_dir / f'demo_{i:04d}.jpg', quality=92)
            Image.fromarray(labels).save(label_dir / f'demo_{i:04d}.png')
        print(f'{split}: {count} images in {image_dir}')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('out', type=Path, help='folder to write, for example data/demo')
    parser.add_argument('--train', type=int, default=600, help='training images (%(default)s)')
    parser.add_argument('--val', type=int, default=60, help='validation images (%(default)s)')
    parser.add_argument('--size', type=int, nargs=2, default=(256, 192), metavar=('W', 'H'))
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if min(args.size) < 32 or min(args.train, args.val) < 0:
        parser.error('sizes must be at least 32 pixels, and the numbers of images not negative')
    make_dataset(args.out, args.train, args.val, tuple(args.size), args.seed)


if __name__ == '__main__':
    main()
