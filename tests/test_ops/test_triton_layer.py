"""The kernels before and after the cell against PyTorch in float64, and their use of a GPU.

On a GPU the comparisons run there. Without one, `test_triton_mlstm.py` runs them in a process in
which Triton interprets its kernels.
"""

import re
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmvil.layers import ViLBlock
from mmvil.ops.layout import contiguous
from mmvil.ops.projections import token_conv
from mmvil.ops.triton import is_interpreted, triton_problem, unavailable_reason
from tests.conftest import relative_error

DEVICE = torch.device('cuda' if torch.cuda.is_available() and not is_interpreted() else 'cpu')
PROBLEM = unavailable_reason(DEVICE, torch.float32, 8)
if triton_problem():
    pytest.skip(triton_problem(), allow_module_level=True)

pytest.importorskip('hypothesis')
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from hypothesis import Phase, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from mmvil.ops.triton import mlstm_launch as mlstm  # noqa: E402
from mmvil.ops.triton import self_test  # noqa: E402
from mmvil.ops.triton.conv_qkv_gates import BeforeCellWeights, before_cell  # noqa: E402
from mmvil.ops.triton.conv_qkv_gates_backward import (  # noqa: E402
    _gates_grad,
    before_cell_backward,
    split_gradients,
)
from mmvil.ops.triton.layer_norm import layer_norm, layer_norm_backward  # noqa: E402
from mmvil.ops.triton.norm_skip_gate import after_cell, after_cell_backward  # noqa: E402
from mmvil.ops.triton.reduction import (  # noqa: E402
    add_partial_sums,
    convert_and_sum,
    split_tokens,
)

pytestmark = pytest.mark.triton


def runs_kernels(test):
    """Mark a comparison that runs on a GPU or in the interpreter."""
    reason = 'without a GPU, test_triton_mlstm.py runs this in the interpreter'
    return pytest.mark.gpu(pytest.mark.skipif(PROBLEM is not None, reason=reason)(test))


TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
if DEVICE.type == 'cuda':
    TOLERANCE[torch.float32] = 1e-5  # products in three passes of tf32


OPERATORS = {
    'layer_norm',
    'layer_norm_backward',
    'before_cell',
    'projections_backward',
    'convolution_backward',
    'after_cell',
    'after_cell_backward',
    'convert_and_sum',
    'add_partial_sums',
}
"""Names of kernels of this file, without the ending."""


class Case(NamedTuple):
    heads: int
    width: int
    grid: tuple[int, int]
    batch: int = 2
    version: int = 2
    reverse: bool = False
    bias: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self):
        names = [f'{self.heads}x{self.width}', '{}x{}'.format(*self.grid), f'v{self.version}']
        names += ['reverse'] * self.reverse + ['plain'] * (not self.bias)
        return '-'.join([*names, str(self.dtype)[6:]])


CASES = [
    Case(1, 20, (5, 9)),  # several tiles of tokens, which images share
    Case(2, 40, (3, 5), batch=1, reverse=True),  # a head in several tiles
    Case(2, 12, (1, 1), batch=1, version=1, bias=False),  # one token
    Case(1, 24, (1, 6), version=1, reverse=True),
    Case(5, 8, (2, 2), reverse=True, bias=False),  # more gates than 8
    Case(2, 16, (4, 5), dtype=torch.bfloat16),
    Case(1, 8, (4, 3), version=1, dtype=torch.float16),
]
LARGE_CASES = [
    Case(4, width, grid, batch=3, reverse=reverse, version=version, dtype=dtype)
    for width, grid in ((96, (14, 14)), (192, (32, 33)), (384, (14, 15)))
    for version, reverse in ((2, False), (2, True), (1, True))
    for dtype in TOLERANCE
]
cases = pytest.mark.parametrize(
    'case', CASES + LARGE_CASES * (DEVICE.type == 'cuda' and not is_interpreted()), ids=str
)


def randn(*shape):
    return torch.randn(*shape, device=DEVICE)


def before_cell_inputs(case):
    """x as half of an up-projection's output, and all weights in float32."""
    torch.manual_seed(0)
    channels = case.heads * case.width
    up = randn(case.batch, case.grid[0] * case.grid[1], 2 * channels).to(case.dtype)

    def bias(size):
        return randn(size) if case.bias else None

    weights = [randn(channels, 1, 3, 3) if case.version == 2 else randn(channels, 1, 4)]
    weights += [bias(channels)]
    for _ in range(3):
        weights += [randn(channels // 4, 4, 4), bias(channels)]
    for _ in range(2):
        weights += [randn(case.heads, 3 * channels) / channels**0.5, randn(case.heads)]
    return up[..., :channels], BeforeCellWeights(*weights)


def for_kernels(weights):
    """The weights with that of the convolution in the memory layout of tokens."""
    return weights._replace(conv_weight=weights.conv_weight.movedim(0, -1))


def plain_before_cell(x, w, case):
    """The equations, for autograd."""
    a = token_conv(x, w.conv_weight, w.conv_bias, case.grid, case.reverse)
    c = F.silu(a)
    qkv = [
        F.linear(y, torch.block_diag(*weight), bias)
        for y, weight, bias in (
            (c, w.q_weight, w.q_bias),
            (c, w.k_weight, w.k_bias),
            (x, w.v_weight, w.v_bias),
        )
    ]
    gates = [
        F.linear(torch.cat(qkv, -1), weight, bias).transpose(1, 2)
        for weight, bias in ((w.igate_weight, w.igate_bias), (w.fgate_weight, w.fgate_bias))
    ]
    heads = [y.unflatten(2, (case.heads, -1)).transpose(1, 2) for y in qkv]
    return dict(zip(('a', 'c', 'q', 'k', 'v', 'igate', 'fgate'), (a, c, *heads, *gates)))


def doubles(tensors):
    return [None if x is None else x.double().requires_grad_() for x in tensors]


def assert_close(actual, expected, case):
    for name, value in expected.items():
        error = relative_error(actual[name].detach(), value.detach())
        assert error < TOLERANCE[case.dtype], f'{name}: relative error {error:.1e}'


@runs_kernels
@cases
def test_before_cell_equals_pytorch(case):
    x, weights = before_cell_inputs(case)
    args = (for_kernels(weights), case.grid, case.heads, case.reverse)
    a, q, k, v, gates = before_cell(x, *args)
    again = before_cell(x, *args, with_gates=False)
    for first, second in zip((a, q, k, v), again):
        assert torch.equal(first, second) and first.dtype == case.dtype
    assert gates.dtype == torch.float32 and not again[4].numel()

    x64, *weights64 = doubles([x, *weights])
    expected = plain_before_cell(x64, BeforeCellWeights(*weights64), case)
    actual = dict(a=a, q=q, k=k, v=v, igate=gates[0], fgate=gates[1])
    assert_close(actual, {name: expected[name] for name in actual}, case)

    # Gradients as they come from the cell, with strides of their own, and from the skip.
    seeds = {
        name: torch.randn_like(y).to(y.dtype if 'gate' in name else case.dtype)
        for name, y in ((name, actual.get(name, a)) for name in ('q', 'k', 'v'))
    }
    seeds['v'] = seeds['v'].contiguous()
    seeds.update(igate=randn(*gates[0].shape), fgate=randn(*gates[0].shape))
    seeds['c'] = torch.randn_like(a)
    leaves = {'x': x64, **dict(zip(weights._fields, weights64))}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    expected = torch.autograd.grad(
        [expected[name] for name in seeds], leaves.values(), [y.double() for y in seeds.values()]
    )
    up_grad = x.new_full((*x.shape[:2], 2 * x.shape[2]), float('nan'))
    sums = before_cell_backward(
        *seeds.values(), a, x, args[0], case.grid, case.reverse, up_grad.chunk(2, -1)[0]
    ).sum(0)
    x_grad, rest = up_grad.chunk(2, -1)
    assert rest.isnan().all()
    x_grad_sum, actual = sums[-x.shape[2] :], split_gradients(sums, weights)._asdict()
    assert {name for name, grad in actual.items() if grad is None} == (
        {name for name, weight in weights._asdict().items() if weight is None}
    )
    expected = dict(zip(leaves, expected))
    expected['sum'] = expected['x'].sum((0, 1))
    assert_close({'x': x_grad, 'sum': x_grad_sum, **actual}, expected, case)


@runs_kernels
@cases
def test_after_cell_equals_pytorch(case):
    torch.manual_seed(0)
    tokens, channels = case.grid[0] * case.grid[1], case.heads * case.width
    z = randn(case.batch, tokens, 2 * channels).to(case.dtype).chunk(2, -1)[1]
    a, y_grad = (randn(*z.shape).to(case.dtype) for _ in range(2))
    h = 3 + randn(case.batch, case.heads, tokens, case.width)
    h = (h if case.reverse else h.transpose(1, 2).contiguous().transpose(1, 2)).to(case.dtype)
    weight, skip = randn(channels), randn(channels)
    bias = randn(channels) if case.bias else None

    inputs = dict(zip(('h', 'z', 'weight', 'bias', 'skip'), doubles([h, z, weight, bias, skip])))
    h64, z64, *parameters = inputs.values()
    (a64,) = doubles([a])
    c64 = F.silu(a64)
    normed = F.group_norm(
        h64.transpose(1, 2).flatten(2).flatten(0, 1), case.heads, *parameters[:2], eps=1e-3
    )
    expected = (normed.view(z64.shape) + parameters[2] * c64) * F.silu(z64)

    args = (h, a, z, weight, bias, skip, 1e-3)
    y = after_cell(*args)
    assert_close(dict(y=y), dict(y=expected), case)
    again, h_grad, delta, c_grad, up_grad, sums = after_cell_backward(y_grad, *args)
    assert_close(dict(again=again), dict(again=expected), case)
    products = h.double() * h_grad.double()  # a norm's gradient makes their sum almost zero
    assert delta.dtype == torch.float32 and delta.shape == h.shape[:3]
    assert (delta - products.sum(-1)).abs().max() < 1e-5 * products.abs().sum(-1).max()
    actual = dict(h=h_grad, c=c_grad, z=up_grad.chunk(2, -1)[1])
    actual.update(zip(('sum', 'weight', 'bias', 'skip'), sums.sum(0).view(4, channels)))
    leaves = {name: leaf for name, leaf in inputs.items() if leaf is not None}
    leaves['c'] = c64
    grads = torch.autograd.grad(expected, leaves.values(), y_grad.double())
    grads = dict(zip(leaves, grads))
    assert_close(actual, {**grads, 'sum': grads['z'].sum((0, 1))}, case)


@runs_kernels
@cases
def test_layer_norm_equals_pytorch(case):
    """From the residual stream in float32 or in the dtype of features."""
    torch.manual_seed(0)
    stream = torch.float32 if case.reverse else case.dtype
    x = 3 + randn(case.batch, case.grid[0] * case.grid[1], case.width).to(stream)
    weight, bias = randn(case.width), randn(case.width) if case.bias else None
    leaves = dict(zip(('x', 'weight', 'bias'), doubles([x, weight, bias])))
    expected = F.layer_norm(leaves['x'], x.shape[2:], leaves['weight'], leaves['bias'], 1e-3)
    y = layer_norm(x, weight, bias, 1e-3, case.dtype)
    y_grad, residual_grad = torch.randn_like(y), torch.randn_like(x)
    again, x_grad, sums = layer_norm_backward(y_grad, x, weight, bias, 1e-3)
    _, x_grads, _ = layer_norm_backward(y_grad, x, weight, bias, 1e-3, residual_grad)
    assert y.dtype == again.dtype == case.dtype and x_grad.dtype == x_grads.dtype == stream
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = dict(
        zip(leaves, torch.autograd.grad(expected, leaves.values(), y_grad.double())),
        y=expected,
        again=expected,
    )
    grads['both'] = grads['x'] + residual_grad.double()
    weight_grad, bias_grad = sums.sum(0).view(2, -1)
    actual = dict(y=y, again=again, x=x_grad, both=x_grads, weight=weight_grad, bias=bias_grad)
    assert_close(actual, grads, case)


LAYOUTS = {
    'contiguous': lambda x: x,
    'dimensions in reverse': lambda x: (
        x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])
    ),
    'every second channel': lambda x: torch.stack([x, x * float('nan')], -1)[..., 0],
    'part of a larger one': lambda x: F.pad(x, (3, 5) * x.dim(), value=float('nan'))[
        tuple(slice(3, -5) for _ in x.shape)
    ],
    'expanded': lambda x: x[:1].expand(x.shape),
}
INPUTS = 21
"""Most tensors that an operator and its backward pass take."""


@runs_kernels
@settings(  # the interpreter takes seconds for an example
    max_examples=1,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)
@given(
    batch=st.sampled_from([1, 2]),
    version=st.sampled_from([1, 2]),
    layouts=st.lists(st.sampled_from(list(LAYOUTS)), min_size=INPUTS, max_size=INPUTS),
)
@example(batch=1, version=2, layouts=['every second channel'] * INPUTS)
@pytest.mark.parametrize('operator', ['before_cell', 'after_cell', 'mlstm'])
def test_operators_accept_any_layout(operator, batch, version, layouts):
    """The same results as from contiguous tensors with the same values."""
    case = Case(2, 8, (2, 3), batch=batch, version=version)
    x, weights = before_cell_inputs(case)
    by_head = [randn(batch, 2, 6, 8) for _ in range(5)]
    gates = [randn(batch, 2, 6) for _ in range(3)]
    tokens, parameters = [randn(*x.shape) for _ in range(3)], [randn(16) for _ in range(3)]

    def run_before_cell(x, a, c_grad, q_grad, k_grad, v_grad, igate_grad, fgate_grad, *weights):
        settings = (for_kernels(BeforeCellWeights(*weights)), case.grid)
        x_grad = torch.empty(batch, 6, 20, device=DEVICE)[..., :16]
        grads = (q_grad, k_grad, v_grad, igate_grad, fgate_grad, c_grad)
        return [
            *before_cell(x, *settings, 2, False),
            before_cell_backward(*grads, a, x, *settings, False, x_grad).sum(0),
            x_grad,
        ]

    def run_after_cell(y_grad, a, z, h, weight, bias, skip):
        args = (h, a, z, weight, bias, skip, 1e-5)
        y, h_grad, _, c_grad, up_grad, sums = after_cell_backward(y_grad, *args)
        return [after_cell(*args), y, h_grad, c_grad, up_grad[..., 16:], sums.sum(0)]

    def run_mlstm(h_grad, q, k, v, h, igate, fgate, normalizer):
        inputs, reverse = (q, k, v, igate, fgate), case.version == 1
        return [
            *mlstm.mlstm_forward(*inputs, reverse),
            *mlstm.mlstm_backward(h_grad, *inputs, h, normalizer, reverse),
        ]

    run, inputs = {
        'before_cell': (run_before_cell, [x, *tokens[:2], *by_head[:3], *gates[:2], *weights]),
        'after_cell': (run_after_cell, [*tokens, by_head[0], *parameters]),
        'mlstm': (run_mlstm, by_head + gates),
    }[operator]
    inputs = [None if x is None else LAYOUTS[y](x) for x, y in zip(inputs, layouts)]
    expected = run(
        *(None if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs)
    )
    for actual, value in zip(run(*inputs), expected):
        assert value.isfinite().all() and relative_error(actual, value) < TOLERANCE[torch.float32]


@triton.jit
def copy_gates_grad(
    igate_grad, fgate_grad, out, missing, first, tokens, length,
    NH: tl.constexpr, GATES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    igate_grad, fgate_grad = igate_grad - missing, fgate_grad - missing
    grads = _gates_grad(igate_grad, fgate_grad, first, tokens, length, NH, GATES, T)
    at = tl.arange(0, T)[:, None] * GATES + tl.arange(0, GATES)[None, :]
    tl.store(out + at, grads)


@runs_kernels
def test_gradients_of_more_than_2_31_gates_are_loaded():
    """From memory of the last image alone."""
    heads, length, images = 64, 8, 2**22 + 1
    gates, out = randn(2, heads, length), randn(length, 2 * heads)
    copy_gates_grad[(1,)](
        *(*gates, out),
        missing=images * heads * length,
        first=images * length,
        tokens=(images + 1) * length,
        length=length,
        NH=heads,
        GATES=2 * heads,
        T=length,
    )
    assert torch.equal(out, gates.flatten(0, 1).t())


@pytest.mark.parametrize(
    'x_grad',
    [
        torch.empty(2, 16, 6).mT,
        torch.empty(2, 6, 32)[..., ::2],
        torch.empty(6, 16).expand(2, 6, 16),
    ],
)
def test_before_cell_rejects_an_output_that_it_cannot_view(x_grad):
    case = Case(2, 8, (2, 3))
    x, weights = before_cell_inputs(case)
    q, gate, tokens = randn(2, 2, 6, 8), randn(2, 2, 6), randn(2, 6, 16)
    grads = (q, q, q, gate, gate, tokens)
    with pytest.raises(ValueError, match='one stride between tokens, but its shape is'):
        before_cell_backward(*grads, tokens, x, for_kernels(weights), case.grid, False, x_grad)


@runs_kernels
@pytest.mark.parametrize(
    'version, reverse',
    [(2, False), *(pytest.param(v, True, marks=pytest.mark.slow) for v in (1, 2))],
)
def test_block_with_kernels_equals_plain_block_in_float64(version, reverse):
    """A third of the samples is dropped in the forward direction."""
    torch.manual_seed(0)
    block = ViLBlock(32, num_heads=4, version=version, reverse=reverse, backend='triton')
    block.drop_path.drop_prob = 0 if reverse else 1 / 3
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, grid = torch.randn(3, 15, 32), (5, 3)

    def run(block, dtype):
        block = block.to(DEVICE, dtype)
        inputs = x.detach().to(DEVICE, dtype).requires_grad_()
        torch.manual_seed(0)  # drops one of three
        y = block(inputs, grid)
        (
            y * torch.linspace(-1, 1, y.numel(), dtype=dtype, device=DEVICE).view_as(y)
        ).sum().backward()
        grads = {name: parameter.grad for name, parameter in block.named_parameters()}
        block.zero_grad()
        return dict(output=y.detach(), input=inputs.grad, **grads)

    actual = run(block, torch.float32)
    block.lean, block.backend = False, 'parallel'
    expected = run(block, torch.float64)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 2e-5, name


@runs_kernels
def test_kernels_pass_their_self_test():
    # The smaller the sums, the more they vary; and the interpreter truncates to bfloat16.
    case = self_test.Case(1, (5, 7), reverse=True, version=2, heads=2)
    assert self_test.check(DEVICE, torch.bfloat16, 16, [case]) is None


@runs_kernels
@pytest.mark.parametrize('case', CASES[1:3], ids=str)
def test_fake_operators_match_real_outputs(case):
    import mmvil.ops.triton.fused_layer  # noqa: F401  registers

    x, weights = before_cell_inputs(case)
    a, y, parameter, grid = (
        x.contiguous(),
        randn(*x.shape).to(x.dtype),
        randn(x.shape[2]),
        [*case.grid],
    )
    h = randn(case.batch, case.heads, x.shape[1], case.width).to(x.dtype)
    gate, before = randn(*h.shape[:3]), ([*map(contiguous, for_kernels(weights))], grid)
    for name, args in dict(
        layer_norm=(x, parameter, None, 1e-5, torch.bfloat16),
        layer_norm_backward=(y, x, parameter, parameter, 1e-5, x),
        before_cell=(x, *before, case.heads, case.reverse, True),
        before_cell_backward=(h, h, h, gate, gate, a, a, x, *before, case.reverse, y),
        after_cell=(h, a, x, parameter, None, parameter, 1e-5),
        after_cell_backward=(y, h, a, x, parameter, parameter, parameter, 1e-5),
        convert_and_sum=(x, torch.bfloat16, 0.5),
        add_partial_sums=(randn(3, 5), [randn(2, 33)]),
    ).items():
        operator = getattr(torch.ops.mmvil, name).default
        checks = ['test_schema', 'test_faketensor']
        if name != 'after_cell_backward':  # leaves half of a result as it is in memory
            checks.append('test_aot_dispatch_dynamic')
        torch.library.opcheck(operator, args, test_utils=checks)


@runs_kernels
@pytest.mark.parametrize('save_cell_inputs', [True, False])
def test_layer_with_kernels_compiles_with_gradients(save_cell_inputs):
    torch.manual_seed(0)
    block = ViLBlock(16, num_heads=2, backend='triton', lean='cell' if save_cell_inputs else True)
    x = randn(2, 6, 16)

    def run(block):
        leaf = x.clone().requires_grad_()
        y = block(leaf, (2, 3))
        return [y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])]

    parameters = list(block.to(DEVICE).parameters())
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend='aot_eager')
    for actual, expected in zip(run(compiled), run(block)):
        assert relative_error(actual, expected) < 1e-6


@runs_kernels
def test_layer_with_kernels_trains_some_weights_or_none():
    torch.manual_seed(0)
    block = ViLBlock(16, num_heads=2, backend='triton', lean='cell').to(DEVICE)
    x = randn(2, 6, 16).requires_grad_()
    loss = block(x, (2, 3)).square().sum()
    expected = torch.autograd.grad(loss, [x, block.skip], retain_graph=True)
    again = torch.autograd.grad(loss, [x, block.skip])  # nothing kept was overwritten
    block.requires_grad_(False)
    frozen = torch.autograd.grad(block(x, (2, 3)).square().sum(), x)
    block.skip.requires_grad_(True)
    partly = torch.autograd.grad(block(x.detach(), (2, 3)).square().sum(), block.skip)
    assert all(map(torch.equal, (*again, *frozen, *partly), expected * 2))
    empty = block(x[:0], (2, 3))
    assert empty.shape == (0, 6, 16)
    assert torch.autograd.grad(empty.sum(), block.skip)[0].count_nonzero() == 0


def test_kernels_reject_tensors_on_several_devices():
    x, weight = torch.ones(1, 2, 16), torch.ones(16, device='meta')
    with pytest.raises(ValueError, match='tensors on one device, not cpu and meta'):
        layer_norm(x, weight, None, 1e-6, x.dtype)
    with pytest.raises(ValueError, match='tensors on one device'):
        layer_norm_backward(x, x, weight[:0].new_ones(16), bias=None, eps=1e-6)
    x, weights = before_cell_inputs(CASES[0])
    weights = for_kernels(weights._replace(k_bias=weights.k_bias.to('meta')))
    for sequence in (weights, list(weights)):
        with pytest.raises(ValueError, match='tensors on one device'):
            before_cell(x, sequence, CASES[0].grid, CASES[0].heads, False)


@pytest.mark.skipif(is_interpreted(), reason='the interpreter launches nothing')
def test_operators_launch_by_keyword_on_the_gpu_of_their_tensors(monkeypatch):
    """Played on the CPU: which tensor's device is the current one when a kernel is launched."""
    launches, current = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    def launch(kernel, *args, **kwargs):
        assert not args, 'of thirty arguments in a row, two are swapped without a sign'
        assert kwargs['enable_fp_fusion'], 'Triton 3.10 does not fuse by default'
        launches.append((kernel.__name__, [id(tensor) for tensor in current]))

    monkeypatch.setattr(torch.cuda, 'device_of', device_of)
    monkeypatch.setattr(JITFunction, 'run', launch)
    case = CASES[1]
    x, weights = before_cell_inputs(case)
    weights = for_kernels(weights)
    before = (weights, case.grid, case.heads, case.reverse)
    a, q, k, v, gates = before_cell(x, *before)
    parameter = randn(x.shape[2])
    after = (a, x, parameter, None, parameter, 1e-5)
    h, normalizer = mlstm.mlstm_forward(q, k, v, *gates, case.reverse)
    mlstm.mlstm_backward(h, q, k, v, *gates, h, normalizer, case.reverse)
    after_cell(h, *after)
    after_cell_backward(a, h, *after)
    before_cell_backward(q, k, v, *gates, a, a, x, weights, case.grid, False, x)
    layer_norm(x, parameter, None, 1e-5, torch.float32)
    layer_norm_backward(a, x, parameter, None, 1e-5)
    add_partial_sums(convert_and_sum(x, torch.bfloat16)[1])
    names = {name for name, _ in launches}
    assert {name.split('_kernel')[0] for name in names} >= OPERATORS, names
    firsts = {id(tensor) for tensor in (x, q, h, a)}
    *launches, (last, devices) = launches
    assert last == 'add_partial_sums_kernel' and len(devices) == 1
    assert all(len(devices) == 1 and devices[0] in firsts for _, devices in launches), launches


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != 'cuda', reason='wants a GPU')
def test_gradients_are_the_same_bits_every_time():
    case = Case(4, 96, (32, 32), batch=8, dtype=torch.bfloat16)
    x, weights = before_cell_inputs(case)
    weights = for_kernels(weights)
    a, q, k, v, gates = before_cell(x, weights, case.grid, 4, False)
    results = []
    for _ in range(3):
        x_grad = torch.empty_like(x)
        sums = before_cell_backward(q, k, v, *gates, a, a, x, weights, case.grid, False, x_grad)
        results.append((x_grad, sums))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@runs_kernels
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('tokens, width', [(0, 5), (1, 33), (65, 20), (550, 40)])
def test_convert_and_sum_equals_pytorch(tokens, width, dtype):
    x = 3 + randn(width, 2, tokens).movedim(0, 2)
    y, sums = convert_and_sum(x, dtype, 1.25)
    assert y.dtype == dtype
    assert torch.allclose(y.float(), 1.25 * x, rtol=2**-7)  # the interpreter truncates
    assert torch.allclose(sums.sum(0), y.double().sum((0, 1)).float(), rtol=1e-5)


@runs_kernels
@pytest.mark.parametrize('shapes', [[(1, 1)], [(70, 33), (0, 5)], [(3, 64), (1, 7), (130, 31)] * 2])
def test_add_partial_sums_equals_pytorch(shapes):
    matrices = [3 + randn(*shape) for shape in shapes[:4]]
    expected = torch.cat([x.double().sum(0) for x in matrices])
    assert torch.allclose(add_partial_sums(matrices[0], matrices[1:]), expected.float(), rtol=1e-5)


@pytest.mark.parametrize('tokens', [1, 7, 64, 65, 25088, 10**6])
@pytest.mark.parametrize('beside', [1, 12, 48, 4000])
def test_split_tokens_leaves_no_token_and_no_program_over(tokens, beside):
    share, programs = split_tokens(tokens, 64, beside, programs=512)
    assert share % 64 == 0
    assert (programs - 1) * share < tokens <= programs * share
    assert programs * beside <= 1024 or programs == 1


# ------------------------------------------------------------------------------------------------
# Without a GPU


ITERATION = {
    'before_cell': dict(instructions=1240, barriers=33, registers=168),
    'projections_backward': dict(instructions=400, barriers=18),
    'convolution_backward': dict(instructions=340, barriers=0, registers=128),
    'after_cell_backward': dict(instructions=640, barriers=12, registers=168),
    'layer_norm_backward': dict(instructions=350, barriers=10, registers=168),
}
"""The most that the loop of a kernel may take in bfloat16, version 2, with four warps."""


def check_compiled(arch, head_width, size, dtype, version, allowed_spills=0, most=None):
    from tests.test_ops.triton_offline import (
        COMPILER,
        OLD_COMPILER,
        SHARED_LIMIT,
        compile_launch,
        layer_launches,
    )

    for label, launch in layer_launches(arch, head_width, size, dtype, version).items():
        facts = compile_launch(launch, arch)
        print(f'{arch} {head_width} {size} {str(dtype)[6:]} v{version} {label}: {facts}')
        # More warps per multiprocessor are faster, in spite of some spills.
        some = {'before_cell_kernel': 80, 'projections_backward_kernel OPERAND': 128}
        few = some.get(label, 0) if dtype != torch.float32 else 0
        if COMPILER >= (3, 5):  # older versions spill up to 400 bytes
            assert facts['spills'] <= allowed_spills + few * (2 if OLD_COMPILER else 1), label
        warps = launch.kwargs.get('num_warps', 4)
        if arch != 'gfx942':
            assert facts['blocks'] * warps >= 8, label
        # Two blocks share a multiprocessor at least.
        assert 2 * facts['shared_bytes'] <= SHARED_LIMIT[arch], label
        assert not facts.get('serialized'), label
        limits = {} if OLD_COMPILER or not most else most
        for key, value in limits.get(launch.name.removesuffix('_kernel'), {}).items():
            (loop,) = facts['loops']
            found = loop._asdict() | facts | dict(instructions=loop.instructions * warps / 4)
            assert found[key] <= value, (label, key)


@pytest.mark.skipif(is_interpreted(), reason='the interpreter does not compile')
@pytest.mark.parametrize(
    'arch, head_width, size',
    [
        ('sm_90', 384, 224),
        *(
            pytest.param(arch, head_width, size, marks=pytest.mark.slow)
            for arch in ('sm_80', 'sm_90', 'sm_100')
            for head_width in (96, 192, 384)
            for size in (224, 512, 1024)
        ),
    ],
)
def test_kernels_compile_to_short_loops_without_spills(arch, head_width, size):
    check_compiled(arch, head_width, size, torch.bfloat16, version=2, most=ITERATION)


@pytest.mark.skipif(is_interpreted(), reason='the interpreter does not compile')
@pytest.mark.parametrize(
    'arch, head_width, dtype, version',
    [
        # One case is fast: heads of a single tile compile differently from wider ones.
        pytest.param(*case, marks=[pytest.mark.slow] * (case != ('sm_90', 8, torch.bfloat16, 2)))
        for case in product(
            ('sm_80', 'sm_90', 'sm_100', 'gfx942'),
            (8, 20, 96, 192, 384),
            (torch.float16, torch.bfloat16, torch.float32),
            (1, 2),
        )
    ],
    ids=str,
)
def test_kernels_compile_for_all_widths(arch, head_width, dtype, version):
    if arch == 'gfx942' and dtype == torch.float32:
        pytest.skip('Triton for AMD has no tf32x3')
    # float32, multiplied in three parts, wants a few registers more than there are.
    check_compiled(arch, head_width, 224, dtype, version, 64 if dtype == torch.float32 else 8)


@pytest.mark.skipif(is_interpreted(), reason='the interpreter does not compile')
def test_kernels_of_sixteen_heads_compile_without_spills(monkeypatch):
    monkeypatch.setattr('tests.test_ops.triton_offline.HEADS', 16)
    check_compiled('sm_90', 24, 224, torch.bfloat16, version=2)


@pytest.mark.skipif(is_interpreted(), reason='the interpreter launches nothing')
@pytest.mark.parametrize('arch, limited', [('sm_90', 2), ('gfx942', 0)])
def test_registers_are_limited_on_nvidia_gpus_alone(arch, limited):
    from tests.test_ops.triton_offline import layer_launches

    launches = layer_launches(arch, 96, 224).values()
    assert sum('maxnreg' in launch.kwargs for launch in launches) == limited


@pytest.mark.skipif(is_interpreted(), reason='the interpreter does not compile')
def test_one_compilation_serves_all_sizes():
    sizes = {'tokens', 'length', 'height', 'width', 'tokens_per_program'}
    from tests.test_ops.triton_offline import layer_launches

    for launch in layer_launches('sm_90', 96, 224).values():
        specialized = {p.name for p in launch.kernel.params if not p.do_not_specialize}
        assert not sizes & specialized, launch.name


# ------------------------------------------------------------------------------------------------
# Traffic


class Traffic(TorchDispatchMode):
    """Count launches of operations and kernels, and the bytes of their arguments and results.

    Tensors are on the device 'meta', where the layer's operators would launch nothing.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.cell_bytes = self.launches = 0
        ops = torch.ops.mmvil
        self.operators = {
            ops.layer_norm.default: layer_norm,
            ops.layer_norm_backward.default: layer_norm_backward,
            ops.before_cell.default: before_cell,
            ops.before_cell_backward.default: before_cell_backward,
            ops.after_cell.default: after_cell,
            ops.after_cell_backward.default: after_cell_backward,
            ops.convert_and_sum.default: convert_and_sum,
            ops.add_partial_sums.default: add_partial_sums,
            ops.mlstm.default: lambda *args: mlstm.mlstm_forward(*args[:-1]),
            ops.mlstm_backward.default: lambda *args: mlstm.mlstm_backward(*args[:10], args[11]),
        }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.operators:
            before = self.bytes
            with self:
                result = self.operators[function](*args, **(kwargs or {}))
            if 'mlstm' in function.name():
                self.cell_bytes += self.bytes - before
            return result
        result = function(*args, **(kwargs or {}))
        # Some functions return a view or a copy.
        view = function.is_view and not (isinstance(result, Tensor) and _is_copy(result, args[0]))
        if not view and not re.search('empty|_unsafe_view|promote', function.name()):
            self.add((args, kwargs, result))
        return result

    def launch(self, kernel, *args, grid, warmup, **kwargs):
        twice = kernel.__name__ == 'convolution_backward_kernel'  # reads what it adds to
        self.add((kwargs, kwargs['x_grad'] if twice else None))

    def add(self, tree):
        self.launches += 1
        for x in torch.utils._pytree.tree_leaves(tree):
            if isinstance(x, Tensor):
                self.bytes += x.numel() * x.element_size()


def _is_copy(x, y):
    return x.untyped_storage()._cdata != y.untyped_storage()._cdata


def traffic(head_width, size, save_cell_inputs=False):
    """Counts of the forward pass, without the residual connection, and of the backward pass, with
    it, and the bytes of one (B, N, E).
    """
    from mmvil.ops.triton import fused_layer
    from tests.test_ops.triton_offline import layer_inputs

    x, weights, settings = layer_inputs(head_width, size)
    settings = settings._replace(save_cell_inputs=save_cell_inputs, residual_scale=1)

    def count(function, *args):
        mode = Traffic()

        def launch(kernel, *args, **kwargs):
            mode.launch(kernel, *args, **kwargs)

        with mock.patch.object(JITFunction, 'run', launch), mode:
            return mode, function(*args)

    forward, (_, saved) = count(fused_layer.forward, x, weights, settings)
    backward, _ = count(fused_layer.gradients, x, (x, *saved), weights, settings)
    return forward, backward, x.numel() * 2 * 2


@pytest.mark.skipif(is_interpreted(), reason='the interpreter launches nothing')
@pytest.mark.parametrize('head_width', [96, 192, 384])
@pytest.mark.parametrize('size', [224, 512, 1024])
@pytest.mark.parametrize('save_cell_inputs, backward', [(False, 48), (True, 43)])
def test_layer_moves_few_bytes(head_width, size, save_cell_inputs, backward):
    *counts, unit = traffic(head_width, size, save_cell_inputs)
    for count, most, most_beside_cell in zip(counts, (20, backward), (15.2, backward - 7.3)):
        units, of_cell = count.bytes / unit, count.cell_bytes / unit
        print(f'{head_width} {size}: {units:.1f} (B, N, E), cell {of_cell:.1f}, {count.launches}')
        assert units - of_cell <= most_beside_cell
        assert units <= most or size > 224, 'the states of the cell come on top for long sequences'


@pytest.mark.skipif(is_interpreted(), reason='the interpreter launches nothing')
@pytest.mark.parametrize('save_cell_inputs, launches', [(False, 15), (True, 14)])
def test_layer_launches_few_kernels(save_cell_inputs, launches):
    """Including one for each cast of a weight, which are faster than one for all."""
    forward, backward, _ = traffic(96, 224, save_cell_inputs)
    assert forward.launches <= 13 and backward.launches <= launches
    forward, backward, _ = traffic(96, 1024, save_cell_inputs)
    assert forward.launches <= 15 and backward.launches <= launches + 2
    forward, backward, _ = traffic(192, 1024, save_cell_inputs)  # with all chunks in one launch
    assert forward.launches <= 14 and backward.launches <= launches + 1
