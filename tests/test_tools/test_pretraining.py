# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Pre-training on unlabelled images by the command line, and what starts from its checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
from tool_process import call_tool, call_tool_in_processes, losses

from tests.street_images import write_image, write_segmentation_data

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / 'tools/train.py'
ANALYSIS = ROOT / 'tools/analysis_tools'
SIMMIM = ROOT / 'configs/simmim_vil_t_pretrain192.py'

ARCH = [f'model.backbone.arch.{each}' for each in ('_delete_=True', 'embed_dims=16', 'depth=4')]
SMALL = ['--cfg-options', *ARCH, 'model.neck.in_channels=16']
SHORT = [
    *('train_dataloader.batch_size=2', 'train_dataloader.num_workers=0', 'randomness.seed=0'),
    *('train_cfg.max_epochs=2', 'default_hooks.checkpoint.interval=1'),
    *('default_hooks.logger.interval=1', 'log_processor.window_size=1'),
]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A folder with unlabelled images, some of them in subfolders."""
    pytest.importorskip('mmpretrain')
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for name in ('a.png', 'b.jpg', 'deep/down/c.png', 'deep/d.jpeg'):
        write_image(folder / name, rng.integers(0, 255, (80, 100, 3)))
    return folder


@pytest.fixture(scope='module')
def pretrained(images, tmp_path_factory):
    """Work dir of a pre-training of two epochs."""
    work_dir = tmp_path_factory.mktemp('pretrained')
    arguments = ('--data-root', images, '--work-dir', work_dir)
    call_tool(TRAIN, SIMMIM, *arguments, *SMALL, *SHORT)
    return work_dir


def test_pretraining_resumes_to_the_same_losses(images, pretrained, tmp_path):
    resume = ('--resume', pretrained / 'epoch_1.pth', '--work-dir', tmp_path)
    call_tool(TRAIN, SIMMIM, '--data-root', images, *resume, *SMALL, *SHORT)
    straight, resumed = losses(pretrained), losses(tmp_path)
    assert list(straight) == [1, 2, 3, 4]
    assert resumed == {step: straight[step] for step in (3, 4)}


def test_pretraining_runs_in_two_processes_and_in_half_precision(images, tmp_path):
    arguments = ('--data-root', images, '--work-dir', tmp_path, '--precision', 'bfloat16')
    call_tool_in_processes(2, TRAIN, SIMMIM, *arguments, *SMALL, *SHORT)
    assert (tmp_path / 'epoch_2.pth').exists()


def test_classifier_starts_from_the_checkpoint(images, pretrained, tmp_path):
    config = tmp_path / 'classifier.py'
    config.write_text(f"""
_base_ = '{ROOT}/configs/vil_t_imagenet_pretrain192.py'
model = dict(head=dict(in_channels=32))
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(
    type='CustomDataset', _delete_=True, data_root='{images}', ann_file='{tmp_path}/labels.txt',
    pipeline=_base_.train_pipeline))
train_cfg = dict(max_epochs=1)
param_scheduler = []
""")
    (tmp_path / 'labels.txt').write_text('a.png 0\nb.jpg 1\n')
    start = [
        'model.backbone.init_cfg.type=Pretrained',
        f'model.backbone.init_cfg.checkpoint={pretrained / "epoch_2.pth"}',
    ]
    arguments = ('--no-validate', '--work-dir', tmp_path / 'work')
    log = call_tool(TRAIN, config, *arguments, '--cfg-options', *ARCH, *start)
    assert_loaded(log, left='pool_norm.weight, pool_norm.bias')


def test_upernet_starts_from_the_checkpoint(pretrained, tmp_path):
    pytest.importorskip('mmseg')
    write_segmentation_data(tmp_path / 'data', training=2, validation=1)
    small = [
        *(*ARCH, 'model.backbone.out_indices=(0,1,2,3)', 'train_dataloader.batch_size=2'),
        *('model.decode_head.in_channels=[16,16,16,16]', 'model.auxiliary_head.in_channels=16'),
        *('train_cfg.max_iters=1', 'model.backbone.init_cfg.type=Pretrained'),
        f'model.backbone.init_cfg.checkpoint={pretrained / "epoch_2.pth"}',
    ]
    log = call_tool(
        *(TRAIN, ROOT / 'configs/upernet_vil_t_camvid.py', '--data-root', tmp_path / 'data'),
        *('--no-validate', '--work-dir', tmp_path / 'work', '--cfg-options', *small),
    )
    assert_loaded(log, left='pyramid.')


def assert_loaded(log, left):
    assert f'Left at initialization: {left}' in log
    assert 'Not used from the checkpoint: mask_token' in log


def test_tools_know_the_cost_of_pretraining(tmp_path):
    report = tmp_path / 'flops.json'
    call_tool(ANALYSIS / 'get_flops.py', SIMMIM, '--json', report, *SMALL)
    counts = json.loads(report.read_text())
    assert counts['multiply_adds'][0]['shape'] == [192, 192]
    assert counts['parameters']['neck'] == 16 * 768 + 768
    arguments = ('--gpu-memory', 0.3, '--gpus', 2, '--json', tmp_path / 'plan.json')
    call_tool(ANALYSIS / 'plan.py', SIMMIM, *arguments, *SMALL)
    plan = json.loads((tmp_path / 'plan.json').read_text())
    assert plan['batch'] == 2048 and plan['per_image'] > 0


def test_pretraining_reports_a_misspelt_option_of_the_backbone(images, tmp_path):
    arguments = ('--data-root', images, '--work-dir', tmp_path, '--check')
    said = call_tool(TRAIN, SIMMIM, *arguments, *SMALL, 'model.backbone.img_sise=9', status=2)
    assert "no option 'img_sise'. Did you mean img_size?" in said
