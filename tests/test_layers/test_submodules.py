# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Submodules that are wrapped, replaced, hooked or parametrized: the block calls them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from mmvil import VisionLSTM
from mmvil.layers import HeadwiseLinear, TokenConv
from mmvil.layers.vil_block import FUSED_SUBMODULES
from mmvil.ops.log import warn_once
from tests.conftest import relative_error
from tests.test_layers.test_vil_block import make_block

GRID = (3, 4)


def tokens(dtype=torch.float64):
    return torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(block, x):
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = block(x, GRID)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return {'output': y.detach(), 'input': x.grad} | {
        name: p.grad for name, p in block.named_parameters()
    }


def assert_same(actual, expected, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) < tolerance, name


def is_fused(block):
    return block._fusible_weights() is not None


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('name', FUSED_SUBMODULES)
def test_hooks_of_every_submodule_are_called(name, version):
    block, x, seen = make_block(version), tokens(), []
    expected = run(block, x)
    assert is_fused(block)
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda *_: seen.append('before')),
        block.get_submodule(name).register_forward_hook(lambda *_: seen.append('after')),
        block.get_submodule(name).register_full_backward_hook(lambda *_: seen.append('backward')),
    ]
    assert_same(run(block, x), expected)
    assert seen == ['before', 'after', 'backward']
    for handle in handles:
        handle.remove()
    assert_same(run(block, x), expected)
    assert len(seen) == 3 and is_fused(block)


@pytest.mark.parametrize('kind', ['forward_pre', 'forward', 'full_backward_pre', 'full_backward'])
def test_one_hook_of_any_kind_is_called(kind):
    block, seen = make_block(), []
    register = getattr(block.out_norm, f'register_{kind}_hook')
    register(lambda *_: seen.append(kind))
    run(block, tokens())
    assert seen == [kind]


@pytest.mark.parametrize('name', FUSED_SUBMODULES)
def test_hooks_change_the_output(name):
    block, x = make_block(), tokens()
    expected = block(x, GRID)
    block.get_submodule(name).register_forward_hook(lambda _, args, y: 2 * y)
    assert relative_error(block(x, GRID), expected) > 1e-3


@pytest.mark.parametrize('name', FUSED_SUBMODULES)
def test_replaced_submodules_are_called(name):
    class Wrapper(nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped = wrapped
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, *args):
            return self.wrapped(*args) * self.scale

    block, x = make_block(), tokens()
    expected = run(block, x)
    setattr(block, name, Wrapper(block.get_submodule(name)))
    actual = run(block, x)
    scale_grad = actual.pop(f'{name}.scale')
    assert scale_grad.abs() > 1e-6
    assert_same({k.replace('.wrapped', ''): v for k, v in actual.items()}, expected)
    # The way of quantizers, which no __setattr__ sees.
    block._modules[name] = block.get_submodule(name).wrapped
    assert is_fused(block)


def test_hooks_on_all_modules_are_called():
    block, seen = make_block(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        block(tokens(), GRID)
    finally:
        handle.remove()
    assert {block.get_submodule(name) for name in FUSED_SUBMODULES} <= set(seen)


def test_a_forward_method_set_on_a_submodule_is_called():
    block, x = make_block(), tokens()
    expected, forward = block(x, GRID), block.proj_up.forward
    block.proj_up.forward = lambda tokens: 2 * forward(tokens)
    assert relative_error(block(x, GRID), expected) > 1e-3


def test_a_forward_method_put_into_a_class_is_called(monkeypatch):
    block, x = make_block(), tokens()
    expected, forward = block(x, GRID), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, 'forward', lambda self, x: 2 * forward(self, x))
    assert relative_error(block(x, GRID), expected) > 1e-3


OTHER_SETTINGS = dict(
    norm=lambda: nn.LayerNorm(16, elementwise_affine=False),
    proj_up=lambda: nn.Linear(16, 64, bias=False),
    conv=lambda: TokenConv(32, causal=True),
    q_proj=lambda: HeadwiseLinear(32, 4, block_size=8),
    k_proj=lambda: HeadwiseLinear(32, 4, bias=False),
    igate=lambda: nn.Linear(96, 4, bias=False),
    out_norm=lambda: nn.GroupNorm(1, 32),
)


@pytest.mark.parametrize('name', OTHER_SETTINGS)
def test_submodules_of_the_same_kind_with_other_settings_are_called(name):
    block, x = make_block(), tokens()
    torch.manual_seed(0)
    module = OTHER_SETTINGS[name]().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    setattr(block, name, module)
    actual = run(block, x)
    block.lean = False
    assert_same(actual, run(block, x))


def test_weights_that_are_tensor_subclasses_define_their_operations():
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            args = [a.as_subclass(torch.Tensor) * 2 if isinstance(a, cls) else a for a in args]
            return function(*args, **(kwargs or {}))

    block, x = make_block(), tokens()
    expected = make_block()
    expected.proj_up.weight.data *= 2
    weight = block.proj_up.weight.detach()
    del block.proj_up.weight
    block.proj_up.weight = weight.as_subclass(Doubled)
    torch.testing.assert_close(block(x, GRID), expected(x, GRID))


def test_called_submodule_is_logged_once(caplog):
    warn_once.cache_clear()
    blocks = [make_block(), make_block()]
    for block in blocks:
        block.v_proj.register_forward_hook(lambda *_: None)
        block(tokens(), GRID)
        block(tokens(), GRID)
    (record,) = caplog.records
    assert 'v_proj has a hook' in record.getMessage()


# ------------------------------------------------------------------------------- weights


@pytest.mark.parametrize('name', ['proj_up', 'proj_down', 'igate', 'fgate', 'conv', 'q_proj'])
def test_weight_norm_trains(name):
    block, x = make_block(), tokens()
    expected = block(x, GRID)
    parametrizations.weight_norm(block.get_submodule(name))
    torch.testing.assert_close(block(x, GRID), expected)
    block(x, GRID).square().sum().backward()
    for parameter in block.get_submodule(name).parameters():
        assert parameter.grad.any()
    parametrize.remove_parametrizations(block.get_submodule(name), 'weight')
    torch.testing.assert_close(block(x, GRID), expected)


def test_spectral_and_orthogonal_parametrizations_change_the_output():
    for parametrization in (parametrizations.spectral_norm, parametrizations.orthogonal):
        block, x = make_block(), tokens()
        parametrization(block.proj_down)
        y = block(x, GRID)
        plain = make_block()
        plain.proj_down.weight.data = block.proj_down.weight.data.clone()
        # spectral_norm iterates in training: both blocks take the weight of this moment
        block.eval()
        plain.proj_down.weight.data = block.proj_down.weight.data.clone()
        torch.testing.assert_close(block(x, GRID), plain(x, GRID))
        y.sum().backward()


def test_pruned_weights_stay_pruned_over_steps():
    block, x = make_block(), tokens()
    prune.l1_unstructured(block.proj_up, 'weight', amount=0.5)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        block(x, GRID).square().mean().backward()
        optimizer.step()
    mask = block.proj_up.weight_mask
    y = block(x, GRID)
    assert block.proj_up.weight_orig.grad[mask == 0].eq(0).all()
    prune.remove(block.proj_up, 'weight')
    assert block.proj_up.weight[mask == 0].eq(0).all() and is_fused(block)
    torch.testing.assert_close(block(x, GRID), y)


def test_dynamic_quantization_is_close():
    block, x = make_block(dtype=torch.float32).eval(), tokens(torch.float32)
    with torch.no_grad():
        expected = block(x, GRID)
        quantized = torch.ao.quantization.quantize_dynamic(block, {nn.Linear})
        actual = quantized(x, GRID)
    assert type(quantized.igate) is not nn.Linear
    assert 0 < relative_error(actual, expected) < 0.1


def test_half_precision_weights_of_gates_are_promoted():
    block, x = make_block(dtype=torch.bfloat16), tokens(torch.bfloat16)
    assert is_fused(block)
    expected = block(x, GRID)
    seen = []
    block.igate.register_forward_hook(lambda _, args, y: seen.append(y.dtype))
    actual = block(x, GRID)
    assert seen == [torch.float32] and actual.dtype == torch.bfloat16
    assert relative_error(actual.float(), expected.float()) < 0.02


# --------------------------------------------------------------------------------- copies


def test_copies_and_pickles_compute_the_same():
    block, x = make_block(), tokens()
    block.proj_up.register_forward_hook(_double)
    expected = block(x, GRID)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(buffer, weights_only=False),
    )
    for each in copies:
        torch.testing.assert_close(each(x, GRID), expected)
        assert not is_fused(each)
    assert is_fused(copy.deepcopy(make_block()))


def _double(module, args, y):
    return 2 * y


def _run_in_process(net, image, queue):
    queue.put(net(image)[0].detach().numpy())


@pytest.mark.slow
def test_spawned_processes_compute_the_same():
    net = VisionLSTM(arch=dict(embed_dims=16, depth=2), img_size=32).eval()
    net.layers[0].proj_up.register_forward_hook(_double)
    image = torch.randn(1, 3, 32, 32)
    context = torch.multiprocessing.get_context('spawn')
    queue = context.Queue()
    process = context.Process(target=_run_in_process, args=(net, image, queue))
    process.start()
    actual = torch.from_numpy(queue.get(timeout=600))
    process.join()
    torch.testing.assert_close(actual, net(image)[0])
