# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Configs dumped by version 0.1.0, before modules moved, still name what exists.

Users resume and test with the config that a run dumped, so its dotted names have to stay.
"""

import gzip
import importlib
import json
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.fileio import get_file_backend
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, STRATEGIES, VISUALIZERS, init_default_scope
from mmengine.utils import get_object_from_string

import mmvil
from mmvil.checkpoints import find_official
from tests.conftest import ROOT

DUMPED = json.loads(gzip.decompress((ROOT / 'tests/data/dumped_configs.json.gz').read_bytes()))


@pytest.fixture(params=DUMPED)
def cfg(request):
    cfg = Config(DUMPED[request.param])
    pytest.importorskip(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    return cfg


def strings(node):
    """Strings inside a config."""
    if isinstance(node, str):
        return {node}
    node = node.values() if isinstance(node, dict) else node
    return set().union(*map(strings, node)) if hasattr(node, '__iter__') else set()


def test_dumped_config_builds_model_and_optimizer(cfg):
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    if 'optim_wrapper' in cfg:
        keys = ('optimizer', 'constructor', 'paramwise_cfg')
        wrapper = {key: cfg.optim_wrapper[key] for key in keys if key in cfg.optim_wrapper}
        # Mixed precision needs a GPU, DeepSpeed's wrapper an engine.
        groups = build_optim_wrapper(model, dict(type='OptimWrapper', **wrapper))
        parameters = {p for group in groups.optimizer.param_groups for p in group['params']}
        assert parameters == set(model.parameters())


def test_dumped_config_builds_hooks_metrics_and_visualizer(cfg, request, tmp_path):
    VISUALIZERS.build(dict(cfg.visualizer, name=request.node.name, save_dir=str(tmp_path)))
    for hook in [*cfg.default_hooks.values(), *cfg.get('custom_hooks', [])]:
        HOOKS.build(hook)
    for name in ('val_evaluator', 'test_evaluator'):
        if cfg.get(name):
            assert Evaluator(cfg[name]).metrics
    if 'strategy' in cfg:
        assert STRATEGIES.get(cfg.strategy.type)
    backend_args = cfg.default_hooks.checkpoint.get('backend_args')
    assert get_file_backend(str(tmp_path), backend_args=backend_args)


def test_every_name_of_mmvil_in_dumped_configs_resolves():
    names = {name for name in strings(DUMPED) if name.startswith('mmvil')}
    assert len(names) > 10
    for name in names:
        if name.startswith('mmvil://'):
            assert find_official(name)
        elif name != 'mmvil_atomic':  # a file backend, built above
            assert get_object_from_string(name) is not None, name


def test_converters_has_its_old_names_and_warns():
    sys.modules.pop('mmvil.converters', None)
    with pytest.warns(DeprecationWarning, match='mmvil.checkpoints'):
        converters = importlib.import_module('mmvil.converters')
    assert converters.vil_to_mmvil is mmvil.checkpoints.vil_to_mmvil
    names = (
        'OFFICIAL_CHECKPOINTS OFFICIAL_URL OfficialCheckpoint adapt_input_channels find_official '
        'infer_architecture is_official official_names vil_to_mmvil'
    )
    assert set(names.split()) <= set(dir(converters))
