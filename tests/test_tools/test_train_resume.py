# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""A training that was killed continues as if nothing had happened."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tool_process import call_tool, losses

from tests.street_images import write_image, write_segmentation_data, write_segmentor

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / 'tools/train.py'

RANDOM = """
model['backbone'].update(drop_path_rate=0.5, drop_path_mode='uniform')
model['decode_head'].update(dropout_ratio=0.1)
train_pipeline[2:2] = [
    dict(type='RandomResize', scale=(80, 60), ratio_range=(0.8, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(48, 64), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
]
param_scheduler = [dict(type='PolyLR', by_epoch=False, end=100)]
train_cfg = dict(max_iters={iterations}, val_interval=1000)
default_hooks['checkpoint'].update(max_keep_ckpts=3, save_best=None)
log_processor = dict(window_size=1)
"""

CLASSIFIER = """
_base_ = '{configs}/vil_t_imagenet_pretrain192.py'

model = dict(
    data_preprocessor=dict(num_classes=2),
    backbone=dict(arch=dict(_delete_=True, embed_dims=16, depth=2), drop_path_rate=0.5),
    head=dict(num_classes=2, in_channels=32),
)
dataset = dict(
    type='CustomDataset', data_root='{data}', classes=['dark', 'bright'], _delete_=True
)
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    dataset=dict(data_prefix='train', pipeline=_base_.train_pipeline, **dataset),
)
val_dataloader = val_cfg = val_evaluator = test_dataloader = test_cfg = test_evaluator = None
train_cfg = dict(max_epochs=3)
param_scheduler = []
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(save_best=None))
log_processor = dict(window_size=1)
"""


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    """Config of a segmentor that trains 6 iterations with everything random, and its data."""
    pytest.importorskip('mmseg')
    folder = tmp_path_factory.mktemp('segmentor')
    write_segmentation_data(folder / 'data', training=5, validation=1)
    return write_config(folder, iterations=6)


def write_config(folder, iterations):
    config = folder / f'segmentor_{iterations}.py'
    write_segmentor(config, folder / 'data', RANDOM.format(iterations=iterations))
    return config


@pytest.fixture(scope='module')
def straight(segmentor, tmp_path_factory):
    """The work dir of a training without interruption."""
    work_dir = tmp_path_factory.mktemp('straight')
    call_tool(TRAIN, segmentor, '--work-dir', work_dir)
    return work_dir


def copy_checkpoints(source, target, *names):
    """Put checkpoints into a work dir, the first one oldest, as a killed training left them."""
    for age, name in enumerate(reversed(names)):
        (target / name).write_bytes((source / name).read_bytes())
        os.utime(target / name, (time.time() - age, time.time() - age))
    (target / 'last_checkpoint').write_text(str(target / names[-1]))


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_losses_are_identical_with_random_augmentation(
    segmentor, straight, tmp_path, workers
):
    copy_checkpoints(straight, tmp_path, 'iter_2.pth')
    options = ('--cfg-options', f'train_dataloader.num_workers={workers}')
    call_tool(TRAIN, segmentor, '--work-dir', tmp_path, '--resume', *options)
    expected = {step: loss for step, loss in losses(straight).items() if step > 2}
    assert len(expected) == 4 and len(set(expected.values())) == 4
    assert losses(tmp_path) == expected  # to the last bit


@pytest.mark.slow  # 20 seconds
def test_resumed_classifier_repeats_mixup_and_workers_augmentation(tmp_path):
    pytest.importorskip('mmpretrain')
    rng = np.random.default_rng(0)
    for i in range(4):
        image = rng.integers(0, 255, (40, 50, 3))
        write_image(tmp_path / f'data/train/{("bright", "dark")[i % 2]}/{i}.png', image)
    config = tmp_path / 'classifier.py'
    config.write_text(CLASSIFIER.format(configs=ROOT / 'configs', data=tmp_path / 'data'))
    call_tool(TRAIN, config, '--work-dir', tmp_path / 'straight')
    (tmp_path / 'resumed').mkdir()
    copy_checkpoints(tmp_path / 'straight', tmp_path / 'resumed', 'epoch_1.pth')
    call_tool(TRAIN, config, '--work-dir', tmp_path / 'resumed', '--resume')
    expected = losses(tmp_path / 'straight')
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / 'resumed') == {step: expected[step] for step in (3, 4, 5, 6)}


def test_truncated_newest_checkpoint_is_passed_over_and_named(segmentor, straight, tmp_path):
    copy_checkpoints(straight, tmp_path, 'iter_2.pth', 'iter_4.pth', 'iter_6.pth')
    newest = tmp_path / 'iter_6.pth'
    newest.write_bytes(newest.read_bytes()[:-1000])
    said = call_tool(TRAIN, segmentor, '--work-dir', tmp_path, '--resume')
    assert f'{newest} is damaged' in said
    assert f'resuming from {tmp_path / "iter_4.pth"}' in said
    assert losses(tmp_path) == {step: losses(straight)[step] for step in (5, 6)}


def test_resume_says_which_settings_are_those_of_the_checkpoint(segmentor, straight, tmp_path):
    copy_checkpoints(straight, tmp_path, 'iter_6.pth')
    options = ('--work-dir', tmp_path, '--resume', '--cfg-options')
    assert 'resuming restores' not in call_tool(TRAIN, segmentor, *options, 'log_level=INFO')
    changed = ('optim_wrapper.optimizer.weight_decay=0.1', 'param_scheduler.0.end=3')
    said = call_tool(TRAIN, segmentor, *options, *changed)
    (warning,) = re.findall('WARNING - resuming restores (.*) of the checkpoint; those of', said)
    assert {'optimizer.weight_decay', 'param_scheduler.0.end'} <= set(warning.split(', '))
    assert 'optimizer.lr' not in warning

    said = call_tool(
        TRAIN, segmentor, *options, 'optim_wrapper.paramwise_cfg.flat_decay_mult=1', status=2
    )
    assert f'error: cannot resume from {tmp_path}/iter_6.pth with another optimizer' in said
    assert 'parameter group' in said and 'Traceback' not in said


@pytest.mark.slow  # 20 seconds
def test_two_trainings_in_one_work_dir_and_sigkill_at_any_moment(segmentor, tmp_path):
    config = write_config(segmentor.parent, iterations=40)
    command = [sys.executable, TRAIN, config, '--work-dir', tmp_path, '--resume']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with open(tmp_path / 'output', 'w') as output:
        first = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    try:
        wait_for(lambda: (tmp_path / 'iter_4.pth').exists() or first.poll() is not None)
        said = call_tool(TRAIN, config, '--work-dir', tmp_path, status=2)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert f'process {first.pid} on ' in said and 'choose another folder with --work-dir' in said
    # The lock ends with the process that was killed, and what it left is whole.
    left = {int(path.stem[5:]): path for path in tmp_path.glob('iter_*.pth')}
    assert len(left) >= 2
    last = max(left)
    short = write_config(segmentor.parent, iterations=last + 2)
    call_tool(TRAIN, short, '--work-dir', tmp_path, '--resume')
    assert max(losses(tmp_path)) >= last + 2


def wait_for(condition, seconds=240):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)
