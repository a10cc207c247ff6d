# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import os
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from torch.utils.data import default_collate

import mmvil
from mmvil.checkpoints import OFFICIAL_CHECKPOINTS
from mmvil.cli import preflight
from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError
from mmvil.engine.cpu import fit_to_cpu
from tests.conftest import ROOT

CAMVID = ROOT / 'configs/upernet_vil_t_camvid.py'


def test_missing_data_is_named_with_what_to_do(tmp_path):
    pytest.importorskip('mmseg')
    cfg = load_config(str(CAMVID), {})
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(tmp_path / 'camvid')
    with pytest.raises(UserError, match='data not found: .*camvid .*--data-root'):
        preflight.check_data(cfg, 'train_dataloader', 'val_dataloader')

    (tmp_path / 'camvid/images/training').mkdir(parents=True)
    with pytest.raises(UserError, match='data not found: .*annotations/training'):
        preflight.check_data(cfg, 'train_dataloader')


def test_empty_dataset_is_rejected(tmp_path):
    pytest.importorskip('mmseg')
    for kind in ('images', 'annotations'):
        (tmp_path / kind / 'training').mkdir(parents=True)
    (tmp_path / 'images/training/a.png').touch()
    cfg = load_config(str(CAMVID), {})
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    with pytest.raises(UserError, match=r'there is no \*\.jpg in'):
        preflight.check_data(cfg, 'train_dataloader')


def test_folder_without_readable_images_is_rejected(tmp_path):
    pytest.importorskip('mmpretrain')
    (tmp_path / 'deep').mkdir()
    (tmp_path / 'deep/a.webp').touch()
    cfg = load_config(str(ROOT / 'configs/simmim_vil_t_pretrain192.py'), {})
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    with pytest.raises(UserError, match=r'there is no \*\.bmp, .*\*\.png, .* in'):
        preflight.check_data(cfg, 'train_dataloader')
    (tmp_path / 'deep/A.PNG').touch()
    preflight.check_data(cfg, 'train_dataloader')


def test_dataset_without_samples_is_named():
    loops = type('Loops', (), dict(train_loop=property(lambda _: np.concatenate([]))))
    with pytest.raises(UserError, match='dataset has no samples.*classes'):
        preflight.build_loops(loops(), 'train')


def test_missing_annotation_file_is_named(tmp_path):
    pytest.importorskip('mmseg')
    for kind in ('images', 'annotations'):
        (tmp_path / kind / 'training').mkdir(parents=True)
    (tmp_path / 'images/training/a.jpg').touch()
    cfg = load_config(str(CAMVID), {})
    cfg.train_dataloader.dataset.update(data_root=str(tmp_path), ann_file='split.txt')
    with pytest.raises(UserError, match='annotations not found: .*/split.txt'):
        preflight.check_data(cfg, 'train_dataloader')
    (tmp_path / 'split.txt').write_text('a')
    preflight.check_data(cfg, 'train_dataloader')


def test_missing_or_foreign_checkpoint_is_rejected(tmp_path):
    with pytest.raises(UserError, match='checkpoint not found'):
        preflight.check_checkpoint(str(tmp_path / 'none.pth'))
    page = tmp_path / 'page.pth'
    page.write_text('<html>not found</html>')
    with pytest.raises(UserError, match='is not a PyTorch checkpoint'):
        preflight.check_checkpoint(str(page))
    for zipped in (True, False):
        torch.save({}, tmp_path / 'good.pth', _use_new_zipfile_serialization=zipped)
        preflight.check_checkpoint(str(tmp_path / 'good.pth'))
    cfg = Config(dict(model=dict(init_cfg=dict(type='Pretrained', checkpoint=str(page)))))
    with pytest.raises(UserError, match='is not a PyTorch checkpoint'):
        preflight.check_config_checkpoints(cfg)
    preflight.check_checkpoint(str(page.rename(tmp_path / 'page.safetensors')))  # PyTorch decides


def test_official_checkpoint_that_is_not_downloaded_yet_is_noted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path))
    cached = tmp_path / 'checkpoints' / 'vil2_tiny16_e800_in1k.th'
    for address in ('mmvil://vil2_tiny16', OFFICIAL_CHECKPOINTS[0].url):
        preflight.check_checkpoint(address)
        assert f'{address} is not at {cached} yet and will be downloaded' in capsys.readouterr().out
    cached.parent.mkdir()
    cached.touch()
    preflight.check_checkpoint('mmvil://vil2_tiny16')
    assert not capsys.readouterr().out


def test_checkpoint_of_another_model_is_rejected():
    small, large = (
        mmvil.VisionLSTM(arch=dict(embed_dims=width, depth=2), img_size=32) for width in (16, 32)
    )
    preflight.check_fit(small, dict(state_dict=small.state_dict()), 'a.pth')
    wrapped = {f'module.{name}': value for name, value in small.state_dict().items()}
    preflight.check_fit(small, dict(state_dict=wrapped), 'a.pth')
    with pytest.raises(UserError, match='a.pth does not fit .* have another shape'):
        preflight.check_fit(large, dict(state_dict=small.state_dict()), 'a.pth')
    with pytest.raises(UserError, match='tensors are missing'):
        preflight.check_fit(small, dict(state_dict={}), 'a.pth')


def test_checkpoint_of_another_image_size_fits():
    arch = dict(embed_dims=16, depth=2)
    other = mmvil.VisionLSTM(arch=arch, img_size=64).state_dict()
    preflight.check_fit(mmvil.VisionLSTM(arch=arch, img_size=32), dict(state_dict=other), 'a.pth')


@pytest.mark.parametrize(
    'option, hint',
    [
        ('drop_path', 'Did you mean drop_path_rate?'),
        ('out_indexes', 'Did you mean out_indices?'),
        ('xyz', 'It has: arch, version, img_size'),
    ],
)
def test_misspelt_option_of_the_backbone_is_named_with_the_one_meant(option, hint):
    cfg = load_config(str(CAMVID), {f'model.backbone.{option}': 1})
    with pytest.raises(UserError) as error:
        preflight.check_backbone(cfg)
    assert f'VisionLSTM has no option {option!r}. {hint}' in str(error.value)
    preflight.check_backbone(load_config(str(CAMVID), {}))


@pytest.mark.parametrize('backbone', ['my_package.MyVisionLSTM', 'OtherVisionLSTM'])
def test_backbone_of_the_user_may_have_options_of_its_own(backbone):
    cfg = load_config(str(CAMVID), {})
    cfg.model.backbone.update(type=backbone, extra=1)
    preflight.check_backbone(cfg)


def test_masked_backbone_is_checked_too():
    path = str(ROOT / 'configs/simmim_vil_t_pretrain192.py')
    with pytest.raises(UserError, match="no option 'extra'"):
        preflight.check_backbone(load_config(path, {'model.backbone.extra': 1}))


def test_images_that_do_not_go_together_are_named_after_training_has_failed():
    preprocessors = pytest.importorskip('mmseg.models.data_preprocessor')
    pair = [torch.zeros(3, 40, 50), torch.zeros(3, 64, 50)]
    cfg = Config(dict(model=dict(backbone=dict(in_channels=3))))
    with pytest.raises(RuntimeError) as failed:
        default_collate(pair)
    with pytest.raises(UserError, match=r'shapes, \[3, 40, 50\] and \[3, 64, 50\]; .* resize'):
        preflight.check_images(None, cfg, failed.value)
    preprocess = preprocessors.SegDataPreProcessor(mean=[0.0] * 3, std=[1.0] * 3)
    with pytest.raises(RuntimeError) as failed:
        preprocess(dict(inputs=[torch.zeros(4, 40, 50)], data_samples=None), training=True)
    with pytest.raises(UserError, match='some images have another number of channels'):
        preflight.check_images([dict(inputs=pair[0])], cfg, failed.value)
    preflight.check_images([dict(inputs=pair[0])], cfg, RuntimeError('another error'))


def test_work_dir_below_a_file_is_rejected(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot use the work dir .*/file: it is a file'):
        preflight.check_work_dir(Config(dict(work_dir=str(tmp_path / 'file/work'))))
    with pytest.raises(UserError, match='cannot use the work dir .*/file: it is a file'):
        preflight.check_testing(Config(dict(work_dir=str(tmp_path / 'file'))))


def test_work_dir_without_permission_is_rejected(tmp_path, monkeypatch):
    work_dir = tmp_path / 'locked/work'
    (tmp_path / 'locked').mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write everywhere
        monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(UserError, match='locked: no permission to write. .*--work-dir'):
        preflight.check_work_dir(Config(dict(work_dir=str(work_dir))))
    assert not work_dir.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')
def test_cpu_replaces_mixed_precision_and_says_so():
    cfg = load_config(str(ROOT / 'configs/upernet_vil_t_ade20k.py'), {})
    cfg.launcher = 'none'
    (note,) = fit_to_cpu(cfg)
    assert 'float32' in note
    assert cfg.optim_wrapper.type == 'OptimWrapper' and 'dtype' not in cfg.optim_wrapper
    assert cfg.model.backbone.pyramid.norm_cfg.type == 'BN'
    cfg.launcher = 'slurm'
    with pytest.raises(ValueError, match='needs GPUs'):
        fit_to_cpu(cfg)


def test_build_runner_says_which_preprocessor_the_model_uses(tmp_path):
    pytest.importorskip('mmpretrain')
    cfg = load_config(str(ROOT / 'configs/vil_t_imagenet.py'), {})
    cfg.update(work_dir=str(tmp_path), launcher='none', experiment_name='preprocessor')
    cfg.model.backbone.arch = dict(embed_dims=8, depth=2)
    for name in ('train', 'val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{name}_{part}'] = None
    cfg.optim_wrapper = cfg.param_scheduler = None
    cfg.data_preprocessor = dict(num_classes=3)
    runner = preflight.build_runner(cfg)
    assert runner.model.data_preprocessor.num_classes == 1000
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'data_preprocessor is not used: set model.data_preprocessor' in log


def test_build_runner_leaves_the_config_of_the_caller(tmp_path):
    cfg = Config(
        dict(
            model=dict(type='mmvil.VisionLSTM', arch=dict(embed_dims=8, depth=2), img_size=32),
            val_dataloader=None,
            work_dir=str(tmp_path),
            launcher='none',
            default_scope='mmengine',
            experiment_name='build_runner',
        )
    )
    before = cfg.to_dict()
    runner = preflight.build_runner(cfg, notes=['a note'])
    assert cfg.to_dict() == before and runner.cfg.to_dict().keys() >= before.keys()
    cfg.model.arch = 'huge'
    cfg.experiment_name = 'build_runner_again'
    with pytest.raises(UserError, match='cannot build what the config describes'):
        preflight.build_runner(cfg)


def test_missing_package_of_the_visualizer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'clearml', None)  # importing it fails
    model = dict(type='mmvil.VisionLSTM', arch=dict(embed_dims=8, depth=1), img_size=32)
    visualizer = dict(type='Visualizer', vis_backends=[dict(type='ClearMLVisBackend')])
    common = dict(work_dir=str(tmp_path), default_scope='mmengine', launcher='none')
    with pytest.raises(UserError, match='ImportError: .*clearml'):
        preflight.build_runner(
            Config(dict(model=model, visualizer=visualizer, experiment_name='vis', **common))
        )


FSDP = dict(type='mmvil.engine.fsdp.FSDPStrategy', model_wrapper=dict())


@pytest.mark.parametrize(
    'settings, problem',
    [
        (
            dict(strategy=FSDP, custom_hooks=[dict(type='mmengine.EMAHook')]),
            'EMAHook cannot copy a sharded model',
        ),
        (dict(strategy=FSDP), 'FSDPStrategy needs a launcher'),
        (
            dict(strategy=dict(type='DeepSpeedStrategy'), optim_wrapper=dict(type='OptimWrapper')),
            'DeepSpeedStrategy needs an optim_wrapper of the type DeepSpeedOptimWrapper',
        ),
        (dict(strategy=dict(type='DeepSpeedStrategy'), compile=True), 'does not support compile'),
    ],
)
def test_settings_that_a_strategy_does_not_support_are_rejected(settings, problem):
    with pytest.raises(UserError, match=problem):
        preflight.build_runner(Config(dict(settings, launcher='none', model=dict())))


def test_compiling_the_whole_training_step_is_advised_against(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(MMLogger, 'warning', lambda self, text, *_: warnings.append(str(text)))
    model = dict(type='mmvil.VisionLSTM', arch=dict(embed_dims=8, depth=1), img_size=32)
    common = dict(model=model, work_dir=str(tmp_path), default_scope='mmengine', launcher='none')
    for name, compiled in (('plain', False), ('compiled', dict(mode='reduce-overhead'))):
        preflight.build_runner(Config(dict(common, experiment_name=name, compile=compiled)))
        assert bool(compiled) == any('model.backbone.compile=True' in text for text in warnings)
