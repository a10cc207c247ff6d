# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The pages' way with one's own data: check, train, evaluate, predict, without a line of code."""

import re
import runpy
import sys
from types import ModuleType

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import VISBACKENDS
from tool_process import call_tool

from mmvil.cli.errors import UserError
from tests.conftest import ROOT
from tests.street_images import write_image

TOOLS = ROOT / 'tools'
COLORS = np.uint8([[0, 0, 0], [128, 64, 128], [64, 0, 128]])
NAMES = 'classes: [other, road, car]\n'

SMALL_SEGMENTOR = """
_base_ = '{configs}/upernet_vil_t_own.py'
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=8, depth=4), img_size=32, init_cfg=None,
        out_indices=(0, 1, 2, 3)),
    decode_head=dict(in_channels=[8] * 4, channels=8),
    auxiliary_head=dict(in_channels=8, channels=8),
    test_cfg=dict(_delete_=True, mode='whole'),
)
load, labels, *_, pack = _base_.train_pipeline
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(pipeline=[load, labels, pack]))
val_dataloader = dict(num_workers=0, dataset=dict(pipeline=[load, labels, pack]))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
param_scheduler = []
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""

SMALL_CLASSIFIER = """
_base_ = '{configs}/vil_t_own.py'
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=8, depth=2), img_size=32, init_cfg=None),
    head=dict(in_channels=16),
)
train_dataloader = dict(batch_size=2, num_workers=0)
val_dataloader = dict(batch_size=2, num_workers=0)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
param_scheduler = []
"""


@pytest.fixture
def street(tmp_path):
    """Three images with RGB masks of three classes in each split, and the file of classes."""
    pytest.importorskip('mmseg')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for i in range(3):
            labels = np.kron(rng.integers(0, 3, (4, 4)), np.ones((8, 8), int))
            write_image(tmp_path / f'data/images/{split}/{i}.png', COLORS[labels] + 50)
            write_image(tmp_path / f'data/masks/{split}/{i}.png', COLORS[labels])
    classes = tmp_path / 'data/classes.yaml'
    classes.write_text(f'{NAMES}colors: {COLORS.tolist()}\nclass_weight: [1, 1, 2]\n')
    config = tmp_path / 'small.py'
    config.write_text(SMALL_SEGMENTOR.format(configs=ROOT / 'configs'))
    return config, tmp_path / 'data'


def test_segmentor_of_own_data_is_trained_tested_and_drawn(street, tmp_path):
    config, data = street
    work, root = tmp_path / 'work', ('--data-root', data)
    log = call_tool(TOOLS / 'train.py', config, *root, '--work-dir', work)
    assert re.findall(r'\|\s+(other|road|car)\s+\|\s+[\d.n]', log) == ['other', 'road', 'car']

    (data / 'classes.yaml').unlink()  # the dumped config knows all that it said
    dumped, checkpoint = work / 'small.py', work / 'iter_2.pth'
    cfg = Config.fromfile(dumped)
    assert cfg.model.decode_head.num_classes == 3
    assert cfg.model.decode_head.loss_decode.class_weight == [1, 1, 2]
    resumed = call_tool(
        *(TOOLS / 'train.py', dumped, '--work-dir', work, '--resume', '--no-validate'),
        *('--cfg-options', 'train_cfg.max_iters=3'),
    )
    assert 'Iter(train) [3/3]' in resumed
    assert 'mIoU' in call_tool(TOOLS / 'test.py', dumped, checkpoint, '--work-dir', tmp_path / 'a')
    out = tmp_path / 'predictions.png'
    for option, words in (
        ('train_dataloader.images=1', "unexpected keyword argument 'images'"),
        ('model.decode_head.channels=12', 'does not fit the config'),  # before EMA loads it
    ):
        arguments = ('--work-dir', tmp_path / 'b', '--resume', checkpoint, '--cfg-options', option)
        said = call_tool(TOOLS / 'train.py', dumped, *arguments, status=2)
        assert words in said and 'Traceback' not in said
    before = dumped.read_text()
    log = call_tool(TOOLS / 'test.py', dumped, checkpoint, '--tta')  # into the same work dir
    assert 'mIoU' in log and dumped.read_text() == before
    wrapped = tmp_path / 'wrapped.py'
    wrapped.write_text(
        f"_base_ = '{dumped}'\nhalf = _base_.test_dataloader.dataset\n"
        "both = dict(type='ConcatDataset', datasets=[half, half], _delete_=True)\n"
        'test_dataloader = dict(dataset=both)\n'
    )
    for config in (dumped, wrapped):
        call_tool(TOOLS / 'visualization/plot_predictions.py', config, checkpoint, '--out', out)
        assert out.exists()
        out.unlink()


def test_classifier_of_own_folders_is_trained(tmp_path):
    pytest.importorskip('mmpretrain')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in ('bright', 'dark'):
            image = rng.integers(0, 100, (40, 50, 3)) + 100 * (name == 'bright')
            write_image(tmp_path / f'data/{split}/{name}/0.jpg', image)
    config = tmp_path / 'small.py'
    config.write_text(SMALL_CLASSIFIER.format(configs=ROOT / 'configs'))
    data = ('--data-root', tmp_path / 'data')
    log = call_tool(TOOLS / 'train.py', config, *data, '--work-dir', tmp_path / 'work')
    assert 'accuracy/top1' in log and 'recall_classwise' in log
    cfg = Config.fromfile(tmp_path / 'work/small.py')
    assert cfg.test_dataloader.dataset.metainfo.classes == ['bright', 'dark']

    # From these weights, on data with another number of classes.
    for split in ('train', 'val'):
        write_image(tmp_path / f'data/{split}/gray/0.jpg', np.full((40, 50, 3), 128))
    start = f'load_from={tmp_path}/work/epoch_1.pth'
    options = ('--work-dir', tmp_path / 'three', '--cfg-options', start)
    assert 'accuracy/top1' in call_tool(TOOLS / 'train.py', config, *data, *options)


# -- What check_dataset.py says --------------------------------------------------------------------


@pytest.mark.parametrize(
    'values, classes, words',
    [
        ([0, 85, 255], NAMES, '× annotation has labels that are none of the 3 classes'),
        (
            [0, 255, 255],
            NAMES,
            '1 × annotations have only the labels 0 and 255, and 255 is ignored; where it is a '
            'class, declare values: [0, 255] in classes.yaml',
        ),
        (COLORS, NAMES, '× annotation has colors (mode RGB), not one label per pixel; declare'),
        (COLORS + 1, f'{NAMES}colors: {COLORS.tolist()}', '× annotation has colors of no class'),
        ([0, 1, 2], f'{NAMES}values: [0, 255, 128]', '× annotation has values of no class'),
    ],
    ids=['beyond', 'binary', 'colors', 'other-colors', 'other-values'],
)
def test_check_dataset_reports_invalid_masks(street, values, classes, words):
    config, data = street
    (data / 'classes.yaml').write_text(classes)
    rng = np.random.default_rng(0)
    for path in data.glob('masks/*/*.png'):
        write_image(path, np.array(values)[rng.integers(0, 3, (32, 32))])
    options = ('--data-root', data, '--splits', 'train', '-j', 1)
    said = call_tool(TOOLS / 'check_dataset.py', config, *options, status=1)
    assert words in said


# -- Logging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('visualizer', [[], ['--cfg-options', 'visualizer=None']])
def test_train_logs_to_packages_beside_the_files(monkeypatch, visualizer):
    train = runpy.run_path(str(TOOLS / 'train.py'))
    parser, read_config = train['make_train_parser'](), train['read_config']
    arguments = [str(ROOT / 'configs/vil_t_own.py'), '--tensorboard', '--wandb', *visualizer]
    modules = {name: ModuleType(name) for name in ('torch.utils.tensorboard', 'wandb')}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    cfg = read_config(parser.parse_args(arguments))
    backends = [backend.type for backend in cfg.visualizer.vis_backends]
    assert backends == ['LocalVisBackend', 'TensorboardVisBackend', 'WandbVisBackend']
    assert all(VISBACKENDS.get(backend) for backend in backends)

    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(UserError, match='--wandb needs pip install wandb: ModuleNotFoundError'):
        read_config(parser.parse_args(arguments))
