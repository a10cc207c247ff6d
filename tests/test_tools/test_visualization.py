# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

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


def test_plot_log_says_what_is_missing(tmp_path):
    result = plot_log(tmp_path / 'nowhere')
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert '--work-dir of a training run' in result.stderr
