# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""TF32 settings of different versions of torch."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mmvil.ops.compat import is_exporting, tf32_is_allowed
from tests.conftest import ROOT

SETTINGS = """
import torch
from mmvil.ops.compat import is_exporting, tf32_is_allowed

matmul = torch.backends.cuda.matmul
assert not tf32_is_allowed()
matmul.allow_tf32 = True
assert tf32_is_allowed()
torch.set_float32_matmul_precision('highest')
assert not tf32_is_allowed()
if hasattr(torch.backends, 'fp32_precision'):
    matmul.fp32_precision = 'tf32'
    assert tf32_is_allowed()
    matmul.fp32_precision = 'ieee'
    assert not tf32_is_allowed()
    matmul.fp32_precision = 'none'  # what is set for all backends
    torch.backends.fp32_precision = 'tf32'
    assert tf32_is_allowed()
"""


def test_tf32_is_allowed_by_either_interface():
    """In a process of its own: torch refuses the old interface once the new one was used."""
    result = subprocess.run(
        [sys.executable, '-c', SETTINGS], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('allowed', [False, True])
def test_tf32_is_allowed_in_torch_without_the_newer_interface(monkeypatch, allowed):
    old = SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=allowed)))
    monkeypatch.setattr(torch, 'backends', old)
    assert tf32_is_allowed() is allowed


def test_compiling_is_not_exporting():
    """It is for torch.compiler.is_exporting() in torch 2.9."""

    @torch.compile(fullgraph=True, backend='eager')
    def function(x):
        return x + is_exporting()

    assert function(torch.zeros(1)) == 0
