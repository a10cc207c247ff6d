# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What a user gets wrong is said in one line, and before anything long starts."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from tool_process import call_tool

from mmvil.cli import config, errors, main, preflight
from mmvil.engine import cpu

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / 'tools/train.py'
CAMVID = ROOT / 'configs/upernet_vil_t_camvid.py'


@pytest.fixture(scope='module')
def common():
    """The functions of mmvil.cli that these tests call."""
    return SimpleNamespace(
        run=main.run,
        **{name: getattr(config, name) for name in ('load_config', 'build_lazily')},
        **{name: value for name, value in vars(preflight).items() if name.startswith('check_')},
        UserError=errors.UserError,
        explain=errors.explain,
        fit_to_cpu=cpu.fit_to_cpu,
        leave_process_group=main.leave_process_group,
    )


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
    with pytest.raises(ValueError, match='needs GPUs'):
        common.fit_to_cpu(cfg)


# -- Options, folders, disks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    'option, hint',
    [
        ('drop_path', 'Did you mean drop_path_rate?'),
        ('out_indexes', 'Did you mean out_indices?'),
        ('xyz', 'It has: arch, version, img_size'),
    ],
)
def test_misspelt_option_of_the_backbone_is_named_with_the_one_meant(common, option, hint):
    cfg = common.load_config(str(CAMVID), {f'model.backbone.{option}': 1})
    with pytest.raises(common.UserError) as error:
        common.check_backbone(cfg)
    assert f'VisionLSTM has no option {option!r}. {hint}' in str(error.value)
    common.check_backbone(common.load_config(str(CAMVID), {}))


def test_work_dir_below_a_file_is_refused(common, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(common.UserError, match='cannot use the work dir .*/file: it is a file'):
        common.check_work_dir(Config(dict(work_dir=str(tmp_path / 'file/work'))))


def test_work_dir_without_permission_is_refused(common, tmp_path, monkeypatch):
    work_dir = tmp_path / 'locked/work'
    (tmp_path / 'locked').mkdir(mode=0o555)
    if os.geteuid() == 0:  # who may write everywhere
        monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(common.UserError, match='locked: no permission to write. .*--work-dir'):
        common.check_work_dir(Config(dict(work_dir=str(work_dir))))
    assert not work_dir.exists()


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_line_that_names_the_file(common, capsys, number):
    def main():
        raise OSError(number, os.strerror(number), 'work/iter_10.pth')

    with pytest.raises(SystemExit) as exit_:
        common.run(main)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f'error: {os.strerror(number)} while writing work/iter_10.pth.')
    assert said.count('\n') == 1 and '--resume' in said


def test_other_errors_of_the_system_keep_their_trace(common):
    with pytest.raises(FileNotFoundError):
        common.run(lambda: open('/does/not/exist'))


def test_bad_sample_from_a_worker_process_is_one_line(common, capsys):
    from mmvil.engine import SampleError

    def main():  # what torch makes of it
        raise SampleError(
            'Caught SampleError in DataLoader worker process 0.\nOriginal Traceback:\n  File …\n'
            'mmvil.engine.sampling.SampleError: cannot load a.jpg: OSError: cut off\n'
        )

    with pytest.raises(SystemExit):
        common.run(main)
    assert capsys.readouterr().err == 'error: cannot load a.jpg: OSError: cut off\n'


# -- Data and checkpoints, in trainings ------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """Config of a small segmentor that trains 4 iterations, with its 2 images beside it."""
    pytest.importorskip('mmseg')
    rng = np.random.default_rng(0)
    for split in ('training', 'validation'):
        for i in range(2):
            for kind, suffix, shape, high in (
                ('images', 'jpg', (32, 32, 3), 255),
                ('annotations', 'png', (32, 32), 11),
            ):
                path = tmp_path / f'data/{kind}/{split}/{i}.{suffix}'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, high, shape).astype(np.uint8)).save(path)
    config = tmp_path / 'tiny.py'
    config.write_text(
        f"_base_ = '{CAMVID}'\n"
        'model = dict(\n'
        '    data_preprocessor=dict(size=(32, 32)),\n'
        '    backbone=dict(\n'
        '        arch=dict(_delete_=True, embed_dims=8, depth=4), img_size=32,\n'
        '        out_indices=(0, 1, 2, 3)),\n'
        '    decode_head=dict(in_channels=[8] * 4, channels=8),\n'
        '    auxiliary_head=dict(in_channels=8, channels=8),\n'
        ')\n'
        'train_pipeline = [_base_.train_pipeline[0], _base_.train_pipeline[1],\n'
        '                  _base_.train_pipeline[-1]]\n'
        f"root = '{tmp_path}/data'\n"
        'train_dataloader = dict(\n'
        '    batch_size=2, dataset=dict(data_root=root, pipeline=train_pipeline))\n'
        'val_dataloader = dict(dataset=dict(data_root=root))\n'
        'test_dataloader = val_dataloader\n'
        'train_cfg = dict(max_iters=4, val_interval=100)\n'
        'default_hooks = dict(\n'
        '    logger=dict(interval=1), checkpoint=dict(interval=2, save_best=None))\n'
    )
    return config


def error_of(said):
    """The one line in which a tool says what is wrong."""
    assert 'Traceback' not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith('error: ')]
    return line


def test_half_downloaded_annotations_are_noticed_at_once(common, tiny):
    (tiny.parent / 'data/annotations/training/1.png').unlink()
    cfg = common.load_config(str(tiny), {})
    with pytest.raises(common.UserError, match=r'1 of 2 images in .* no annotation .*1\.png'):
        common.check_data(cfg, 'train_dataloader')


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
        'annotation of the wrong size': np.zeros((16, 32)),
        'annotation of the wrong mode': np.zeros((32, 32, 3)),
        'labels beyond num_classes': np.full((32, 32), 12),
    }[kind]
    Image.fromarray(zeros.astype(np.uint8)).save(labels)
    return labels


@pytest.mark.parametrize(
    'kind, words',
    [
        ('corrupt JPEG', 'cannot load'),
        slow('annotation of the wrong size', 'annotation has 16x32 pixels and the image 32x32'),
        slow('annotation of the wrong mode', '0.png: '),
        slow('labels beyond num_classes', 'labels run from 11 to 11, but the data set has classes'),
    ],
)
def test_training_stops_at_a_bad_file_and_names_it(tiny, kind, words):
    path = damage(kind, tiny.parent / 'data')
    error = error_of(call_tool(TRAIN, tiny, '--work-dir', tiny.parent / 'work', status=2))
    assert str(path) in error and words in error


@pytest.mark.slow  # 15 seconds: two trainings
def test_full_disk_leaves_the_checkpoints_before(tiny, common):
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
def test_malicious_checkpoint_is_refused_whichever_way_it_comes(tiny, way):
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
def test_port_in_use_is_said(tiny):
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
