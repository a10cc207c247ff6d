# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Training on two processes equals training on one, number by number.

The processes are those of a CPU and talk by gloo. Everything random is off: stochastic depth draws
per process.
"""

import multiprocessing
import os
import pickle
import resource
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmvil.checkpoints.sharded import WEIGHTS, require_shards, save_shards
from mmvil.engine import (
    AverageLogHook,
    CPUSyncBatchNorm,
    GlobalBatchCrossEntropyLoss,
    load_safely,
)
from mmvil.layers import DropPath
from tests.street_images import labelled_image, write_image, write_segmentor
from tests.test_tools.tool_process import call_tool, call_tool_in_processes, losses

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / 'tools' / 'train.py'
TEST = ROOT / 'tools' / 'test.py'
MERGE = ROOT / 'tools' / 'model_converters' / 'merge_shards.py'

pytestmark = pytest.mark.distributed

# -- The parts, in processes of their own ----------------------------------------------------------


def in_two_processes(function):
    """Run ``function(rank)`` in two processes that form a group."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    server = multiprocessing.get_context('forkserver')
    processes = [
        server.Process(target=join_and_run, args=(function, rank, port)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]


def join_and_run(function, rank, port):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    torch.distributed.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    function(rank)


def labelled_batch():
    """Logits (4, 3, 5, 6) and labels (4, 5, 6); most of the last two images is not labelled."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, 6, generator=generator, dtype=torch.float64)
    label = torch.randint(3, (4, 5, 6), generator=generator)
    label[2:, 1:] = 255
    return logits, label


def check_loss(rank, class_weight=None):
    logits, label = labelled_batch()
    whole = logits.clone().requires_grad_()
    weight = class_weight and torch.tensor(class_weight, dtype=torch.float64)
    expected = F.cross_entropy(whole, label, weight, ignore_index=255)
    expected.backward()

    own = slice(2 * rank, 2 * rank + 2)
    part = logits[own].clone().requires_grad_()
    loss = GlobalBatchCrossEntropyLoss(class_weight)(part, label[own], ignore_index=255)
    (loss / 2).backward()  # data parallel training takes the mean of the gradients
    torch.testing.assert_close(part.grad, whole.grad[own])

    outputs = dict(loss=loss, accuracy=torch.tensor([50.0 + rank]))
    AverageLogHook().after_train_iter(None, 0, outputs=outputs)
    torch.testing.assert_close(outputs['loss'].item(), expected.item(), rtol=1e-6, atol=0)
    assert outputs['accuracy'] == 50.5

    # What it is there for: the mean of means is something else.
    means = F.cross_entropy(part, label[own], weight, ignore_index=255)
    assert (outputs['loss'] - means).abs() > 1e-3


def test_loss_of_two_processes_is_the_mean_over_all_labelled_pixels():
    in_two_processes(check_loss)


def test_loss_of_two_processes_with_class_weights():
    in_two_processes(partial(check_loss, class_weight=(0.2, 1.0, 3.0)))


def check_sync_batch_norm(rank):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64) + 2
    y_grad = torch.randn_like(x)
    plain, synchronized = nn.BatchNorm2d(3).double(), CPUSyncBatchNorm(3).double()
    for norm in (plain, synchronized):
        norm.weight.data = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    whole = x.clone().requires_grad_()
    expected = plain(whole)
    expected.backward(y_grad)

    own = (slice(0, 3), slice(3, 4))[rank]  # unequal shares
    part = x[own].clone().requires_grad_()
    actual = synchronized(part)
    actual.backward(y_grad[own])
    torch.testing.assert_close(actual, expected[own])
    torch.testing.assert_close(part.grad, whole.grad[own])
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(synchronized.get_buffer(name), buffer)
    for parameter, reference in zip(synchronized.parameters(), plain.parameters()):
        torch.distributed.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad, reference.grad)
    synchronized.eval()
    torch.testing.assert_close(synchronized(part), plain.eval()(part))


def test_cpu_sync_batch_norm_normalizes_by_both_processes():
    in_two_processes(check_sync_batch_norm)


def check_sync_batch_norm_of_half_precision(rank):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 300, 300) + 2  # more pixels than the largest float16
    plain, synchronized = nn.BatchNorm2d(3), CPUSyncBatchNorm(3)
    expected, actual = plain(x)[rank], synchronized(x[rank : rank + 1].half())[0]
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(synchronized.running_var, plain.running_var, rtol=1e-3, atol=0)


def test_cpu_sync_batch_norm_of_half_precision_does_not_overflow():
    in_two_processes(check_sync_batch_norm_of_half_precision)


# -- The parts, in one process ---------------------------------------------------------------------


@pytest.mark.parametrize('class_weight', [None, [0.2, 1.0, 3.0]], ids=['plain', 'class weights'])
def test_loss_of_one_process_is_the_mean_over_labelled_pixels(class_weight):
    logits, label = labelled_batch()
    weight = class_weight and torch.tensor(class_weight, dtype=torch.float64)
    loss = GlobalBatchCrossEntropyLoss(class_weight, loss_weight=0.4)
    expected = 0.4 * F.cross_entropy(logits, label, weight, ignore_index=255)
    torch.testing.assert_close(loss(logits, label, ignore_index=255), expected)
    assert loss.loss_name == 'loss_ce'


def test_loss_equals_that_of_mmseg_with_pixel_weights_and_reductions():
    losses = pytest.importorskip('mmseg.models.losses')
    logits, label = labelled_batch()
    pixel_weight = torch.rand(label.shape, dtype=torch.float64)
    own, other = GlobalBatchCrossEntropyLoss(), losses.CrossEntropyLoss(avg_non_ignore=True)
    for options in (
        dict(),
        dict(weight=pixel_weight),
        dict(avg_factor=7.0),
        dict(reduction_override='none'),
        dict(weight=pixel_weight, reduction_override='sum'),
    ):
        actual = own(logits, label, ignore_index=255, **options)
        torch.testing.assert_close(actual, other(logits, label, ignore_index=255, **options))


def test_loss_without_labelled_pixels_is_zero_and_so_is_its_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = GlobalBatchCrossEntropyLoss()(logits, torch.full((1, 4, 4), 255), ignore_index=255)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize('batch', [1, 2, 16])
def test_drop_path_drops_at_its_rate_whatever_the_batch(batch):
    """Keeping int(batch * (1 - rate)) samples would drop every other one of two, at any rate."""
    torch.manual_seed(0)
    drop_path, runs = DropPath(0.1).train(), 4000 // batch
    x = torch.zeros(batch, 1, 1)
    dropped = sum((drop_path(x, torch.ones_like) == 0).float().mean().item() for _ in range(runs))
    assert dropped / runs == pytest.approx(0.1, abs=0.02)


# -- Whole trainings -------------------------------------------------------------------------------

COMMON = """
# The update is linear in the gradient: equal weights mean equal gradients. (AdamW blows up the
# rounding of gradients that are zero, such as those of biases before a batch norm.)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='mmvil.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.9, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=0.2),
)
param_scheduler = []
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=6)
val_cfg = None
val_dataloader = None
val_evaluator = None
log_processor = dict(by_epoch=False, window_size=1)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3, save_best=None),
)
randomness = dict(seed=0)
"""

CLASSIFIER = (
    """
_base_ = '{configs}/vil_t_imagenet_pretrain192.py'
model = dict(
    data_preprocessor=dict(num_classes=2, to_onehot=True),
    backbone=dict(arch=dict(_delete_=True, embed_dims=16, depth=2), img_size=48),
    head=dict(num_classes=2, in_channels=32, init_cfg=dict(type='Normal', layer='Linear', std=1)),
    train_cfg=None,
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root='{data}/classes',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    ),
)
"""
    + COMMON
)

EMA = """
_base_ = '{config}'
custom_hooks = [dict(type='EMAHook', momentum=0.25)]
train_cfg = dict(max_iters=3, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=1))
val_cfg = dict(_delete_=True, type='ValLoop')
test_cfg = dict(_delete_=True, type='TestLoop')
val_dataloader = dict(
    _delete_=True,
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=_base_.train_dataloader.dataset,
)
test_dataloader = val_dataloader
val_evaluator = [dict(type='Accuracy'), dict(type='DumpResults', out_file_path='{out}/val.pkl')]
test_evaluator = [dict(type='Accuracy'), dict(type='DumpResults', out_file_path='{out}/test.pkl')]
"""

FSDP = """
_base_ = ['{config}', '{configs}/_base_/strategies/fsdp.py']
"""

DEEPSPEED = """
_base_ = ['{config}', '{configs}/_base_/strategies/zero2.py']
strategy = dict(
    bf16=dict(enabled=False),  # float32, to compare numbers
    inputs_to_half=None,
    gradient_clipping=0.2,
    config=dict(zero_allow_untested_optimizer=True),
)
optim_wrapper = dict(
    _delete_=True,
    type='DeepSpeedOptimWrapper',
    constructor=_base_.optim_wrapper.constructor,
    optimizer=_base_.optim_wrapper.optimizer,
    paramwise_cfg=_base_.optim_wrapper.paramwise_cfg,
)
"""

SHARDED = """
_base_ = '{config}'
strategy = dict(state_dict_cfg='sharded')
# A state for every weight, unlike SGD's before its first step; and whole numbers beside them.
optim_wrapper = dict(optimizer=dict(_delete_=True, type='RMSprop', lr=1e-5))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Configs and data: 8 images, in every other one of which most pixels are not labelled."""
    pytest.importorskip('mmseg')
    pytest.importorskip('mmpretrain')
    folder = tmp_path_factory.mktemp('distributed')
    rng = np.random.default_rng(0)
    for i in range(8):
        image, labels = labelled_image(rng, lowest=1)
        labels[: 40 * (i % 2)] = 0  # ignored
        write_image(folder / f'data/images/training/{i}.jpg', image)
        write_image(folder / f'data/annotations/training/{i}.png', labels)
        square = rng.integers(0, 100, (48, 48, 3)) + 100 * (i % 2)
        write_image(folder / f'data/classes/{("dark", "bright")[i % 2]}/{i}.png', square)
    places = dict(configs=ROOT / 'configs', data=folder / 'data')
    write_segmentor(folder / 'segmentor.py', folder / 'data', COMMON)
    (folder / 'classifier.py').write_text(CLASSIFIER.format(**places))
    for name in ('segmentor', 'classifier'):
        text = FSDP.format(config=folder / f'{name}.py', **places)
        (folder / f'{name}_fsdp.py').write_text(text)
    text = SHARDED.format(config=folder / 'classifier_fsdp.py')
    (folder / 'classifier_sharded.py').write_text(text)
    return folder


@pytest.fixture(scope='module')
def alone(folder):
    """Work dirs of trainings by one process, with batches of 4."""
    work_dirs = {}

    def train(name):
        if name not in work_dirs:
            work_dirs[name] = folder / f'{name}_alone'
            options = ('--cfg-options', 'train_dataloader.batch_size=4')
            call_tool(TRAIN, folder / f'{name}.py', '--work-dir', work_dirs[name], *options)
        return work_dirs[name]

    return train


def weights(path):
    return torch.load(path, map_location='cpu', weights_only=False)['state_dict']


def assert_same_training(work_dir, expected_work_dir, iterations=range(1, 7)):
    actual, expected = losses(work_dir), losses(expected_work_dir)
    assert list(actual) == list(iterations)
    for iteration in iterations:
        assert actual[iteration] == pytest.approx(expected[iteration], abs=1e-5)
    actual, expected = (weights(path / 'iter_6.pth') for path in (work_dir, expected_work_dir))
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize('name', ['segmentor', 'classifier'])
def test_two_processes_train_as_one_with_the_doubled_batch(folder, alone, tmp_path, name):
    call_tool_in_processes(2, TRAIN, folder / f'{name}.py', '--work-dir', tmp_path)
    assert_same_training(tmp_path, alone(name))
    start, end = (weights(tmp_path / f'iter_{i}.pth') for i in (3, 6))
    assert any((end[key] - start[key]).abs().max() > 1e-3 for key in end)


def cpu_runs_fsdp():
    """torch 2.1's FSDP asks even a CPU for streams with priorities."""
    try:
        torch.cpu.Stream(priority=-1)
    except (AttributeError, TypeError):
        return False
    return True


def torch_reads_shards():
    try:
        require_shards()
    except ValueError:
        return False
    return cpu_runs_fsdp()


fsdp = pytest.mark.skipif(not cpu_runs_fsdp(), reason="this torch's FSDP does not run on CPUs")
shards = pytest.mark.skipif(not torch_reads_shards(), reason='shards need PyTorch 2.7')


@fsdp
def test_fsdp_trains_as_one_process_and_its_checkpoint_is_a_plain_one(folder, alone, tmp_path):
    log = call_tool_in_processes(2, TRAIN, folder / 'segmentor_fsdp.py', '--work-dir', tmp_path)
    assert 'weight decay 0.05' in log and 'weight decay 0,' in log  # by the shapes before sharding
    assert_same_training(tmp_path, alone('segmentor'))


@fsdp
@pytest.mark.slow  # 20 seconds
def test_fsdp_resumes_to_the_same_losses_and_weights(folder, alone, tmp_path):
    config = folder / 'segmentor_fsdp.py'
    call_tool_in_processes(2, TRAIN, config, '--work-dir', tmp_path / 'straight')
    resume = ('--resume', tmp_path / 'straight' / 'iter_3.pth')
    options = (*resume, '--cfg-options', 'compile.backend=eager')
    log = call_tool_in_processes(2, TRAIN, config, '--work-dir', tmp_path / 'fsdp', *options)
    assert 'Model has been "compiled"' in log
    assert_same_training(tmp_path / 'fsdp', alone('segmentor'), iterations=range(4, 7))


@shards
def test_shards_are_read_by_any_number_of_processes_and_by_the_plain_model(folder, alone, tmp_path):
    config, straight = folder / 'classifier_sharded.py', tmp_path / 'straight'
    call_tool_in_processes(2, TRAIN, config, '--work-dir', straight)
    assert (straight / 'iter_6.pth').is_dir()

    # Every process has written about half.
    sizes = [path.stat().st_size for path in sorted((straight / 'iter_6.pth').glob('*.distcp'))]
    assert len(sizes) == 2 and 0.5 < sizes[0] / sizes[1] < 2

    one = ('--resume', straight / 'iter_3.pth', '--cfg-options', 'train_dataloader.batch_size=4')
    call_tool_in_processes(1, TRAIN, config, '--work-dir', tmp_path / 'one', *one)
    actual, expected = losses(tmp_path / 'one'), losses(straight)
    assert list(actual) == [4, 5, 6] and list(expected) == [1, 2, 3, 4, 5, 6]
    for iteration, loss in actual.items():
        assert loss == pytest.approx(expected[iteration], abs=1e-5)
    assert max(actual.values()) > 1  # there is something to compare
    actual, expected = (load_safely(path / 'iter_6.pth') for path in (tmp_path / 'one', straight))
    for name, tensor in expected['state_dict'].items():
        torch.testing.assert_close(actual['state_dict'][name], tensor, rtol=1e-4, atol=1e-5)

    # One file for those who know nothing of shards.
    said = call_tool(MERGE, straight / 'iter_6.pth', tmp_path / 'whole.pth')
    whole = weights(tmp_path / 'whole.pth')
    assert f'with {len(whole)} tensors' in said
    plain = weights(alone('classifier') / 'iter_6.pth')
    assert {key: x.shape for key, x in whole.items()} == {key: x.shape for key, x in plain.items()}
    assert 'exists' in call_tool(MERGE, straight / 'iter_6.pth', tmp_path / 'whole.pth', status=2)

    plain = (TRAIN, folder / 'classifier.py', '--work-dir', tmp_path / 'plain')
    rejected = call_tool(*plain, '--resume', straight / 'iter_3.pth', status=2)
    assert 'is from sharded training: resume it with its own config' in rejected
    options = (f'load_from={straight / "iter_6.pth"}', 'train_cfg.max_iters=1')
    call_tool(*plain, '--cfg-options', *options, 'train_dataloader.batch_size=4')


def check_full_disk(rank, folder):
    tensors = {WEIGHTS: {str(i): torch.full((100_000,), i) for i in range(4)}}
    save_shards(folder / '1', tensors, dict(meta='before'))
    if rank == 1:  # a limit on the size of files stands in for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match='is the disk full') as full:
        save_shards(folder / '2', tensors, {})
    assert full.value.errno is not None and full.value.filename == str(folder / '2')
    torch.distributed.barrier()
    assert [path.name for path in folder.iterdir()] == ['1']


@shards
def test_full_disk_stops_all_processes_and_leaves_the_shards_before(tmp_path):
    in_two_processes(partial(check_full_disk, folder=tmp_path))
    before = load_safely(tmp_path / '1')
    assert before['meta'] == 'before' and (before[WEIGHTS]['3'] == 3).all()


@pytest.mark.slow  # half a minute; `pip install 'deepspeed<0.17'` first
def test_deepspeed_trains_as_one_process_and_its_shards_become_a_plain_file(
    folder, alone, tmp_path
):
    pytest.importorskip('deepspeed')
    config = tmp_path / 'deepspeed.py'
    config.write_text(DEEPSPEED.format(config=folder / 'segmentor.py', configs=ROOT / 'configs'))
    call_tool_in_processes(2, TRAIN, config, '--work-dir', tmp_path / 'straight')
    resume = ('--resume', tmp_path / 'straight' / 'iter_3.pth')
    call_tool_in_processes(2, TRAIN, config, '--work-dir', tmp_path / 'resumed', *resume)

    expected = losses(alone('segmentor'))
    assert losses(tmp_path / 'straight') == pytest.approx(expected, abs=1e-5)
    after_resume = {iteration: expected[iteration] for iteration in (4, 5, 6)}
    assert losses(tmp_path / 'resumed') == pytest.approx(after_resume, abs=1e-5)
    call_tool(MERGE, tmp_path / 'resumed' / 'iter_6.pth', tmp_path / 'whole.pth')
    whole, plain = weights(tmp_path / 'whole.pth'), weights(alone('segmentor') / 'iter_6.pth')
    assert set(whole) == set(plain)
    for name, tensor in plain.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow  # 40 seconds
@pytest.mark.parametrize('name', ['segmentor', 'classifier'])
def test_dist_train_script_trains_as_one_process(folder, alone, tmp_path, name):
    subprocess.run(
        [ROOT / 'tools/dist_train.sh', folder / f'{name}.py', '2', '--work-dir', tmp_path],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHON': sys.executable},
        check=True,
        timeout=600,
    )
    assert_same_training(tmp_path, alone(name))


def test_accumulated_gradients_equal_the_large_batch(folder, alone, tmp_path):
    options = (
        *('train_dataloader.batch_size=2', 'optim_wrapper.accumulative_counts=2'),
        *('train_cfg.max_iters=12', 'default_hooks.checkpoint.interval=12'),
    )
    call_tool(*(TRAIN, folder / 'classifier.py', '--work-dir', tmp_path, '--cfg-options', *options))
    actual, expected = (
        weights(tmp_path / 'iter_12.pth'),
        weights(alone('classifier') / 'iter_6.pth'),
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_ema_weights_are_evaluated_and_saved(folder, tmp_path):
    """tools/test.py reads ``state_dict``, the average; ``ema_state_dict`` holds the other weights
    then, with which training goes on."""
    config = tmp_path / 'ema.py'
    config.write_text(EMA.format(config=folder / 'classifier.py', out=tmp_path))
    call_tool(TRAIN, config, '--work-dir', tmp_path)
    checkpoints = [
        torch.load(tmp_path / f'iter_{i}.pth', map_location='cpu', weights_only=False)
        for i in (1, 2, 3)
    ]
    key = 'backbone.layers.0.proj_up.weight'
    averages = [checkpoint['state_dict'][key] for checkpoint in checkpoints]
    trained = [checkpoint['ema_state_dict'][f'module.{key}'] for checkpoint in checkpoints]
    for before, new, after in zip(averages, trained[1:], averages[1:]):
        torch.testing.assert_close(after, 0.75 * before + 0.25 * new)
        assert (after - new).abs().max() > 1e-5

    def scores(path):
        return torch.stack([sample['pred_score'] for sample in pickle.loads(path.read_bytes())])

    evaluated = scores(tmp_path / 'val.pkl')
    call_tool(TEST, config, tmp_path / 'iter_3.pth', '--work-dir', tmp_path)
    torch.testing.assert_close(scores(tmp_path / 'test.pkl'), evaluated, rtol=1e-6, atol=1e-7)
    last = {
        name.removeprefix('module.'): x for name, x in checkpoints[-1]['ema_state_dict'].items()
    }
    del last['steps']
    torch.save(dict(state_dict=last), tmp_path / 'last.pth')
    call_tool(TEST, config, tmp_path / 'last.pth', '--work-dir', tmp_path)
    assert (scores(tmp_path / 'test.pkl') - evaluated).abs().max() > 1e-4
