# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_export import SEGMENTOR, save_random_model
from tool_process import call_tool

SCRIPT = Path(__file__).parents[2] / 'tools/visualization/plot_log.py'


def write_log(work_dir, started, scalars):
    path = work_dir / started / 'vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, scalars)))


def plot_log(*args):
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True)


def test_plot_log_draws_resumed_run(tmp_path):
    write_log(tmp_path, '20240101_000000', [dict(loss=2.0, step=10), dict(loss=1.5, step=20)])
    write_log(tmp_path, '20240101_010000', [dict(loss=1.4, step=20), dict(mIoU=50.0, step=20)])
    write_log(tmp_path, '20240101_020000', [])  # a test run logs nothing here
    out = tmp_path / 'pictures/curve.png'
    result = plot_log(tmp_path, '--out', out)
    assert result.returncode == 0, result.stderr
    assert Image.open(out).width > 400


def test_plot_log_reports_missing_logs(tmp_path):
    result = plot_log(tmp_path / 'nowhere')
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert '--work-dir of a training run' in result.stderr


def test_plot_log_rejects_formats_that_cannot_be_written(tmp_path):
    result = plot_log(tmp_path, '--out', 'curve.xyz')
    assert result.returncode == 2
    assert 'argument --out: must end with one of' in result.stderr and '.png' in result.stderr


def test_plot_log_reports_a_file_that_cannot_be_written(tmp_path):
    write_log(tmp_path, '1', [dict(loss=2.0, step=10)])
    (tmp_path / 'file').touch()
    result = plot_log(tmp_path, '--out', tmp_path / 'file/curve.png')
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith('File exists: ')
    assert 'Traceback' not in result.stderr


def test_plot_log_names_the_metrics_that_there_are(tmp_path):
    write_log(tmp_path, '1', [dict(loss=2.0, step=10), {'coco/bbox_mAP': 0.4, 'step': 10}])
    out = ('--out', tmp_path / 'curve.png')
    said = plot_log(tmp_path, *out).stdout
    assert 'has no mIoU. --metric accepts: coco/bbox_mAP, loss, step' in said
    assert 'has no' not in plot_log(tmp_path, '--metric', 'coco/bbox_mAP', *out).stdout
    (tmp_path / 'config.py').write_text('lr = 1\n')
    result = plot_log(tmp_path / 'config.py', *out)
    assert result.returncode == 1 and 'is not a log of scalars' in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_plot_log_puts_epochs_at_their_iterations(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import plot_log

    by_epoch = [
        *(dict(loss=2.0, epoch=1, step=100), dict(top1=50.0, step=1)),
        *(dict(loss=1.5, epoch=2, step=200), dict(top1=60.0, step=2)),
    ]
    write_log(tmp_path / 'a', '1', by_epoch)
    write_log(tmp_path / 'b', '1', [dict(loss=2.0, step=50), dict(top1=40.0, step=50)])
    drawn = []
    monkeypatch.setattr(plot_log, 'plot', lambda runs, *_: drawn.extend(runs.values()))
    logs = [str(tmp_path / name / '1/vis_data/scalars.json') for name in 'ab']  # one file name
    out = str(tmp_path / 'curve.png')
    monkeypatch.setattr('sys.argv', ['plot_log', *logs, '--out', out])
    plot_log.main()
    assert [run['top1'] for run in drawn] == [{100: 50.0, 200: 60.0}, {50: 40.0}]


def test_plot_predictions_rejects_a_classifier(tmp_path):
    config = SCRIPT.parents[2] / 'configs/vil_t_imagenet.py'
    said = call_tool(SCRIPT.with_name('plot_predictions.py'), config, 'model.pth', status=2)
    assert 'is not of a segmentor' in said


LOOK_INSIDE = SCRIPT.with_name('look_inside.py')


@pytest.mark.parametrize('picture', ['gates', 'decay', 'receptive_field', 'pca'])
def test_look_inside_draws(picture, tmp_path):
    config, checkpoint = save_random_model(tmp_path, SEGMENTOR)
    generator = np.random.default_rng(0)
    for i in range(2):
        noise = generator.integers(0, 255, (48, 80, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f'{i}.png')
    out = tmp_path / 'new' / f'{picture}.png'
    said = call_tool(LOOK_INSIDE, picture, tmp_path, config, checkpoint, '--out', out)
    assert f'Picture: {out}' in said
    drawn = np.asarray(Image.open(out).convert('RGB'))
    assert drawn.shape[1] > 400 and len(np.unique(drawn)) > 100


def test_look_inside_rejects_unknown_blocks(tmp_path):
    config, checkpoint = save_random_model(tmp_path, SEGMENTOR)
    Image.new('RGB', (64, 64)).save(tmp_path / 'image.png')
    said = call_tool(
        *(LOOK_INSIDE, 'gates', tmp_path / 'image.png', config, checkpoint, '--blocks', 0, 7),
        status=2,
    )
    assert 'error: --blocks must be between 0 and 1, but are [0, 7]' in said
