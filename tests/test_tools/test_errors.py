# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What a user gets wrong is said in one line, and before anything long starts."""

import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from tool_process import call_tool

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / 'tools/train.py'
CAMVID = ROOT / 'configs/upernet_vil_t_camvid.py'


@pytest.fixture(scope='module')
def common():
    sys.path.insert(0, str(ROOT / 'tools'))
    try:
        import _common

        return _common
    finally:
        sys.path.remove(str(ROOT / 'tools'))


def test_missing_config_is_one_line_and_status_2():
    said = call_tool(TRAIN, 'configs/upernet_vil_t_camvd.py', status=2)
    (line,) = [line for line in said.splitlines() if line.startswith('error:')]
    assert line.startswith('error: config not found: configs/upernet_vil_t_camvd.py.')
    assert 'Did you mean' in line and 'upernet_vil_t_camvid.py' in line
    assert 'Traceback' not in said


def test_traceback_flag_shows_the_trace():
    assert 'Traceback' in call_tool(TRAIN, 'none.py', '--traceback', status=1)


def test_value_error_of_mmvil_is_one_line(common, capsys):
    import mmvil

    with pytest.raises(SystemExit) as exit_:
        common.run(lambda: mmvil.VisionLSTM(arch='huge'))
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: Unknown arch 'huge'")


def test_value_error_of_others_keeps_its_trace(common):
    with pytest.raises(ValueError, match='invalid literal'):
        common.run(lambda: int('x'))


def test_broken_config_is_named(common, tmp_path):
    config = tmp_path / 'broken.py'
    config.write_text('model = dict(\n')
    with pytest.raises(common.UserError, match='cannot read .*broken.py'):
        common.load_config(str(config), {})


def test_missing_library_is_named(common, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'mmengine'\nmodel = dict(type='mmnothing.Model')\n")
    with pytest.raises(common.UserError, match='needs mmnothing, which is not installed'):
        common.load_config(str(config), {})


def test_missing_data_is_named_with_what_to_do(common, tmp_path):
    pytest.importorskip('mmseg')
    cfg = common.load_config(str(CAMVID), {})
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(tmp_path / 'camvid')
    with pytest.raises(common.UserError, match='data not found: .*camvid .*--data-root'):
        common.check_data(cfg, 'train_dataloader', 'val_dataloader')

    (tmp_path / 'camvid/images/training').mkdir(parents=True)
    with pytest.raises(common.UserError, match='data not found: .*annotations/training'):
        common.check_data(cfg, 'train_dataloader')


def test_empty_data_set_is_refused(common, tmp_path):
    pytest.importorskip('mmseg')
    for kind in ('images', 'annotations'):
        (tmp_path / kind / 'training').mkdir(parents=True)
    (tmp_path / 'images/training/a.png').touch()
    cfg = common.load_config(str(CAMVID), {})
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    with pytest.raises(common.UserError, match=r'there is no \*\.jpg in'):
        common.check_data(cfg, 'train_dataloader')


def test_missing_or_foreign_checkpoint_is_refused(common, tmp_path):
    with pytest.raises(common.UserError, match='checkpoint not found'):
        common.check_checkpoint(str(tmp_path / 'none.pth'))
    page = tmp_path / 'page.pth'
    page.write_text('<html>not found</html>')
    with pytest.raises(common.UserError, match='is not a PyTorch checkpoint'):
        common.check_checkpoint(str(page))
    for zipped in (True, False):
        torch.save({}, tmp_path / 'good.pth', _use_new_zipfile_serialization=zipped)
        common.check_checkpoint(str(tmp_path / 'good.pth'))
    cfg = Config(dict(model=dict(init_cfg=dict(type='Pretrained', checkpoint=str(page)))))
    with pytest.raises(common.UserError, match='is not a PyTorch checkpoint'):
        common.check_config_checkpoints(cfg)


def test_checkpoint_of_another_model_is_refused(common):
    import mmvil

    small, large = (
        mmvil.VisionLSTM(arch=dict(embed_dims=width, depth=2), img_size=32) for width in (16, 32)
    )
    common.check_fit(small, dict(state_dict=small.state_dict()), 'a.pth')
    wrapped = {f'module.{name}': value for name, value in small.state_dict().items()}
    common.check_fit(small, dict(state_dict=wrapped), 'a.pth')
    with pytest.raises(common.UserError, match='a.pth does not fit .* have another shape'):
        common.check_fit(large, dict(state_dict=small.state_dict()), 'a.pth')
    with pytest.raises(common.UserError, match='tensors are missing'):
        common.check_fit(small, dict(state_dict={}), 'a.pth')


def test_checkpoint_of_another_image_size_fits(common):
    import mmvil

    arch = dict(embed_dims=16, depth=2)
    other = mmvil.VisionLSTM(arch=arch, img_size=64).state_dict()
    common.check_fit(mmvil.VisionLSTM(arch=arch, img_size=32), dict(state_dict=other), 'a.pth')


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')
def test_cpu_replaces_mixed_precision_and_says_so(common):
    cfg = common.load_config(str(ROOT / 'configs/upernet_vil_t_ade20k.py'), {})
    cfg.launcher = 'none'
    (note,) = common.fit_to_cpu(cfg)
    assert 'float32' in note
    assert cfg.optim_wrapper.type == 'OptimWrapper' and 'dtype' not in cfg.optim_wrapper
    assert cfg.model.backbone.pyramid.norm_cfg.type == 'BN'
    cfg.launcher = 'slurm'
    with pytest.raises(common.UserError, match='needs GPUs'):
        common.fit_to_cpu(cfg)
