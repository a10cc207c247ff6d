# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The mLSTM for exporters against the paper's loop."""

import pytest
import torch

from mmvil.ops import mlstm_reference
from mmvil.ops.mlstm_export import mlstm_traceable
from tests.conftest import relative_error


def make_inputs(tokens, gate_scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, 2, 4, tokens, 8, generator=generator, dtype=dtype)
    gates = gate_scale * torch.randn(2, 2, 4, tokens, generator=generator, dtype=dtype)
    return q, k, v, gates[0], gates[1] + 3


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'backward'])
@pytest.mark.parametrize('tokens', [1, 15, 16, 17, 100])
@pytest.mark.parametrize('gate_scale', [1, 20])
def test_traceable_agrees_with_the_loop(tokens, reverse, gate_scale):
    inputs = make_inputs(tokens, gate_scale)
    h, _ = mlstm_traceable(*inputs, reverse, chunk_size=16)
    assert relative_error(h, mlstm_reference(*inputs, reverse)) < 1e-10


def test_traceable_returns_what_the_operator_returns():
    inputs = make_inputs(70)
    expected = torch.ops.mmvil.mlstm(*inputs, True, 32)
    for actual, wanted in zip(mlstm_traceable(*inputs, True, 32), expected):
        assert actual.dtype == wanted.dtype
        torch.testing.assert_close(actual, wanted)


def test_traced_keeps_the_digits_of_float64():
    inputs = make_inputs(40)
    traced = torch.jit.trace(lambda *x: mlstm_traceable(*x, False, 16)[0], inputs)
    assert relative_error(traced(*inputs), mlstm_reference(*inputs)) < 1e-13


def test_traceable_computes_half_precision_in_float32():
    inputs = make_inputs(40)
    q, k, v = (x.bfloat16() for x in inputs[:3])
    h, _ = mlstm_traceable(q, k, v, *inputs[3:], False, 16)
    expected = mlstm_reference(q.double(), k.double(), v.double(), *inputs[3:])
    assert h.dtype == torch.bfloat16
    assert relative_error(h, expected) < 3e-3  # the rounding of the result


@pytest.mark.parametrize('gate_dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('gates', [(-1e4, 3), (1e4, 3), (0, -1e4), (-1e4, -1e4)])
def test_traceable_has_gradients_at_extreme_gates(gates, gate_dtype, dtype):
    inputs = make_inputs(40)
    igate, fgate = (x + offset for x, offset in zip(inputs[3:], gates))
    inputs = [x.to(dtype).requires_grad_() for x in (*inputs[:3], igate, fgate)]
    weight = make_inputs(41)[0][..., 1:, :].to(dtype)
    h = mlstm_traceable(*inputs, False, 16, gate_dtype)[0]
    actual = torch.autograd.grad((h * weight).sum(), inputs)
    if gate_dtype == dtype == torch.float64:
        h = mlstm_reference(*inputs, False)
        wanted = torch.autograd.grad((h * weight).sum(), inputs)
        for each, expected in zip(actual, wanted):
            # Without a lower limit, some denominators are tiny, and rounding errors are large.
            assert relative_error(each, expected) < 1e-8
    assert all(x.isfinite().all() for x in actual)


def test_traceable_has_second_derivatives():
    q, k, v, igate, fgate = make_inputs(3)
    inputs = (q[..., :2], k[..., :2], v[..., :2], igate, fgate)
    inputs = [x[:1, :1].clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(lambda *x: mlstm_traceable(*x, False, 2)[0], inputs)
