# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Random images with labels of squares, for trainings of seconds."""

import numpy as np
from PIL import Image


def write_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def labelled_image(rng, lowest=0):
    """Image (48, 64, 3) and labels (48, 64) from ``lowest`` to 11, which its brightness shows."""
    labels = np.kron(rng.integers(lowest, 12, (3, 4)), np.ones((16, 16)))
    return labels[..., None] * 20 + rng.integers(0, 15, (48, 64, 3)), labels


def write_segmentation_data(folder, training, validation):
    """Write so many labelled images in the layout of CamVid."""
    rng = np.random.default_rng(0)
    for split, number in (('training', training), ('validation', validation)):
        for i in range(number):
            image, labels = labelled_image(rng)
            write_image(folder / f'images/{split}/{i}.jpg', image)
            write_image(folder / f'annotations/{split}/{i}.png', labels)
