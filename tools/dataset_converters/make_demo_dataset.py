# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Generate a small segmentation and detection dataset from bundled photographs, without downloads.

Objects cut out of photographs in scikit-image and scikit-learn are pasted at random onto
photographed textures. The validation images use texture regions and coins that never occur in
training. The result has ADE20K's layout, ``images/{training,validation}/*.jpg`` and
``annotations/.../*.png`` with the same names, and its labels: 0 is ignored, classes start at 1.
``annotations/instances_{training,validation}.json`` contains the objects in COCO format.
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

# Minimum and maximum height of an object relative to the image, and maximum tilt in degrees.
POSES = dict(
    astronaut=(0.55, 0.95, 12), cat=(0.4, 0.7, 25), coffee=(0.35, 0.65, 20),
    flower=(0.3, 0.6, 180), motorcycle=(0.45, 0.75, 15), coin=(0.2, 0.35, 180),
)  # fmt: skip

# The gray textures are tinted: (darkest, lightest) color.
TINTS = dict(
    brick=((74, 34, 26), (206, 128, 104)),
    grass=((20, 44, 12), (150, 178, 88)),
    gravel=((48, 46, 48), (198, 190, 178)),
)

# The part of a texture to the right of this fraction of its width is reserved for validation.
TRAINING_SHARE = 0.6


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('out', type=Path, help='folder to write, for example data/demo')
    add('--train', type=int, default=600, help='training images (%(default)s)')
    add('--val', type=int, default=60, help='validation images (%(default)s)')
    add('--size', type=int, nargs=2, default=(256, 192), metavar=('W', 'H'))
    add('--seed', type=int, default=0)
    args = parser.parse_args()
    # Without at_least of mmvil.cli.main, whose import would take most of the time.
    if min(args.size) < 32 or min(args.train, args.val, args.seed) < 0:
        parser.error('sizes must be at least 32 pixels, and numbers must not be negative')
    make_dataset(args.out, args.train, args.val, tuple(args.size), args.seed)


def make_dataset(out, train, val, size, seed):
    """Write the dataset. Image i of a split depends only on the seed and i."""
    for split_id, (split, count) in enumerate((('training', train), ('validation', val))):
        image_dir, label_dir = out / 'images' / split, out / 'annotations' / split
        image_dir.mkdir(parents=True, exist_ok=True)
        label_dir.mkdir(parents=True, exist_ok=True)
        textures, objects = load_photographs(split)
        images, instances = [], []
        for i in range(count):
            rng = np.random.default_rng([seed, split_id, i])
            image, labels, visible = compose(textures, objects, size, rng)
            Image.fromarray(image).save(image_dir / f'demo_{i:04d}.jpg', quality=92)
            Image.fromarray(labels).save(label_dir / f'demo_{i:04d}.png')
            images.append(dict(id=i, file_name=f'demo_{i:04d}.jpg', width=size[0], height=size[1]))
            for label, mask in visible:
                instance = dict(id=len(instances) + 1, image_id=i)
                instances.append(instance | coco_instance(label, mask))
        categories = [dict(id=CLASSES.index(name) + 1, name=name) for name in OBJECTS]
        coco = dict(images=images, annotations=instances, categories=categories)
        (label_dir.parent / f'instances_{split}.json').write_text(json.dumps(coco))
        print(f'{split}: {count} images in {image_dir}')


def coco_instance(label, mask):
    """Create the COCO annotation of an object, with its mask as run lengths of 0, 1, 0, ... in
    column-major order.
    """
    ys, xs = mask.nonzero()
    pixels = mask.ravel(order='F')
    changes = np.flatnonzero(np.diff(pixels, prepend=False))
    runs = np.diff(changes, prepend=0, append=pixels.size)
    return dict(
        category_id=label,
        bbox=[int(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)],
        area=len(xs),
        iscrowd=0,
        segmentation=dict(size=mask.shape, counts=runs.tolist()),
    )


# -- Photographs -----------------------------------------------------------------------------------


def load_photographs(split):
    """Load the textures of a split, RGB pictures by class to crop backgrounds from; and lists of
    objects by class, RGBA pictures that are transparent around the object.
    """
    outlines = json.loads(Path(__file__).with_name('demo_outlines.json').read_text())
    textures = dict(sky=Image.fromarray(skimage.data.hubble_deep_field()))
    for name, tint in TINTS.items():
        textures[name] = _tinted(getattr(skimage.data, name)(), *tint)
    for name, texture in textures.items():
        border = round(TRAINING_SHARE * texture.width)
        left, right = (0, border) if split == 'training' else (border, texture.width)
        textures[name] = texture.crop((left, 0, right, texture.height))

    photos = dict(
        astronaut=skimage.data.astronaut(),
        cat=skimage.data.chelsea(),
        coffee=skimage.data.coffee(),
        flower=load_sample_image('flower.jpg'),
        motorcycle=skimage.data.stereo_motorcycle()[0],
    )
    objects = {
        name: [_cut_out(Image.fromarray(photo), 'polygon', outlines[name])]
        for name, photo in photos.items()
    }
    # The lowest row of coins is reserved for validation. A warm tint turns gray into silver.
    coins = _tinted(skimage.data.coins(), (24, 16, 8), (255, 244, 214))
    objects['coin'] = [
        _cut_out(coins, 'ellipse', (x - r, y - r, x + r, y + r))
        for x, y, r in outlines['coins']
        if (y > 230) == (split == 'validation')
    ]
    return textures, objects


def _tinted(gray, darkest, lightest):
    """Map gray values between two colors, linearly between the 2nd and the 98th percentile."""
    low, high = np.percentile(gray.astype(np.float32), (2, 98))
    values = ((gray.astype(np.float32) - low) / (high - low)).clip(0, 1)[..., None]
    color = values * np.array(lightest) + (1 - values) * np.array(darkest)
    return Image.fromarray(color.astype(np.uint8))


def _cut_out(photo, shape, outline):
    """Cut out the object inside an outline, on a transparent background, cropped to its extent."""
    mask = Image.new('L', photo.size, 0)
    getattr(ImageDraw.Draw(mask), shape)(outline, 255)
    image = photo.convert('RGBA')
    image.putalpha(mask.filter(ImageFilter.GaussianBlur(1)))
    return image.crop(mask.getbbox())


# -- Pictures; the generator ``rng`` decides everything --------------------------------------------


def compose(textures, objects, size, rng):
    """Compose a picture (H, W, 3) and its labels (H, W), uint8, of a size (width, height), and the
    label and mask (H, W) of each visible object.
    """
    image, labels = _background(textures, size, rng)
    owners, owned = np.zeros_like(labels), []
    light = rng.choice([-1, 1])  # from the left or from the right
    for name in rng.permutation(OBJECTS)[: rng.integers(2, 5)]:
        for _ in range(rng.integers(2, 6) if name == 'coin' else 1):
            variants = objects[name]
            sprite = _posed(variants[rng.integers(len(variants))], name, size[1], light, rng)
            owned.append(CLASSES.index(name) + 1)
            alpha = _paste(image, labels, sprite, owned[-1], light, rng)
            owners[alpha >= 0.5] = len(owned)
    masks = [(label, owners == i) for i, label in enumerate(owned, 1)]
    visible = [(label, mask) for label, mask in masks if mask.any()]
    return _photographed(image, rng), labels, visible


def _background(textures, size, rng):
    """Create a wall or sky over ground, with a slanted horizon, or only one of the textures."""
    width, height = size
    above, below = rng.choice(['sky', 'brick']), rng.choice(['grass', 'gravel'])
    slant = rng.uniform(-0.15, 0.15) * (np.arange(width) - width / 2)
    horizon = rng.choice([rng.uniform(0.25, 0.75), -1.0, 2.0], p=[0.8, 0.1, 0.1]) * height + slant
    is_above = np.arange(height)[:, None] < horizon
    upper, lower = (_crop(textures[name], size, rng) for name in (above, below))
    labels = np.where(is_above, CLASSES.index(above) + 1, CLASSES.index(below) + 1)
    return np.where(is_above[..., None], upper, lower), labels.astype(np.uint8)


def _crop(texture, size, rng):
    """Crop a random part of a texture and resize it, as float32."""
    ratio = size[0] / size[1]
    width = rng.uniform(0.6, 1.0) * min(texture.width, texture.height * ratio)
    height = width / ratio
    left, top = rng.uniform(0, texture.width - width), rng.uniform(0, texture.height - height)
    part = texture.resize(size, Image.BICUBIC, box=(left, top, left + width, top + height))
    if rng.random() < 0.5:
        part = part.transpose(Image.FLIP_LEFT_RIGHT)
    return np.asarray(part, np.float32) * rng.uniform(0.75, 1.25)


def _posed(sprite, name, image_height, light, rng):
    """Transform an object to a random size and angle, mirrored or not, lit from one side."""
    low, high, tilt = POSES[name]
    height = rng.uniform(low, high) * image_height
    size = (max(1, round(height * sprite.width / sprite.height)), max(1, round(height)))
    sprite = sprite.resize(size, Image.BICUBIC, reducing_gap=2)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.FLIP_LEFT_RIGHT)
    tilted = sprite.rotate(rng.uniform(-tilt, tilt), Image.BICUBIC, expand=True)
    sprite = np.array(tilted, np.float32)
    shading = 1 - light * rng.uniform(0, 0.35) * np.linspace(-1, 1, sprite.shape[1])
    sprite[..., :3] *= rng.uniform(0.8, 1.15) * shading[:, None]
    return sprite


def _paste(image, labels, sprite, label, light, rng):
    """Paste an object and its shadow where it hides least of the previous objects, and return its
    opacity (H, W).
    """
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
    labels[(alpha > 0.2) & (alpha < 0.8)] = IGNORED  # edges are half object, half background
    return alpha


def _on_canvas(picture, left, top, shape):
    """Place a picture at (left, top) on an empty canvas, cropped at its borders."""
    canvas = np.zeros(shape + picture.shape[2:], np.float32)
    height, width = picture.shape[:2]
    y, x = max(top, 0), max(left, 0)
    visible = picture[y - top : shape[0] - top, x - left : shape[1] - left]
    canvas[y : top + height, x : left + width] = visible
    return canvas


def _photographed(image, rng):
    """Simulate a camera: exposure, white balance, slight blur and noise."""
    image = image * rng.uniform(0.85, 1.15) * rng.uniform(0.93, 1.07, 3)
    image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(float(rng.choice([0, 0, 0.6]))))
    noise = rng.normal(0, rng.uniform(0, 5), (image.height, image.width, 1))
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)


if __name__ == '__main__':
    main()
