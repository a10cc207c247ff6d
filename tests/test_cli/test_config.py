# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import argparse
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.dataset import BaseDataset
from mmengine.device import get_device
from mmengine.registry import DATASETS

from mmvil.apis import swap_backbone
from mmvil.cli.config import build_lazily, load_config, read_runner_config, set_data_root
from mmvil.cli.errors import UserError
from mmvil.engine.cpu import fit_to_cpu


def test_broken_config_is_named(tmp_path):
    config = tmp_path / 'broken.py'
    config.write_text('model = dict(\n')
    with pytest.raises(UserError, match='cannot read .*broken.py'):
        load_config(str(config), {})


def test_missing_library_is_named(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'mmengine'\nmodel = dict(type='mmnothing.Model')\n")
    with pytest.raises(UserError, match='needs mmnothing, which is not installed'):
        load_config(str(config), {})


def test_detector_without_compiled_operators_is_rejected(tmp_path, monkeypatch):
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'mmdet'\n")
    monkeypatch.setattr(
        'importlib.util.find_spec', lambda name: None if name == 'mmcv._ext' else 'found'
    )
    with pytest.raises(UserError, match='needs mmcv with compiled operators.*docs/detection.md'):
        load_config(str(config), {})
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match='needs mmdet, which is not installed.*docs/detection.md'):
        load_config(str(config), {})


def test_config_of_a_missing_library_is_named():
    with pytest.raises(UserError, match='mmnothing::a.py needs mmnothing, which is not installed'):
        load_config('mmnothing::a.py', {})


def test_options_that_do_not_fit_are_named(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'mmengine'\nlr = 1\n")
    with pytest.raises(UserError, match='--cfg-options do not fit .*config.py'):
        load_config(str(config), {'lr.value': 2})


def test_misspelt_settings_are_rejected(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'mmengine'\nmy_scale = 1\n")
    options = {'my_scale': 2, 'randomness.seed': 0, 'auto_scale_lr.base_batch_size': 8, 'mine': 1}
    assert load_config(str(config), options).randomness.seed == 0
    for name, meant in {'randomnes.seed': 'randomness', 'my_scala': 'my_scale'}.items():
        with pytest.raises(UserError, match=f'Did you mean {meant}?'):
            load_config(str(config), {name: 0})


def test_misspelt_nested_settings_are_rejected(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        "default_scope = 'mmengine'\n"
        "model = dict(heads=[dict(type='A', test_cfg=dict(stride=1))])\n"
        "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', in_channels=3),"
        ' paramwise_cfg=dict(custom_keys=dict(norm1=dict(lr_mult=1))))\n'
    )
    misspelt = {
        'optim_wrapper.optimizr.lr': 'optim_wrapper.optimizer',
        'model.heads.0.test_cfg.strid': 'model.heads.0.test_cfg.stride',
    }
    for name, meant in misspelt.items():
        with pytest.raises(UserError, match=f'Did you mean {meant}?'):
            load_config(str(config), {name: 1})
    new = {
        'optim_wrapper.optimizer.out_channels': 1,  # close to in_channels
        'optim_wrapper.paramwise_cfg.custom_keys.norm2.lr_mult': 1,
        'optim_wrapper.accumulative_counts': 2,
        'model.heads.0.test_cfg.mode': 'slide',
        'randomness.seed': 1,
    }
    assert load_config(str(config), new).model.heads[0].test_cfg == dict(stride=1, mode='slide')


def test_own_config_inherits_from_mmseg_on_both_lines(tmp_path):
    pytest.importorskip('mmseg')
    config = tmp_path / 'mine.py'
    base = 'mmseg::_base_/models/fpn_r50.py'
    config.write_text(f"_base_ = '{base}'\ndefault_scope = 'mmseg'\n")
    before = dict(MODULE2PACKAGE)
    assert load_config(str(config), {}).model.type == 'EncoderDecoder'
    assert swap_backbone(config, 'tiny').model.backbone.type == 'mmvil.VisionLSTM'
    assert MODULE2PACKAGE == before


def test_swap_backbone_accepts_names_of_installed_configs():
    pytest.importorskip('mmseg')
    swapped = swap_backbone('mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py', 'tiny')
    assert swapped.model.decode_head.in_channels == 192
    with pytest.raises(ModuleNotFoundError, match="No module named 'mmsegg'"):
        swap_backbone('mmsegg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py')


def test_inherited_collate_function_gets_no_scope(tmp_path):
    pytest.importorskip('mmpretrain')
    config = tmp_path / 'mine.py'
    config.write_text("_base_ = 'mmpretrain::_base_/datasets/imagenet_bs32_mocov2.py'\n")
    cfg = load_config(str(config), {})
    assert cfg.train_dataloader.collate_fn == dict(type='default_collate')


def test_default_scope_is_the_library_of_the_config():
    pytest.importorskip('mmpretrain')
    path = 'mmpretrain::dinov2/vit-small-p14_dinov2-pre_headless.py'  # states none
    cfg = load_config(path, {}, 'vil-t')
    assert cfg.default_scope == 'mmpretrain' and cfg.model.head is None
    assert cfg.model.backbone.out_type == 'bilateral_concat'


def test_default_scope_is_the_library_of_the_model(tmp_path):
    pytest.importorskip('mmseg')
    config = tmp_path / 'new_style.py'
    config.write_text(
        'from mmengine.config import read_base\nfrom mmseg.models import EncoderDecoder\n\n'
        'default_scope = None\nmodel = dict(type=EncoderDecoder)\n'
    )
    assert load_config(str(config), {}).default_scope == 'mmseg'
    config.write_text("model = dict(type='Model')\n")
    assert load_config(str(config), {}).default_scope == 'mmengine'


def test_load_config_names_the_classes_that_a_config_imports(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        'from torch.optim import AdamW\n\nfrom mmengine.config import read_base\n'
        'from mmengine.optim import AmpOptimWrapper\n\n'
        "default_scope = 'mmengine'\nmodel = dict()\nlauncher = 'none'\n"
        'optim_wrapper = dict(type=AmpOptimWrapper, dtype="float16", optimizer=dict(type=AdamW))\n'
    )
    cfg = load_config(str(config), {})
    assert cfg.optim_wrapper.type == 'mmengine.optim.AmpOptimWrapper'
    assert cfg.optim_wrapper.optimizer.type == 'torch.optim.AdamW'
    if get_device() == 'cpu':
        fit_to_cpu(cfg)
        assert cfg.optim_wrapper == dict(
            type='OptimWrapper', optimizer=dict(type='torch.optim.AdamW')
        )


def test_read_runner_config_applies_arguments(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        "default_scope = 'mmengine'\n"
        "train_dataloader = dict(dataset=dict(type='RepeatDataset', dataset=dict(data_root='a')))\n"
    )
    arguments = dict(config=str(config), cfg_options={'seed': 1}, backbone=None, work_dir=None)
    arguments.update(launcher='none', no_pin_memory=True, data_root='b')
    cfg = read_runner_config(argparse.Namespace(**arguments))
    assert cfg.seed == 1 and cfg.work_dir == 'work_dirs/config'
    assert cfg.train_dataloader.pin_memory is False
    assert cfg.train_dataloader.dataset.dataset.data_root == 'b'
    arguments.update(work_dir='~/c', data_root='~/d')  # as shells pass --work-dir=~/c
    cfg = read_runner_config(argparse.Namespace(**arguments))
    assert cfg.work_dir == str(Path.home() / 'c')
    assert cfg.train_dataloader.dataset.dataset.data_root == str(Path.home() / 'd')


def test_set_data_root_reaches_metrics_that_read_annotations():
    dataset = dict(data_root='data/coco', ann_file='annotations/val.json')
    metrics = [
        dict(type='CocoMetric', ann_file='data/coco/annotations/val.json'),
        dict(type='CocoMetric', ann_file='elsewhere/val.json'),
        dict(type='IoUMetric'),
    ]
    cfg = Config(dict(val_dataloader=dict(dataset=dataset), test_dataloader=dict(dataset=dataset)))
    cfg.val_evaluator, cfg.test_evaluator = metrics, metrics[0]
    set_data_root(cfg, 'data/coco/mini')
    moved = 'data/coco/mini/annotations/val.json'
    files = [metric.get('ann_file') for metric in cfg.val_evaluator]
    assert files == [moved, 'elsewhere/val.json', None]
    assert cfg.test_evaluator.ann_file == moved


def test_set_data_root_of_none_keeps_the_config():
    cfg = Config(dict(val_dataloader=dict(dataset=dict(data_root='a'))))
    set_data_root(cfg, None)
    assert cfg.val_dataloader.dataset.data_root == 'a'


class Eager:
    def __init__(self, number=1):
        self.number = number


@pytest.fixture
def registered():
    """Names of a dataset of mmengine and of one that knows no ``lazy_init``."""
    classes = dict(LazyForTest=BaseDataset, EagerForTest=Eager)
    for name, cls in classes.items():
        DATASETS.register_module(name=name, module=cls)
    yield
    for name in classes:
        DATASETS.module_dict.pop(name)


def test_build_lazily_knows_paths_and_reads_nothing(registered):
    cfg = dict(type='LazyForTest', data_root='/none', data_prefix=dict(img_path='images'))
    assert build_lazily(cfg, 'mmengine').data_prefix == dict(img_path='/none/images')
    assert build_lazily(dict(type='EagerForTest'), 'mmengine') is None


@pytest.mark.parametrize(
    'cfg, message',
    [
        (dict(type='LazyForTest', data_rot='a'), 'data_rot'),
        (dict(type='NoSuchDataset'), 'NoSuchDataset'),
    ],
)
def test_build_lazily_reports_rejected_options(registered, cfg, message):
    with pytest.raises(UserError, match=f'cannot build the dataset {cfg["type"]}: .*{message}'):
        build_lazily(cfg, 'mmengine')
