# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Trainings that go wrong stop before a checkpoint holds the damage, and name the images."""

import itertools

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from mmvil.engine import CPUAmpOptimWrapper, NaNGuardHook

_NAMES = itertools.count()


class Model(BaseModel):
    """Its loss is the input times the weight, so a bad input makes a bad loss."""

    def __init__(self, gradient_of=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.gradient_of = gradient_of  # this input's loss is fine, its gradient is not

    def forward(self, inputs, data_samples, mode):
        loss = (torch.stack(inputs) * self.weight).mean()
        if self.gradient_of is not None and bool(torch.stack(inputs)[0] == self.gradient_of):
            loss = loss + torch.sqrt(self.weight - self.weight.detach()).sum()
        return dict(loss=loss)


def train(work_dir, inputs, model=None, wrapper='OptimWrapper', **options):
    """Train on one input per iteration, with a checkpoint every second one."""
    dataset = [
        dict(
            inputs=torch.tensor([value]),
            data_samples=BaseDataElement(metainfo=dict(img_path=f'{i}.jpg')),
        )
        for i, value in enumerate(inputs)
    ]
    runner = Runner(
        model or Model(),
        str(work_dir),
        train_dataloader=dict(
            batch_size=1, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        train_cfg=dict(by_epoch=False, max_iters=len(inputs)),
        optim_wrapper=dict(type=wrapper, optimizer=dict(type='SGD', lr=1e-3), **options),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2)),
        custom_hooks=[dict(type=NaNGuardHook)],
        experiment_name=f'nan_guard_{next(_NAMES)}',
        default_scope='mmengine',
        log_level='WARNING',
    )
    runner.train()
    return runner


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_guard_stops_at_a_bad_loss_and_names_the_files(tmp_path, bad):
    with pytest.raises(FloatingPointError) as stop:
        train(tmp_path, [1.0, 2.0, 3.0, bad, 5.0, 6.0])
    assert f'the loss is {bad} in iteration 4' in str(stop.value)
    assert 'its batch: 3.jpg. of the batch before: 2.jpg.' in str(stop.value)
    assert [path.name for path in tmp_path.glob('*.pth')] == ['iter_2.pth']


def test_guard_does_not_save_bad_weights(tmp_path):
    with pytest.raises(FloatingPointError, match='1 of 1 weights are not finite after iteration 2'):
        train(tmp_path, [1.0, 2.0, 3.0], model=Model(gradient_of=2.0))
    assert not list(tmp_path.glob('*.pth'))


def test_guard_lets_good_training_pass(tmp_path):
    train(tmp_path, [1.0, 2.0, 3.0, 4.0])
    assert len(list(tmp_path.glob('*.pth'))) == 2


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='no loss scaling on the CPU')
def test_guard_reports_skipped_steps_of_float16(tmp_path, caplog):
    inputs = [1.0, 2.0, 3.0, 4.0]
    runner = train(
        # The loss scale is so large that the gradient of 2.0 and 4.0 overflows in float32.
        *(tmp_path, inputs),
        wrapper=CPUAmpOptimWrapper,
        loss_scale=2.0**127,
    )
    scale = runner.message_hub.get_scalar('train/amp_scale').data[0].tolist()
    skips = runner.message_hub.get_scalar('train/amp_skips').data[0].tolist()
    assert scale == [2.0**127, 2.0**126, 2.0**126, 2.0**125]
    assert skips == [0, 1, 1, 2]


def test_cpu_amp_rejects_other_dtypes():
    with pytest.raises(ValueError, match="must be 'float16' or 'bfloat16', but is 'float8'"):
        CPUAmpOptimWrapper(dtype='float8', optimizer=None)
