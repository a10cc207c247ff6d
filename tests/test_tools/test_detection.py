# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The tools with a detector: check, train, test, draw."""

from pathlib import Path

import pytest
from test_demo_dataset import load_script
from tool_process import call_tool

pytest.importorskip('mmdet')

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')
    load_script().make_dataset(out, train=4, val=2, size=(64, 48), seed=0)
    return out


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'detector.py'
    path.write_text(
        f"_base_ = '{ROOT}/configs/mask_rcnn_vil_t_demo.py'\n"
        'model = dict(backbone=dict(arch=dict(_delete_=True, embed_dims=16, depth=2)))\n'
        'train_cfg = dict(max_iters=2, val_interval=2)\n'
        'default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))\n'
    )
    return path


@pytest.fixture(scope='module')
def checkpoint(config, data, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('work_dir')
    said = call_tool(TOOLS / 'train.py', config, '--data-root', data, '--work-dir', work_dir)
    assert 'loss_mask' in said and 'coco/bbox_mAP' in said and 'coco/segm_mAP' in said
    return work_dir / 'iter_2.pth'


def test_detector_is_trained_and_tested(config, data, checkpoint, tmp_path):
    out, pictures = tmp_path / 'results', tmp_path / 'pictures'
    options = ('--data-root', data, '--work-dir', tmp_path, '--out', out, '--show-dir', pictures)
    said = call_tool(TOOLS / 'test.py', config, checkpoint, *options)
    assert 'coco/bbox_mAP' in said and 'coco/segm_mAP' in said
    for kind in ('bbox', 'segm'):
        assert out.with_name(f'results.{kind}.json').exists()
    assert len(list(pictures.rglob('vis_image/*.png'))) == 2


def test_tools_say_in_one_line_what_they_cannot_do_with_detectors(config, tmp_path):
    checkpoint = tmp_path / 'unread.pth'
    for tool, arguments, problem in (
        ('test.py', (checkpoint, '--precision', 'bfloat16'), 'mmdet cannot evaluate detections in'),
        ('analysis_tools/get_flops.py', (), 'cannot run the model on the shapes of images alone'),
        ('deployment/export.py', (checkpoint, '--out', tmp_path / 'x.pt2'), 'not detectors'),
    ):
        assert problem in call_tool(TOOLS / tool, config, *arguments, status=2).splitlines()[-1]


def test_demo_draws_detections(config, data, checkpoint, tmp_path):
    images = data / 'images/validation'
    said = call_tool(TOOLS / 'demo.py', images, config, checkpoint, '--out-dir', tmp_path)
    assert 'demo_0000.jpg' in said and len(list(tmp_path.glob('*.png'))) == 2


def test_check_dataset_counts_objects_and_compares_classes(config, data):
    check = (TOOLS / 'check_dataset.py', config, '--data-root', data, '-j', 1)
    said = call_tool(*check)
    assert 'train: 4 images, 6 classes' in said and 'No problems found' in said
    wrong = ('--cfg-options', 'model.roi_head.mask_head.num_classes=7')
    said = call_tool(*check, *wrong, status=1)
    assert 'num_classes=7 in FCNMaskHead, but the dataset has 6' in said


def test_train_names_missing_annotations(config, data, tmp_path):
    for folder in ('training', 'validation'):
        (tmp_path / 'images' / folder).mkdir(parents=True)
    said = call_tool(TOOLS / 'train.py', config, '--data-root', tmp_path, '--check', status=2)
    assert 'error: annotations not found' in said and 'instances_training.json' in said
