# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Random images with labels of squares, and a small segmentor, for trainings of seconds."""

import numpy as np
from PIL import Image

from tests.conftest import ROOT


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


SEGMENTOR = """
_base_ = '{root}/configs/upernet_vil_t_camvid.py'

# A small network, and nothing random in the data.
model = dict(
    data_preprocessor=dict(size=(48, 64)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=16, depth=4),
        img_size=(48, 64),
        out_indices=(0, 1, 2, 3),
    ),
    decode_head=dict(in_channels=[16] * 4, channels=16),
    auxiliary_head=dict(in_channels=16, channels=16),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
workers = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    batch_size=2, dataset=dict(data_root='{data}', pipeline=train_pipeline), **workers
)
val_dataloader = dict(dataset=dict(data_root='{data}'), **workers)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=2)
param_scheduler = []
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


def write_segmentor(config, data, changes=''):
    """Write the config of a small segmentor that trains 4 iterations; ``changes`` follow its
    settings, which they may replace or update.
    """
    config.write_text(SEGMENTOR.format(root=ROOT, data=data) + changes)
