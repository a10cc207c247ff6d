"""Block-diagonal maps and token convolutions against plain definitions and autograd."""

import pytest
import torch
import torch.nn.functional as F

from mmvil.ops.layout import split_heads
from mmvil.ops.projections import (
    ROW_TILE,
    GateWeights,
    dense_blocks,
    diagonal_blocks,
    fold_gates,
    fold_gates_backward,
    gate_preactivations,
    gate_preactivations_backward,
    headwise_linear,
    headwise_linear_backward,
    token_conv,
    token_conv_backward,
)


@pytest.mark.parametrize('tokens', [7, ROW_TILE])
@pytest.mark.parametrize('head_width', [8, 12, 96])
def test_headwise_linear_equals_dense_product(head_width, tokens):
    heads, blocks = 2, 2 * head_width // 4
    x = torch.randn(3, tokens, heads * head_width, dtype=torch.float64)
    weight, bias = torch.randn(blocks, 4, 4).double(), torch.randn(heads * head_width).double()
    expected = F.linear(x, torch.block_diag(*weight), bias)
    dense = dense_blocks(weight, head_width)
    torch.testing.assert_close(headwise_linear(x, dense, bias), expected)
    with torch.no_grad():  # written in place
        torch.testing.assert_close(headwise_linear(x, dense, bias), expected)
    assert split_heads(expected, heads).shape == (3, heads, tokens, head_width)


def test_diagonal_blocks_undoes_dense_blocks():
    weight = torch.randn(24, 4, 4)
    assert torch.equal(diagonal_blocks(dense_blocks(weight, 48), 4), weight)


@pytest.mark.parametrize('tokens', [5, ROW_TILE])
def test_headwise_linear_backward_equals_autograd(tokens):
    x = torch.randn(2, tokens, 32, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(2, 16, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(32, dtype=torch.float64, requires_grad=True)
    y = headwise_linear(x, dense, bias)
    y_grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, dense, bias), y_grad)
    x_grad = torch.ones_like(x)  # is added to
    with torch.no_grad():
        actual = headwise_linear_backward(y_grad, x, dense, True, x_grad)
    for got, value in zip((x_grad - 1, *actual), expected):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize('with_bias', [True, False])
def test_gates_equal_linear_maps_of_q_k_and_v(with_bias):
    def make(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    heads, width = 2, 16
    c, x, weights = make(3, 5, width), make(3, 5, width), make(3, width // 4, 4, 4)
    gates, bias = make(2 * heads, 3 * width), make(2 * heads)
    biases = make(3, width) if with_bias else None
    inputs = [c, x, gates, bias, weights] + ([biases] if with_bias else [])
    qkv = [
        F.linear(tokens, torch.block_diag(*weight), biases[i] if with_bias else None)
        for i, (tokens, weight) in enumerate(zip((c, c, x), weights))
    ]
    expected = F.linear(torch.cat(qkv, -1), gates, bias).transpose(1, 2)  # (B, 2 NH, N)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, grad)

    with torch.no_grad():
        dense = dense_blocks(weights.flatten(0, 1), width // heads)
        folded = fold_gates(gates, bias, dense, biases)
        actual = torch.cat(gate_preactivations(c, x, folded), 1)
        c_grad, x_grad = torch.ones_like(c), torch.ones_like(x)  # are added to
        flat_grad = grad.transpose(1, 2).flatten(0, 1)
        folded_grads = GateWeights(
            gate_preactivations_backward(flat_grad, c, folded.c, c_grad),
            gate_preactivations_backward(flat_grad, x, folded.x, x_grad),
            flat_grad.sum(0),
        )
        gates_grad, dense_grad, biases_grad = fold_gates_backward(
            folded_grads, gates, dense, biases
        )
        weights_grad = diagonal_blocks(dense_grad, 4).view_as(weights)
    torch.testing.assert_close(actual, expected)
    actual_grads = [c_grad - 1, x_grad - 1, gates_grad, folded_grads.bias, weights_grad]
    for got, value in zip(actual_grads + ([biases_grad] if with_bias else []), expected_grads):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize('grid', [(1, 1), (3, 5), (4, 2)])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('shape', [(8, 1, 3, 3), (8, 1, 4)], ids=['grid', 'causal'])
def test_token_conv_backward_equals_autograd(shape, reverse, grid):
    x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    y = token_conv(x, weight, bias, grid, reverse)
    y_grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, weight, bias), y_grad)
    actual = token_conv_backward(y_grad, x, weight, True, grid, reverse)
    for got, value in zip(actual, expected):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize('shape', [(8, 1, 3, 3), (8, 1, 4)], ids=['grid', 'causal'])
def test_token_conv_reverse_equals_flipping_the_sequence(shape):
    x, weight, bias = torch.randn(2, 15, 8), torch.randn(shape), torch.randn(8)
    expected = token_conv(x.flip(1), weight, bias, (3, 5), False).flip(1)
    torch.testing.assert_close(token_conv(x, weight, bias, (3, 5), True), expected)


def test_token_conv_causal_does_not_look_ahead():
    x, weight, bias = torch.randn(1, 9, 8), torch.randn(8, 1, 4), torch.randn(8)
    changed = x.clone()
    changed[:, 5:] += 1
    before, after = (token_conv(y, weight, bias, (3, 3), False) for y in (x, changed))
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
