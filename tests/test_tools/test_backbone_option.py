# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""tools/train.py EXISTING_CONFIG --backbone vil-t, as users call it."""

from pathlib import Path

import pytest
from mmengine.config import Config
from tool_process import call_tool

from tests.street_images import write_segmentation_data

ROOT = Path(__file__).parents[2]
TRAIN, TEST = ROOT / 'tools' / 'train.py', ROOT / 'tools' / 'test.py'
PSPNET = 'pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py'
CONFIG = """
_base_ = '{path}'

model = dict(data_preprocessor=dict(size=(64, 64)), decode_head=dict(channels=16))
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
loader = dict(num_workers=0, dataset=dict(data_root='{data}', pipeline=pipeline))
train_dataloader = dict(batch_size=2, **loader)
val_dataloader = loader
test_dataloader = loader
train_cfg = dict(max_iters=1, val_interval=1)
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    pytest.importorskip('mmseg')
    root = tmp_path_factory.mktemp('ade')
    write_segmentation_data(root, training=2, validation=2)
    return root


def test_train_swaps_the_backbone_and_leaves_a_config_to_test_with(data, tmp_path):
    import mmseg

    path = Path(mmseg.__file__).parent / '.mim' / 'configs' / PSPNET
    config = tmp_path / 'mine.py'
    config.write_text(CONFIG.format(path=path, data=data))
    log = call_tool(
        *(
            TRAIN,
            config,
            '--backbone',
            'vil-t',
            '--backbone-optim',
            '--work-dir',
            tmp_path / 'work',
        ),
        *('--cfg-options', 'model.backbone.drop_path_rate=0.1'),
    )
    assert 'decode_head.in_channels: 2048 -> 192' in log

    left = tmp_path / 'work' / 'mine.py'
    cfg = Config.fromfile(left)
    assert cfg.model.backbone.type == 'mmvil.VisionLSTM' and cfg.model.pretrained is None
    assert cfg.model.backbone.drop_path_rate == 0.1  # options win over the swap
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    said = call_tool(TEST, left, tmp_path / 'work' / 'iter_1.pth', '--work-dir', tmp_path / 'test')
    assert 'mIoU' in said


def test_check_looks_at_the_swapped_config(data, tmp_path):
    swap = (f'mmseg::{PSPNET}', '--backbone', 'vil-s', '--check', '--data-root', data)
    assert 'in place' in call_tool(TRAIN, *swap, '--work-dir', tmp_path)
    said = call_tool(TRAIN, *swap, '--checkpoint', tmp_path / 'none.th', status=2)
    assert 'checkpoint not found' in said


def test_wrong_uses_of_backbone_are_one_line(data, tmp_path):
    said = call_tool(TRAIN, f'mmseg::{PSPNET}', '--backbone', 'vit-s', '--check', status=2)
    assert "Unknown arch 'vit_s'" in said and 'Traceback' not in said
    said = call_tool(TRAIN, f'mmseg::{PSPNET}', '--checkpoint', 'vil.th', status=2)
    assert 'need --backbone' in said
    said = call_tool(TRAIN, f'mmseg::{PSPNET}'[:-6] + '.py', '--backbone', 'vil-s', status=2)
    assert 'config not found' in said and f'Did you mean mmseg::{PSPNET}?' in said
