# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Predicted memory is within 10% of what a step takes."""

import itertools

import pytest
from mmengine.config import Config
from torch.profiler import ProfilerActivity, profile

from mmvil.apis.training_memory import (
    TrainingMemory,
    build_training_model,
    optimizer_state,
    train_step,
)
from tests.conftest import ROOT


def small_config(name, **backbone):
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.model.backbone.update(arch=dict(embed_dims=32, depth=4), **backbone)
    return cfg


@pytest.fixture(scope='module')
def segmentor():
    pytest.importorskip('mmseg')
    cfg = small_config('upernet_vil_t_demo', out_indices=(0, 1, 2, 3))
    cfg.model.decode_head.update(in_channels=[32] * 4, channels=32)
    cfg.model.auxiliary_head.update(in_channels=32, channels=32)
    return cfg


@pytest.fixture(scope='module')
def classifier():
    pytest.importorskip('mmpretrain')
    cfg = small_config('vil_t_imagenet')
    cfg.model.head.in_channels = 64
    cfg.optim_wrapper.type = 'OptimWrapper'  # float32, as it is measured
    return cfg


@pytest.mark.parametrize(
    'name, accumulates', [('segmentor', False), ('segmentor', True), ('classifier', False)]
)
def test_training_memory_predicts_the_peak_of_a_step_within_ten_percent(
    request, name, accumulates, monkeypatch
):
    # Copies of a tile, which the cell makes on a CPU alone, outweigh a model as small as this.
    monkeypatch.setattr('mmvil.ops.chunkwise.SEQUENCE_TILE_BYTES', 1)
    cfg, batch = request.getfixturevalue(name), 8
    memory = TrainingMemory(cfg)
    memory.accumulates = accumulates
    predicted = memory.step(batch)

    model = build_training_model(cfg)
    train_step(model, cfg, batch, 'cpu')  # what is set up once
    kept = sum(p.nbytes for p in model.parameters()) if accumulates else 0
    if not accumulates:
        model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(model, cfg, batch, 'cpu')
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    measured = kept + max(itertools.accumulate(event.nbytes() for event in events))
    assert predicted == pytest.approx(measured, rel=0.1)


def test_training_memory_finds_the_largest_batch(segmentor):
    memory = TrainingMemory(segmentor)
    limit = memory.total(50)
    largest = memory.largest_batch(limit)
    assert memory.total(largest) <= limit < memory.total(largest + 1)


def test_optimizer_state_matches_the_optimizer(segmentor):
    assert optimizer_state(segmentor) == 2  # AdamW: both moments
    sgd = Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1))))
    assert optimizer_state(sgd) == 0
