# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The command lines, as users call them, on datasets of a few small images."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tool_process import call_tool, losses

from tests.street_images import write_image, write_segmentation_data, write_segmentor

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'

CLASSIFIER = """
_base_ = '{configs}/vil_t_imagenet_pretrain192.py'

model = dict(
    data_preprocessor=dict(num_classes=2),
    backbone=dict(arch=dict(_delete_=True, embed_dims=16, depth=2)),
    head=dict(num_classes=2, in_channels=32),
)
dataset = dict(
    type='CustomDataset', data_root='{data}', classes=['dark', 'bright'], _delete_=True
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(data_prefix='train', pipeline=_base_.train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(data_prefix='val', pipeline=_base_.test_pipeline, **dataset),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
param_scheduler = []
default_hooks = dict(visualization=dict(enable=True, interval=1))
"""


def shell(*command, status=0, **environment):
    """Run a shell script; return what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHON': sys.executable, **environment},
        timeout=300,
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    """A trained segmentor: its config, data and work dir."""
    pytest.importorskip('mmseg')
    folder = tmp_path_factory.mktemp('segmentor')
    write_segmentation_data(folder / 'data', training=4, validation=2)
    config = folder / 'tiny_segmentor.py'
    write_segmentor(config, folder / 'data')
    log = call_tool(TOOLS / 'train.py', config, '--work-dir', folder / 'work')
    assert 'mIoU' in log
    return config, folder / 'data', folder / 'work'


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """A trained classifier: its config and work dir."""
    pytest.importorskip('mmpretrain')
    folder = tmp_path_factory.mktemp('classifier')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for i, name in enumerate(('bright', 'dark', 'bright', 'dark')):
            image = rng.integers(0, 100, (40, 50, 3)) + 100 * (name == 'bright')
            write_image(folder / f'data/{split}/{name}/{i // 2}.png', image)  # names occur twice
    config = folder / 'tiny_classifier.py'
    config.write_text(CLASSIFIER.format(configs=ROOT / 'configs', data=folder / 'data'))
    call_tool(TOOLS / 'train.py', config, '--work-dir', folder / 'work')
    return config, folder / 'work'


@pytest.mark.skipif(torch.__version__ < '2.5', reason='older compilers lack transforms')
def test_backbone_is_compiled_once(segmentor, tmp_path):
    config, _, _ = segmentor
    command = (sys.executable, TOOLS / 'train.py', config, '--work-dir', tmp_path)
    compiled = ('--cfg-options', 'model.backbone.compile.backend=eager')
    log = shell(*command, *compiled, TORCH_LOGS='dynamo')
    assert list(losses(tmp_path)) == [1, 2, 3, 4]
    assert re.findall(r'start tracing (\w+)', log) == ['forward']


def test_segmentor_is_tested_with_pictures_and_label_maps(segmentor, tmp_path):
    config, data, work_dir = segmentor
    log = call_tool(
        *(TOOLS / 'test.py', config, work_dir / 'iter_4.pth', '--data-root', data),
        *('--work-dir', tmp_path, '--out', tmp_path / 'maps', '--show-dir', tmp_path / 'shown'),
        *('--dump', tmp_path / 'all.pkl', '--no-pin-memory'),
    )
    assert 'mIoU' in log
    assert len(list((tmp_path / 'maps').glob('*.png'))) == 2
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 2
    assert len(pickle.loads((tmp_path / 'all.pkl').read_bytes())) == 2


def test_test_with_tta_flips_and_rescales(segmentor, tmp_path):
    config, _, work_dir = segmentor
    flip = tmp_path / 'flip.py'
    flip.write_text(
        f"_base_ = '{config}'\n"
        "tta_model = dict(type='SegTTAModel')\n"
        "tta_pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=["
        "[dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)],"
        "[dict(type='LoadAnnotations', reduce_zero_label=True)], [dict(type='PackSegInputs')]])]\n"
    )
    checkpoint = work_dir / 'iter_4.pth'
    assert 'mIoU' in call_tool(TOOLS / 'test.py', flip, checkpoint, '--tta', '--work-dir', tmp_path)
    said = call_tool(TOOLS / 'test.py', config, checkpoint, '--tta', status=2)
    assert '--tta needs tta_pipeline' in said


def test_classifier_is_tested_with_and_without_tta(classifier, tmp_path):
    config, work_dir = classifier
    checkpoint = work_dir / 'epoch_1.pth'
    log = call_tool(
        *(TOOLS / 'test.py', config, checkpoint, '--work-dir', tmp_path, '--tta'),
        *('--out', tmp_path / 'metrics.json', '--out-item', 'metrics'),
    )
    assert 'accuracy/top1' in log
    assert 'accuracy/top1' in json.loads((tmp_path / 'metrics.json').read_text())
    said = call_tool(
        *(TOOLS / 'test.py', config, checkpoint, '--work-dir', tmp_path),
        *('--show-dir', tmp_path / 'shown', '--out', tmp_path / 'all.pkl'),
    )
    assert 'accuracy/top1' in said
    assert {path.name for path in (tmp_path / 'shown').glob('*.png')} == {
        *('bright_0.png_0.png', 'bright_1.png_0.png', 'dark_0.png_0.png', 'dark_1.png_0.png')
    }
    results = pickle.loads((tmp_path / 'all.pkl').read_bytes())
    assert len(results) == 4 and all(Path(result['img_path']).is_file() for result in results)


def test_pictures_in_training_have_the_names_of_their_folders(classifier):
    _, work_dir = classifier
    assert {path.name for path in work_dir.glob('*/vis_data/vis_image/*.png')} == {
        *('bright_0.png_1.png', 'bright_1.png_1.png', 'dark_0.png_1.png', 'dark_1.png_1.png')
    }


def test_tta_keeps_the_preprocessor_of_the_model(classifier, tmp_path):
    config, work_dir = classifier
    scores = []
    for number, options in enumerate(((), ('--cfg-options', 'data_preprocessor.num_classes=2'))):
        file = tmp_path / f'{number}.pkl'
        call_tool(
            *(TOOLS / 'test.py', config, work_dir / 'epoch_1.pth', '--tta', '--dump', file),
            *('--work-dir', tmp_path, *options),
        )
        scores.append([result['pred_score'] for result in pickle.loads(file.read_bytes())])
    assert all(map(torch.equal, *scores))


def test_demo_draws_segmentation(segmentor, tmp_path):
    config, data, work_dir = segmentor
    images = data / 'images/validation'
    said = call_tool(
        TOOLS / 'demo.py', images, config, work_dir / 'iter_4.pth', '--out-dir', tmp_path
    )
    assert '0.jpg' in said and '%' in said
    picture = Image.open(tmp_path / '0.png')
    assert picture.size == Image.open(images / '0.jpg').size
    assert np.asarray(picture).std() > 0


def test_demo_draws_classification(classifier, tmp_path):
    config, work_dir = classifier
    image = next((config.parent / 'data/val').rglob('*.png'))
    said = call_tool(
        TOOLS / 'demo.py', image, config, work_dir / 'epoch_1.pth', '--out-dir', tmp_path / 'new'
    )
    assert 'bright' in said or 'dark' in said
    assert (tmp_path / 'new' / image.name).exists()


LIST_THREADS_AT_EXIT = """
import atexit, glob, os

@atexit.register
def list_threads():
    if 'RANK' in os.environ:
        names = [open(path).read().strip() for path in glob.glob('/proc/self/task/*/comm')]
        line = ' '.join(['threads of a rank at its end:', *names, os.linesep])
        os.write(1, line.encode())  # at once: prints of two ranks may mingle
"""


def test_dist_train_runs_two_processes_and_reports_replacements(segmentor, tmp_path):
    config, _, _ = segmentor
    (tmp_path / 'sitecustomize.py').write_text(LIST_THREADS_AT_EXIT)
    log = shell(
        *(TOOLS / 'dist_train.sh', config, 2, '--work-dir', tmp_path, '--auto-scale-lr'),
        PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get('PYTHONPATH')])]),
    )
    assert 'the current batch size is 4' in log  # 2 processes x 2 images
    assert (tmp_path / 'iter_4.pth').exists()
    if 'no GPU' in log:
        assert 'CPUSyncBatchNorm replaces SyncBN' in log and 'gloo' in log

    # Gloo's would now and then abort a process that has done all its work.
    at_exit = [line for line in log.splitlines() if 'threads of a rank at its end' in line]
    assert len(at_exit) == 2
    assert 'gloo' not in ''.join(at_exit)


@pytest.mark.slow
def test_dist_test_runs_two_processes(segmentor, tmp_path):
    config, _, work_dir = segmentor
    checkpoint = work_dir / 'iter_4.pth'
    log = shell(TOOLS / 'dist_test.sh', config, checkpoint, 2, '--work-dir', tmp_path)
    assert 'mIoU' in log


def test_dist_scripts_report_errors_in_one_line(tmp_path):
    said = shell(TOOLS / 'dist_train.sh', tmp_path / 'none.py', 2, status=2)
    assert said.count('error:') == 1 and 'Traceback' not in said


@pytest.mark.parametrize(
    'script, arguments, variables, line',
    [
        ('dist_train.sh', ('a.py',), {}, 'usage: .*dist_train.sh CONFIG N '),
        ('dist_train.sh', ('a.py', 'two'), {}, 'usage: .*dist_train.sh CONFIG N '),
        ('dist_test.sh', ('a.py', 'a.pth', '0'), {}, 'usage: .*dist_test.sh CONFIG CHECKPOINT N '),
        ('dist_train.sh', ('a.py', '2'), dict(PORT='x'), 'error: PORT must be a number, but is x'),
        (
            *('dist_train.sh', ('a.py', '2'), dict(NNODES='2', NODE_RANK='2')),
            'error: NODE_RANK must be less than NNODES=2, but is 2',
        ),
        ('slurm_test.sh', ('gpu', 'job', 'a.py'), {}, 'usage: .*slurm_test.sh PARTITION '),
        ('slurm_train.sh', ('gpu', 'job', 'a.py'), dict(GPUS='x'), 'error: GPUS must be a number'),
    ],
)
def test_launch_scripts_explain_their_arguments_in_one_line(script, arguments, variables, line):
    said = shell(TOOLS / script, *arguments, status=2, **variables)
    assert re.match(line, said) and said.count('\n') == 1


def test_slurm_scripts_quote_and_honour_their_variables(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/bash\nprintf "[%s] " "$@"; echo "port $MASTER_PORT"\n')
    srun.chmod(0o755)
    environment = {
        **os.environ,
        **dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', GPUS='16', GPUS_PER_NODE='4', PORT='1234'),
        **dict(CPUS_PER_TASK='9', SRUN_ARGS='--qos=high --time=1:00', PYTHON='my python'),
    }
    said = subprocess.run(
        [TOOLS / 'slurm_train.sh', 'part one', 'job', 'a config.py', '--work-dir', 'b c'],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    ).stdout
    for argument in (
        *('--partition=part one', '--gres=gpu:4', '--ntasks=16', '--ntasks-per-node=4'),
        *('--cpus-per-task=9', '--qos=high', '--time=1:00', 'my python', 'a config.py', 'b c'),
    ):
        assert f'[{argument}]' in said
    assert 'port 1234' in said
