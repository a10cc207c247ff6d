# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Predicted memory is within 10% of what a step takes."""

import copy
import itertools

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.optim import AmpOptimWrapper
from torch.profiler import ProfilerActivity, profile

from mmvil.apis.swap.probe import training_size
from mmvil.apis.training_memory import (
    TrainingMemory,
    _AllocationCounter,
    amp_dtype,
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


def test_operations_of_a_step_do_not_depend_on_the_batch(classifier, monkeypatch):
    counts = []
    count = _AllocationCounter.__torch_dispatch__

    def counted(*args, **kwargs):
        counts[-1] += 1
        return count(*args, **kwargs)

    monkeypatch.setattr(_AllocationCounter, '__torch_dispatch__', counted)
    memory = TrainingMemory(classifier)
    for batch in (64, 512):
        counts.append(0)
        memory.step(batch)
    # One image and one label each; tiles for a CPU's cache would be thousands.
    assert counts[1] - counts[0] < 10 * (512 - 64)


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


def test_training_memory_counts_what_the_layers_keep(classifier):
    cell = copy.deepcopy(classifier)
    cell.model.backbone.lean = 'cell'
    more = TrainingMemory(cell).per_image() - TrainingMemory(classifier).per_image()
    side = training_size(classifier)[0] // 16
    tokens, widths, float32 = side * side, 8 * 32, 4
    layers = 4 - 1  # at the peak, the last one has its cell's inputs in either case
    assert more == pytest.approx(tokens * layers * widths * float32, rel=0.02)


@pytest.mark.parametrize(
    'kind', [AmpOptimWrapper, 'mmengine.optim.AmpOptimWrapper', 'AmpOptimWrapper']
)
def test_amp_dtype_recognizes_the_wrapper_in_all_spellings(kind):
    def dtype(**options):
        return amp_dtype(Config(dict(optim_wrapper=dict(type=kind, **options))))

    assert dtype() == torch.float16
    assert dtype(dtype='bfloat16') == dtype(dtype=torch.bfloat16) == torch.bfloat16
    assert amp_dtype(Config(dict(optim_wrapper=dict(type='OptimWrapper')))) is None


@pytest.mark.parametrize('kind', [EMAHook, 'mmengine.hooks.EMAHook', 'EMAHook'])
def test_training_memory_knows_averaged_weights_in_all_spellings(classifier, kind):
    cfg = copy.deepcopy(classifier)
    cfg.custom_hooks = [dict(type=kind)]
    fixed_bytes = TrainingMemory(cfg).fixed_bytes
    assert fixed_bytes['averaged weights (EMA)'] == fixed_bytes['weights']


def test_training_memory_finds_the_largest_batch(segmentor):
    memory = TrainingMemory(segmentor)
    limit = memory.total(50)
    largest = memory.largest_batch(limit)
    assert memory.total(largest) <= limit < memory.total(largest + 1)


def test_optimizer_state_matches_the_optimizer(segmentor):
    assert optimizer_state(segmentor) == 2  # AdamW: both moments
    sgd = Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1))))
    assert optimizer_state(sgd) == 0
