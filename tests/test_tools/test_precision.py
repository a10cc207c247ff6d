# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import sys
from pathlib import Path

import pytest

from mmvil.cli.main import parse_args

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

import test as test_tool  # noqa: E402
import train as train_tool  # noqa: E402


def read(tool, make_parser, *arguments):
    config = ROOT / 'configs' / 'vil_t_imagenet.py'  # trains in bfloat16
    return tool.read_config(parse_args(make_parser(), [str(config), *arguments]))


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
def test_train_in_the_precision_asked_for(arguments, dtype):
    wrapper = read(train_tool, train_tool.make_train_parser, *arguments).optim_wrapper
    assert wrapper.get('dtype') == dtype
    assert ('Amp' in wrapper.type) == (dtype is not None)


@pytest.mark.parametrize(
    'arguments, half',
    [([], False), (['--precision', 'bfloat16'], True), (['--amp'], True)],
)
def test_test_in_the_precision_asked_for(monkeypatch, arguments, half):
    asked = []
    monkeypatch.setattr(test_tool.torch, 'set_autocast_gpu_dtype', asked.append)
    cfg = read(test_tool, test_tool.make_test_parser, 'checkpoint.pth', *arguments)
    assert cfg.test_cfg.get('fp16', False) is half
    dtype = test_tool.torch.bfloat16 if '--precision' in arguments else test_tool.torch.float16
    assert asked == [dtype] * half
