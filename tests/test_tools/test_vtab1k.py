# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""tools/vtab1k.py on a stand-in for VTAB-1K: the digits of scikit-learn in the same layout."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tool_process import call_tool

import mmvil

TOOLS = Path(__file__).parents[2] / 'tools'
# A short training of a small network from scratch.
OPTIONS = (
    *('model.backbone.img_size=16', 'optim_wrapper.paramwise_cfg.layer_decay_rate=1.0'),
    *('train_dataloader.num_workers=0', 'val_dataloader.num_workers=0'),
    *(f'{loader}_dataloader.dataset.pipeline.1.scale=16,16' for loader in ('train', 'val')),
    *('train_cfg.max_epochs=4', 'param_scheduler.0.end=1'),
    *('param_scheduler.1.begin=1', 'param_scheduler.1.end=4'),
)


def write_standin(folder, datasets, sizes):
    """Digits in the files and folders of VTAB-1K, under the names of some of its datasets."""
    digits = pytest.importorskip('sklearn.datasets').load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    ends = np.cumsum(list(sizes.values()))
    splits = dict(zip(sizes, np.split(order[: ends[-1]], ends[:-1])))
    splits['train800val200'] = np.concatenate([splits['train800'], splits['val200']])
    for dataset in datasets:
        for split, members in splits.items():
            (folder / dataset / 'images' / split).mkdir(parents=True)
            lines = []
            for i in members:
                image = np.kron(digits.images[i] * 15, np.ones((2, 2))).astype(np.uint8)
                name = f'images/{split}/{i:04}.png'
                Image.fromarray(image).convert('RGB').save(folder / dataset / name)
                lines.append(f'{name} {digits.target[i]}\n')
            (folder / dataset / f'{split}.txt').write_text(''.join(lines))


@pytest.fixture(scope='module')
def standin(tmp_path_factory):
    """The data and a "pre-trained" checkpoint."""
    pytest.importorskip('mmpretrain')
    folder = tmp_path_factory.mktemp('vtab')
    write_standin(folder / 'data', ['svhn', 'eurosat'], dict(train800=256, val200=64, test=128))
    torch.manual_seed(0)
    backbone = mmvil.VisionLSTM(
        arch=dict(embed_dims=32, depth=2), img_size=16, patch_size=4, out_type='bilateral_concat'
    )
    state = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    state.update({'head.fc.weight': torch.zeros(1000, 64), 'head.fc.bias': torch.zeros(1000)})
    torch.save(dict(state_dict=state), folder / 'vil_small_test.pth')
    return folder / 'data', folder / 'vil_small_test.pth'


def command(standin, work_dir, *more, options=OPTIONS):
    return (
        *(TOOLS / 'vtab1k.py', *standin, '--work-dir', work_dir, '--stale-after', '30'),
        *('--datasets', 'svhn', '--lrs', '2e-3', '1e-6', '--seeds', '2'),
        *(*more, '--cfg-options', *options),
    )


def results(work_dir):
    return {path.stem: json.loads(path.read_text()) for path in work_dir.glob('runs/*.json')}


def start(*arguments):
    """Start the tool beside this process, as from a shell."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, 'timed out'
        time.sleep(0.05)


def test_vtab1k_runs_the_protocol(standin, tmp_path):
    said = call_tool(*command(standin, tmp_path))
    assert '6 of 6 runs' in said
    found = results(tmp_path)
    assert set(found) == {
        *(f'svhn.tune.lr{lr}.seed{seed}' for lr in ('1e-06', '0.002') for seed in (0, 1)),
        *(f'svhn.final.lr0.002.seed{seed}' for seed in (0, 1)),  # the better one
    }
    final = [found[f'svhn.final.lr0.002.seed{seed}']['accuracy'] for seed in (0, 1)]
    assert min(final) > 40  # of 10 classes; what cannot learn stays below
    assert all(found[f'svhn.tune.lr1e-06.seed{seed}']['accuracy'] < 30 for seed in (0, 1))
    losses = [
        json.loads(log.read_text().splitlines()[0])['loss']
        for log in tmp_path.glob('logs/svhn.final*/*/vis_data/scalars.json')
    ]
    assert len(set(losses)) == 2  # two seeds

    mean = f'{np.mean(final):.1f}'
    table = (tmp_path / 'results.md').read_text()
    assert re.search(rf'\| svhn \| natural \| 0\.002 \| [\d.]+ \| {mean} \|', table)
    assert '| vil_small_test | – | – | – | – |' in table
    assert '| ViL-T, published | 73.6 | 83.4 | 56.1 | 68.3 |' in table
    with open(tmp_path / 'results.csv') as file:
        ours, *published = csv.DictReader(file)
    assert float(ours['svhn']) == pytest.approx(np.mean(final), abs=0.01) and not ours['natural']
    assert [float(row['average']) for row in published] == [68.3, 70, 70.9]

    # Again: nothing is left to do; and other settings are rejected.
    said = call_tool(*command(standin, tmp_path / 'none', '--status'), status=2)
    assert 'error: no runs in' in said and not (tmp_path / 'none').exists()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob('runs/*')}
    assert '6 of 6 runs' in call_tool(*command(standin, tmp_path, '--status'))
    call_tool(*command(standin, tmp_path))
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob('runs/*')}
    said = call_tool(*command(standin, tmp_path, '--lrs', '1', '2'), status=2)
    assert 'was started with lrs' in said and 'another --work-dir' in said


@pytest.mark.slow  # about 2 minutes
def test_vtab1k_survives_a_kill_and_two_workers_share_the_runs(standin, tmp_path):
    killed = start(*command(standin, tmp_path))
    wait_until(lambda: len(results(tmp_path)) == 1, killed)
    wait_until(lambda: list(tmp_path.glob('logs/*seed1')), killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (begun,) = {
        path for path in tmp_path.glob('runs/*.attempt-1') if path.stem not in results(tmp_path)
    }
    os.utime(begun, (0, 0))  # rather than waiting
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('runs/*.json')}

    workers = [start(*command(standin, tmp_path)) for _ in range(2)]
    said = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('runs/*.json')}
    assert len(after) == 6 and before.items() <= after.items()  # what was finished stays
    attempts = sorted(path.name for path in tmp_path.glob('runs/*.attempt-*'))
    assert len([name for name in attempts if name.endswith('.attempt-2')]) == 1  # the killed one
    assert len(attempts) == 7  # and no other was begun twice
    for name in after:  # done here or there
        label = name.removesuffix('.json').replace('.tune.', ' tune ').replace('.final.', ' final ')
        label = label.replace('lr', 'lr ', 1).replace('.seed', ' seed ')
        assert (name in before) + sum(text.count(f'{label}: ') for text in said) == 1, label


@pytest.mark.slow  # imports everything anew
def test_vtab1k_releases_a_run_when_terminated(standin, tmp_path):
    options = (*OPTIONS, 'train_cfg.max_epochs=1000')
    worker = start(*command(standin, tmp_path, options=options))
    wait_until(lambda: list(tmp_path.glob('logs/*')), worker)
    worker.terminate()
    worker.communicate(timeout=60)
    assert worker.returncode == 143
    assert not list(tmp_path.glob('runs/*'))


def test_vtab1k_reports_failed_runs(standin, tmp_path):
    broken = (*OPTIONS, 'model.head.type=NoSuchHead')
    said = call_tool(*command(standin, tmp_path, '--max-attempts', '1', options=broken), status=2)
    assert 'three runs in a row failed' in said and 'NoSuchHead' in said
    said = call_tool(*command(standin, tmp_path, '--max-attempts', '1', options=broken), status=1)
    assert 'Failed runs: 4. --retry' in said
    assert len(list(tmp_path.glob('runs/*.error'))) == 4  # and no final run


def test_vtab1k_checks_its_data(standin, tmp_path):
    data, checkpoint = standin
    said = call_tool(*command(standin, tmp_path, '--check'))
    assert 'in place: 6 runs' in said and 'train800.txt has 256 images instead of 800' in said
    said = call_tool(*command(standin, tmp_path, '--check', '--datasets', 'kitti'), status=2)
    assert 'data not found' in said and 'kitti/train800.txt' in said
    for option in ('optim_wrapper.optimizr.lr', 'model.backbone.strid'):  # before 570 runs
        said = call_tool(*command(standin, tmp_path, options=[f'{option}=8']), status=2)
        assert 'Did you mean' in said
    (tmp_path / 'eurosat').mkdir()
    (tmp_path / 'eurosat' / 'train800.txt').write_text('images/a.png 10\n')
    said = call_tool(*command((tmp_path, checkpoint), tmp_path, '--datasets', 'eurosat'), status=2)
    assert 'expected labels from 0 to 9' in said
