# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The planner: a batch that stays the recipe's."""

import json
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from tool_process import call_tool

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools' / 'analysis_tools' / 'plan.py'
sys.path.insert(0, str(SCRIPT.parent))

SMALL = [
    *('model.backbone.arch._delete_=True', 'model.backbone.arch.embed_dims=32'),
    'model.backbone.arch.depth=4',
]


@pytest.fixture(scope='module')
def plan():
    pytest.importorskip('mmseg')
    import plan

    return plan


@pytest.mark.parametrize(
    'total, gpus, largest, expected',
    [
        (16, 8, 9, (2, 1)),
        (16, 1, 9, (8, 2)),
        (16, 1, 7, (4, 4)),
        (12, 1, 5, (4, 3)),
        (16, 3, 9, None),
        (16, 1, 0, None),
    ],
)
def test_plan_splits_the_batch_over_gpus(plan, total, gpus, largest, expected):
    assert plan.share(total, gpus, largest) == expected


def test_plan_scales_settings_in_iterations(plan):
    cfg = Config.fromfile(ROOT / 'configs/upernet_vil_t_ade20k.py')
    cfg.merge_from_dict(plan.options_for(cfg, 4, 4))
    assert cfg.train_dataloader.batch_size == 4 and cfg.optim_wrapper.accumulative_counts == 4
    assert cfg.train_cfg.max_iters == 640000
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.begin, warm_up.end, cosine.begin, cosine.end) == (0, 6000, 6000, 640000)

    cfg.param_scheduler, cfg.default_hooks.checkpoint = cosine, None
    assert plan.options_for(cfg, 4, 2)['param_scheduler.end'] == 1280000

    epochs = Config.fromfile(ROOT / 'configs/vil_t_imagenet.py')
    assert plan.options_for(epochs, 128, 8) == {
        'train_dataloader.batch_size': 128,
        'optim_wrapper.accumulative_counts': 8,
    }


def test_plan_prints_options_that_keep_the_batch(plan, tmp_path):
    printed = call_tool(
        *(SCRIPT, ROOT / 'configs/vil_t_imagenet.py', '--gpu-memory', '1', '--gpus', '2'),
        *('--json', tmp_path / 'new/plan.json', '--images-per-second', '1000'),
        *('--cfg-options', *SMALL, 'model.head.in_channels=64'),
    )
    report = json.loads((tmp_path / 'new/plan.json').read_text())
    assert 2 * report['batch_per_gpu'] * report['accumulated'] == 1024
    assert report['batch_per_gpu'] <= report['largest_batch']
    assert f'train_dataloader.batch_size={report["batch_per_gpu"]}' in printed
    assert 'at best 2000.0 images/s' in printed


def test_plan_reports_impossible_plans(plan):
    with pytest.raises(plan.UserError, match='does not state the batch size'):
        plan.recipe_batch(Config(dict(auto_scale_lr=None)))
    config = ROOT / 'configs/vil_t_imagenet.py'
    options = ('--cfg-options', *SMALL, 'model.head.in_channels=64')
    said = call_tool(SCRIPT, config, '--gpu-memory', '1', '--gpus', '3', *options, status=2)
    assert '1024 does not divide into equal parts for 3 GPUs' in said
    said = call_tool(SCRIPT, config, '--gpu-memory', '1', '--shape', 1, 2, 3, status=2)
    assert '--shape takes height and width' in said
    if not torch.cuda.is_available():
        assert '--gpu-memory 24' in call_tool(SCRIPT, config, status=2)
