# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

import test as test_tool  # noqa: E402
import train as train_tool  # noqa: E402


def apply(tool, monkeypatch, *arguments):
    config = ROOT / 'configs' / 'vil_t_imagenet.py'  # trains in bfloat16
    monkeypatch.setattr(sys, 'argv', ['tool', str(config), *arguments])
    args = tool.parse_args(tool.add_arguments(tool.make_parser('')))
    cfg = Config.fromfile(config)
    tool.apply_args(cfg, args)
    return cfg


@pytest.mark.parametrize(
    'arguments, dtype',
    [
        ([], 'bfloat16'),
        (['--amp'], 'bfloat16'),
        (['--precision', 'bfloat16'], 'bfloat16'),
        (['--precision', 'float16'], 'float16'),
        (['--precision', 'float32'], None),
    ],
)
def test_train_in_the_precision_asked_for(monkeypatch, arguments, dtype):
    wrapper = apply(train_tool, monkeypatch, *arguments).optim_wrapper
    assert wrapper.get('dtype') == dtype
    assert ('Amp' in wrapper.type) == (dtype is not None)


@pytest.mark.parametrize(
    'arguments, half',
    [([], False), (['--precision', 'bfloat16'], True), (['--amp'], True)],
)
def test_test_in_the_precision_asked_for(monkeypatch, arguments, half):
    asked = []
    monkeypatch.setattr(test_tool.torch, 'set_autocast_gpu_dtype', asked.append)
    cfg = apply(test_tool, monkeypatch, 'checkpoint.pth', *arguments)
    assert cfg.test_cfg.get('fp16', False) is half
    dtype = test_tool.torch.bfloat16 if '--precision' in arguments else test_tool.torch.float16
    assert asked == [dtype] * half
