# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Errors of users are reported in one line, and before anything long starts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tool_process import call_tool

from mmvil.cli.config import CONFIGS, load_config
from mmvil.cli.errors import UserError
from mmvil.cli.preflight import check_data
from tests.street_images import write_segmentation_data, write_segmentor

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / 'tools/train.py'
CAMVID = ROOT / 'configs/upernet_vil_t_camvid.py'


def test_missing_config_is_one_line_and_status_2():
    said = call_tool(TRAIN, 'configs/upernet_vil_t_camvd.py', status=2)
    (line,) = [line for line in said.splitlines() if line.startswith('error:')]
    assert line.startswith('error: config not found: configs/upernet_vil_t_camvd.py.')
    assert f'Did you mean {os.path.relpath((CONFIGS / CAMVID.name).resolve())}?' in line
    assert 'Traceback' not in said


def test_traceback_flag_shows_the_trace():
    assert 'Traceback' in call_tool(TRAIN, 'none.py', '--traceback', status=1)


# -- Data and checkpoints, in trainings ------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """Config of a small segmentor that trains 4 iterations, with its 2 images beside it."""
    pytest.importorskip('mmseg')
    write_segmentation_data(tmp_path / 'data', training=2, validation=2)
    config = tmp_path / 'tiny.py'
    changes = (
        'param_scheduler = _base_.param_scheduler\n'
        'train_cfg = dict(max_iters=4, val_interval=100)\n'
        "default_hooks['checkpoint'].update(save_best=None)\n"
    )
    write_segmentor(config, tmp_path / 'data', changes)
    return config


def error_of(said):
    """The one line in which a tool says what is wrong."""
    assert 'Traceback' not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith('error: ')]
    return line


def test_half_downloaded_annotations_are_noticed_at_once(tiny):
    (tiny.parent / 'data/annotations/training/1.png').unlink()
    cfg = load_config(str(tiny), {})
    with pytest.raises(UserError, match=r'1 of 2 images in .* no annotation .*1\.png'):
        check_data(cfg, 'train_dataloader')


@pytest.mark.parametrize(
    'option, words',
    [
        ('param_scheduler.0.endd=10', "unexpected keyword argument 'endd'"),
        ('optim_wrapper.optimizer.type=Lion', "unknown optimizer 'Lion'"),
    ],
)
def test_training_reports_settings_of_optimizer_and_schedulers(tiny, option, words):
    options = ('--work-dir', tiny.parent / 'work', '--cfg-options', option)
    error = error_of(call_tool(TRAIN, tiny, *options, status=2))
    assert 'cannot build what the config describes' in error and words in error


@pytest.mark.parametrize(
    'option, line',
    [
        (
            'model.auxiliary_head.in_channels=4',
            'error: the backbone outputs [16, 16, 16, 16] channels, but in_channels (or in_index) '
            'of the auxiliary_head is for others',
        ),
        (
            'model.decode_head.num_classes=2',
            'error: num_classes=2 in UPerHead, but the dataset has 11 classes',
        ),
        (
            'default_hooks.checkpoint.intervals=10',
            "error: CheckpointHook has no option 'intervals'. Did you mean interval?",
        ),
        (
            'default_hooks.checkpoint.save_best=mDice',
            "error: save_best is 'mDice', but the metrics are aAcc, mAcc, mIoU",
        ),
        (
            "default_hooks.stop={'type':'EarlyStoppingHook','monitor':'mDice','rule':'greater'}",
            "error: monitor of EarlyStoppingHook is 'mDice', but the metrics are aAcc, mAcc, mIoU",
        ),
        (
            'train_cfg.val_interval=0',
            'error: train_cfg.val_interval must be at least 1. To train without validation: '
            '--no-validate.',
        ),
        (
            'val_evaluator.iou_metrics=[mIou]',
            'error: cannot build what the config describes (--traceback shows where): KeyError: '
            '"metrics [\'mIou\'] is not supported"',
        ),
    ],
)
def test_training_checks_settings_that_are_read_late(tiny, option, line):
    options = ('--work-dir', tiny.parent / 'work', '--cfg-options', option)
    assert error_of(call_tool(TRAIN, tiny, *options, status=2)) == line


def test_training_warns_of_outputs_without_a_class(tiny):
    options = ('--work-dir', tiny.parent / 'work', '--cfg-options', 'train_cfg.max_iters=1')
    option = 'model.auxiliary_head.num_classes=150'
    said = call_tool(TRAIN, tiny, *options, option, '--no-validate')
    assert 'WARNING - num_classes=150 in FCNHead, but the dataset has 11 classes' in said


def slow(*values):
    """Another case of the same, which takes 5 seconds and is left to `make test-full`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def damage(kind, data):
    """Spoil a training image or annotation; return its name."""
    image, labels = data / 'images/training/0.jpg', data / 'annotations/training/0.png'
    if kind == 'corrupt JPEG':
        image.write_bytes(b'\xff\xd8' + bytes(100))
        return image
    zeros = {
        'annotation of the wrong size': np.zeros((16, 64)),
        'annotation of the wrong mode': np.zeros((48, 64, 3)),
        'labels beyond num_classes': np.full((48, 64), 12),
    }[kind]
    Image.fromarray(zeros.astype(np.uint8)).save(labels)
    return labels


@pytest.mark.parametrize(
    'kind, words',
    [
        ('corrupt JPEG', 'cannot load'),
        slow('annotation of the wrong size', 'annotation has 16x64 pixels but the image has 48x64'),
        slow('annotation of the wrong mode', '0.png: '),
        slow('labels beyond num_classes', 'labels run from 11 to 11, but the dataset has classes'),
    ],
)
def test_training_stops_at_a_bad_file_and_names_it(tiny, kind, words):
    path = damage(kind, tiny.parent / 'data')
    error = error_of(call_tool(TRAIN, tiny, '--work-dir', tiny.parent / 'work', status=2))
    assert str(path) in error and words in error


def test_validation_stops_at_an_annotation_that_does_not_fit(tiny):
    path = tiny.parent / 'data/annotations/validation/0.png'
    Image.fromarray(np.full((48, 64), 12, np.uint8)).save(path)
    options = ('--work-dir', tiny.parent / 'work', '--cfg-options', 'train_cfg.max_iters=1')
    error = error_of(call_tool(TRAIN, tiny, *options, status=2))
    assert f'{path}: its labels run from 11 to 11, but the dataset has classes 0 to 10' in error
    path.write_bytes(b'damaged')
    assert f'with annotation {path}: ' in error_of(call_tool(TRAIN, tiny, *options, status=2))


@pytest.mark.slow  # 15 seconds: two trainings
def test_full_disk_leaves_the_checkpoints_before(tiny):
    """A limit on the size of files stands in for a full disk: a checkpoint is larger."""
    work_dir = tiny.parent / 'work'
    call_tool(TRAIN, tiny, '--work-dir', work_dir, '--cfg-options', 'train_cfg.max_iters=2')
    before = (work_dir / 'iter_2.pth').read_bytes()
    limited = tiny.parent / 'limited.py'
    limited.write_text(
        'import resource, runpy, sys\n'
        f'resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2}, resource.RLIM_INFINITY))\n'
        f"sys.argv, sys.path[0] = sys.argv[1:], '{TRAIN.parent}'\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    said = call_tool(limited, TRAIN, tiny, '--work-dir', work_dir, '--resume', status=2)
    assert f'File too large while writing {work_dir}/iter_4.pth' in error_of(said)
    assert [path.name for path in work_dir.glob('*.pth*')] == ['iter_2.pth']
    assert (work_dir / 'iter_2.pth').read_bytes() == before


class Attack:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.makedirs, (self.trace, 0o777, True)


@pytest.mark.parametrize('way', ['--resume', slow('load_from'), 'init_cfg', slow('test')])
def test_malicious_checkpoint_is_rejected_whichever_way_it_comes(tiny, way):
    trace, evil = tiny.parent / 'was_here', tiny.parent / 'evil.pth'
    torch.save(dict(state_dict={}, meta=Attack(str(trace))), evil)
    arguments = {
        '--resume': (TRAIN, tiny, '--resume', evil),
        'load_from': (TRAIN, tiny, '--cfg-options', f'load_from={evil}'),
        'init_cfg': (
            *(TRAIN, tiny, '--cfg-options', 'model.backbone.init_cfg.type=Pretrained'),
            f'model.backbone.init_cfg.checkpoint={evil}',
        ),
        'test': (ROOT / 'tools/test.py', tiny, evil),
    }[way]
    said = error_of(call_tool(*arguments, '--work-dir', tiny.parent / 'work', status=2))
    assert f'{evil} asks for os.makedirs' in said and '--trust-checkpoint' in said
    assert not trace.exists()


@pytest.mark.parametrize('way', ['load_from', slow('--resume'), slow('init_cfg'), slow('test')])
def test_trusted_checkpoint_may_hold_anything(tiny, way):
    work_dir, trace = tiny.parent / 'work', tiny.parent / 'was_here'
    call_tool(TRAIN, tiny, '--work-dir', work_dir, '--cfg-options', 'train_cfg.max_iters=1')
    path = work_dir / 'iter_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['note'] = Attack(str(trace))
    torch.save(checkpoint, path)
    arguments = {
        'load_from': (TRAIN, tiny, '--cfg-options', f'load_from={path}'),
        '--resume': (TRAIN, tiny, '--resume', path),
        'init_cfg': (
            *(TRAIN, tiny, '--cfg-options', 'model.backbone.init_cfg.type=Pretrained'),
            f'model.backbone.init_cfg.checkpoint={path}',
        ),
        'test': (ROOT / 'tools/test.py', tiny, path),
    }[way]
    call_tool(*arguments, '--work-dir', tiny.parent / 'trusting', '--trust-checkpoint')
    assert trace.is_dir()


def test_truncated_checkpoint_is_named(tiny):
    cut = tiny.parent / 'cut.pth'
    torch.save(dict(state_dict=dict(a=torch.zeros(1000))), cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    for arguments in ((ROOT / 'tools/test.py', tiny, cut), (TRAIN, tiny, '--resume', cut)):
        said = call_tool(*arguments, '--work-dir', tiny.parent / 'work', status=2)
        assert f'{cut} is damaged' in error_of(said)


@pytest.mark.slow  # 1 minute: a port that is in use is noticed by torchrun, after its imports
def test_dist_train_reports_a_port_in_use(tiny):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        done = subprocess.run(
            [str(ROOT / 'tools/dist_train.sh'), str(tiny), '1', '--work-dir', str(tiny.parent)],
            env={**os.environ, 'PORT': str(taken.getsockname()[1]), 'PYTHON': sys.executable},
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode != 0
    assert 'EADDRINUSE' in done.stderr or 'address already in use' in done.stderr.lower()
