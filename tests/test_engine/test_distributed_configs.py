# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What the shipped configs say about batches and strategies."""

from pathlib import Path

import pytest
from mmengine.config import Config

CONFIGS = Path(__file__).parents[2] / 'configs'
LEAVES = sorted(path for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts)


@pytest.mark.parametrize('path', LEAVES, ids=lambda path: path.stem)
def test_auto_scale_lr_knows_the_batch_of_the_recipe(path):
    """As many images as one GPU, or eight of them, take per step, which is what configs say."""
    cfg = Config.fromfile(path)
    if cfg.get('train_dataloader') is None:
        pytest.skip('only for evaluation')
    assert cfg.auto_scale_lr.enable is False
    batch, rest = divmod(cfg.auto_scale_lr.base_batch_size, cfg.train_dataloader.batch_size)
    assert rest == 0 and batch in (1, 8)


@pytest.mark.parametrize('strategy', ['fsdp', 'zero2'])
def test_strategies_keep_the_recipe(strategy):
    plain = Config.fromfile(CONFIGS / 'upernet_vil_b_ade20k.py')
    cfg = Config.fromfile(CONFIGS / f'upernet_vil_b_ade20k_{strategy}.py')
    assert cfg.runner_type == 'FlexibleRunner'
    for key in ('model', 'train_dataloader', 'param_scheduler', 'train_cfg', 'auto_scale_lr'):
        assert cfg[key] == plain[key]
    for key in ('constructor', 'optimizer', 'paramwise_cfg'):
        assert cfg.optim_wrapper[key] == plain.optim_wrapper[key]
