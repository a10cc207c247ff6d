# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Sixty iterations with a fixed seed give the losses that they gave before.

In float64, because rounding differs between processors: sixty iterations amplify its errors to 0.03
in float32, and to 1e-11 in float64. Random numbers differ between releases of PyTorch, so each has
a curve of its own in tests/data/loss_curves.json. This adds or replaces the one of the environment
it runs in:

    MMVIL_RECORD=1 python -m pytest tests/test_regression.py
"""

import json
import os
import platform
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / 'tests/test_tools'))
from tool_process import call_tool  # noqa: E402

CURVES = ROOT / 'tests/data/loss_curves.json'
CONFIG = """
_base_ = '{configs}/upernet_vil_t_camvid.py'
custom_imports = dict(imports=['tests.float64'])

model = dict(
    data_preprocessor=dict(size=(32, 48)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=32, depth=4), img_size=(32, 48),
        out_indices=(0, 1, 2, 3), drop_path_rate=0.1,
    ),
    decode_head=dict(in_channels=[32] * 4, channels=16, dropout_ratio=0.1),
    auxiliary_head=dict(in_channels=32, channels=16),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomCrop', crop_size=(32, 48), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=2, dataset=dict(data_root='{data}', pipeline=train_pipeline))
val_dataloader = val_cfg = val_evaluator = test_dataloader = test_cfg = test_evaluator = None
train_cfg = dict(max_iters=60, val_interval=1000)
param_scheduler = []
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=1000, save_last=False, save_best=None)
)
log_processor = dict(window_size=1)
randomness = dict(seed=0)
"""


def environment():
    """What random numbers depend on: the release of PyTorch and the architecture."""
    release = '.'.join(torch.__version__.split('.')[:2])
    return f'torch {release}, {platform.machine()}'


def make_data(folder):
    """Eight pictures of colored rectangles on noise, with their labels."""
    rng = np.random.default_rng(0)
    for i in range(8):
        labels = np.full((48, 64), 1)
        for _ in range(6):
            top, left = rng.integers(0, 40), rng.integers(0, 56)
            labels[top : top + 20, left : left + 24] = rng.integers(0, 12)
        image = labels[..., None] * np.array([20, 8, 15]) + rng.integers(0, 40, (48, 64, 3))
        for kind, array in (('images', image), ('annotations', labels)):
            path = folder / kind / f'training/{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(path)


def train(folder):
    """Losses of the 60 iterations."""
    make_data(folder / 'data')
    config = folder / 'regression.py'
    config.write_text(CONFIG.format(configs=ROOT / 'configs', data=folder / 'data'))
    options = ('--cfg-options', 'train_dataloader.dataset.img_suffix=.png')
    call_tool(ROOT / 'tools/train.py', config, '--work-dir', folder / 'work', *options)
    (log,) = (folder / 'work').glob('*/vis_data/scalars.json')
    lines = map(json.loads, log.read_text().splitlines())
    return [line['loss'] for line in lines if 'loss' in line]


def test_sixty_iterations_give_the_recorded_losses(tmp_path):
    pytest.importorskip('mmseg')
    curves = json.loads(CURVES.read_text()) if CURVES.exists() else {}
    record = os.environ.get('MMVIL_RECORD', '0') != '0'
    if environment() not in curves and not record:
        pytest.skip(f'no losses are recorded for {environment()}; MMVIL_RECORD=1 records them')

    losses = train(tmp_path)
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])  # it learns
    if record:
        curves[environment()] = losses
        CURVES.write_text(json.dumps(curves, indent=1, sort_keys=True) + '\n')
    assert losses == pytest.approx(curves[environment()], abs=1e-8)
