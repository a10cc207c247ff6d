# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The robustness configs on datasets of one tiny image per class."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from tool_process import call_tool

import mmvil

ROOT = Path(__file__).parents[2]
SMALL = dict(arch=dict(embed_dims=8, depth=2), img_size=16, patch_size=16)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A classifier whose classes differ by their bias only: class 1 first, then 90, then 0."""
    backbone = mmvil.VisionLSTM(out_type='bilateral_concat', **SMALL)
    state = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    state['head.fc.weight'] = torch.zeros(1000, 16)
    state['head.fc.bias'] = torch.zeros(1000).index_put(
        (torch.tensor([1, 90, 0]),), torch.tensor([3.0, 2.0, 1.0])
    )
    path = tmp_path_factory.mktemp('robustness') / 'weights.pth'
    torch.save(dict(state_dict=state), path)
    return path


def write_classes(folder, number):
    image = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    for i in range(number):
        path = folder / f'n{i:08}' / 'image.png'
        path.parent.mkdir(parents=True)
        image.save(path)


def evaluate(name, data_root, checkpoint, tmp_path):
    """Run tools/test.py on the config `name`, made small."""
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(ROOT / f'configs/robustness/vil_t_imagenet_{name}.py')
    cfg.model.backbone.update(SMALL)
    cfg.model.head.in_channels = 16
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    dataset = cfg.test_dataloader.dataset
    cfg.test_dataloader.num_workers = 0
    if 'datasets' in dataset:  # 2 of 75
        dataset.datasets = [
            part for part in dataset.datasets if part.data_prefix in ('fog/1', 'snow/5')
        ]
    for part in dataset.get('datasets', [dataset]):
        part.pipeline = pipeline
    cfg.dump(tmp_path / 'config.py')
    call_tool(
        *(ROOT / 'tools/test.py', tmp_path / 'config.py', checkpoint, '--data-root', data_root),
        *('--work-dir', tmp_path / 'work', '--out', tmp_path / 'out.json'),
        *('--out-item', 'metrics'),
    )
    return json.loads((tmp_path / 'out.json').read_text())


def test_imagenet_a_is_tested_among_its_200_classes(checkpoint, tmp_path):
    write_classes(tmp_path / 'data', 200)
    metrics = evaluate('a', tmp_path / 'data', checkpoint, tmp_path)
    # Classes 1 and 0 of the model are not in ImageNet-A; 90 is, and is right for one image of 200.
    assert metrics['accuracy/top1'] == pytest.approx(0.5)


def test_imagenet_c_is_read_as_it_is_published(checkpoint, tmp_path):
    for part in ('fog/1', 'snow/5'):
        write_classes(tmp_path / 'c' / part, 1000)
    metrics = evaluate('c', tmp_path / 'c', checkpoint, tmp_path)
    assert (
        metrics['corruption/error/fog'] == metrics['corruption/error/snow'] == pytest.approx(99.9)
    )
    assert metrics['corruption/top1'] == pytest.approx(0.1)
    assert 'corruption/mCE' not in metrics
