"""The ViL block: the fused layer against its submodules."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from mmvil.layers import DropPath, ViLBlock
from mmvil.ops.vil_layer_common import sum_tokens
from tests.conftest import relative_error

GRID = (5, 7)


def make_block(version=2, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    block = ViLBlock(16, version=version, **kwargs).to(dtype)
    for parameter in block.parameters():  # gates with weights, norms and skips off their identity
        parameter.data += 0.1 * torch.randn_like(parameter)
    return block


def run(block, x, lean):
    block.lean = lean
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = block(x, GRID)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    grads = {name: parameter.grad for name, parameter in block.named_parameters()}
    return dict(output=y.detach(), input=x.grad, **grads)


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('reverse', [False, True])
def test_fused_layer_equals_autograd(version, reverse):
    block = make_block(version, reverse=reverse)
    x = torch.randn(3, 35, 16, dtype=torch.float64)
    expected, actual = run(block, x, lean=False), run(block, x, lean=True)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-9, name
    kept = run(block, x, lean='cell')
    assert all(torch.equal(kept[name], value) for name, value in actual.items())


@pytest.mark.parametrize('kept', [[0, 3], [0, 1, 2, 3], []])
def test_fused_layer_drops_samples_like_autograd(kept, monkeypatch):
    block = make_block(drop_path_rate=0.4).train()
    draws = torch.ones(4)
    draws[kept] = 0
    monkeypatch.setattr(torch, 'rand', lambda size: draws)
    x = torch.randn(4, 35, 16, dtype=torch.float64)
    expected, actual = run(block, x, lean=False), run(block, x, lean=True)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-9 or not value.any(), name
    with torch.no_grad():
        assert torch.equal(block(x, GRID), actual['output'])
    dropped = [sample for sample in range(4) if sample not in kept]
    assert torch.equal(actual['output'][dropped], x[dropped])


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_fused_layer_under_autocast_is_close_to_float32(dtype, tolerance):
    block = make_block(dtype=torch.float32)
    x = torch.randn(2, 35, 16)
    expected = run(block, x, lean=True)
    if dtype == torch.float16 and torch.__version__ < '2.4':
        pytest.skip('autocast on the CPU knew bfloat16 only')
    for lean in (True, False):
        with torch.autocast('cpu', dtype=dtype):
            actual = run(block, x, lean)
        assert actual['output'].dtype == torch.float32  # the residual stream keeps its precision
        for name, value in expected.items():
            assert (
                actual[name].isfinite().all() and relative_error(actual[name], value) < tolerance
            ), name


@pytest.mark.parametrize('lean', [True, 'cell', False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['autocast', 'half'])
def test_gates_and_normalizer_are_never_in_half_precision(lean, dtype):
    block, kept = make_block(dtype=dtype, lean=lean), []
    x = torch.randn(1, 35, 16, dtype=dtype)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
        torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.float32),
    ):
        block(x, GRID)
    scalars = [x.dtype for x in kept if x.shape == (1, block.num_heads, 35)]
    assert len(scalars) >= 3 and set(scalars) == {torch.float32}


@pytest.mark.parametrize('lean', [True, False])
def test_float64_keeps_its_digits_under_autocast(lean):
    block, x = make_block(lean=lean), torch.randn(1, 35, 16, dtype=torch.float64)
    with torch.autocast('cpu', torch.bfloat16):
        actual = block(x, GRID)
    torch.testing.assert_close(actual, block(x, GRID))


def test_backward_pass_may_run_under_autocast_or_not():
    block, x = make_block(dtype=torch.float32), torch.randn(1, 35, 16)
    grads = []
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16):
            y = block(x, GRID).square().sum()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y, list(block.parameters())))
    assert all(map(torch.equal, *grads))


def test_sums_over_tokens_exceed_the_range_of_float16():
    assert sum_tokens(torch.full((2, 50, 3), 1000.0).half()).tolist() == [1e5] * 3


def test_fused_layer_uses_the_eps_of_both_norms():
    block, x = make_block(), torch.randn(3, 35, 16, dtype=torch.float64)
    block.norm.eps, block.out_norm.eps = 1.0, 0.1
    expected, actual = run(block, x, lean=False), run(block, x, lean=True)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-9, name


@pytest.mark.parametrize('lean, widths', [(True, 7), ('cell', 15)])
def test_fused_layer_keeps_a_few_widths_per_token(lean, widths):
    block, tokens, width = make_block(dtype=torch.float32, lean=lean), 35, 16
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(torch.randn(1, tokens, width).requires_grad_(), GRID)
    values = sum(x.numel() for address, x in kept.items() if address not in parameters)
    assert (
        y.requires_grad
        and widths * width * tokens <= values <= (widths * width + 5 * block.num_heads) * tokens
    )


def test_fused_layer_rejects_double_backward():
    block = make_block()
    x = torch.randn(1, 35, 16, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(block(x, GRID).sum(), x, create_graph=True)


def test_fused_layer_refuses_batched_gradients():
    x = torch.randn(1, 35, 16, dtype=torch.float64, requires_grad=True)

    def gradients(lean):
        y = make_block(lean=lean)(x, GRID)
        return torch.autograd.grad(y, x, torch.ones(2, *y.shape).to(y), is_grads_batched=True)

    with pytest.raises(NotImplementedError, match='is_grads_batched=True.* Use lean=False'):
        gradients(lean=True)
    assert len(gradients(lean=False)[0]) == 2


def test_frozen_parameters_get_no_gradient():
    block = make_block()
    block.conv.requires_grad_(False)
    block.skip.requires_grad_(False)
    block(torch.randn(1, 35, 16, dtype=torch.float64), GRID).sum().backward()
    assert block.conv.weight.grad is None and block.skip.grad is None
    assert block.q_proj.weight.grad is not None


@pytest.mark.parametrize('backend', ['parallel', 'chunkwise', 'reference'])
def test_backends_agree(backend):
    x = torch.randn(2, 35, 16, dtype=torch.float64)
    expected = make_block()(x, GRID)
    torch.testing.assert_close(make_block(backend=backend, chunk_size=8)(x, GRID), expected)


@pytest.mark.parametrize('version', [1, 2])
def test_gates_are_those_that_the_forward_pass_computes(version):
    block, seen = make_block(version, reverse=True), []
    x = torch.randn(2, 35, 16, dtype=torch.float64)
    gates = block.gates(x, GRID)
    for gate in (block.igate, block.fgate):
        gate.register_forward_hook(lambda _, given, y: seen.append(y.transpose(1, 2)))
    block(x, GRID)
    assert gates[0].shape == (2, 4, 35)
    assert all(torch.equal(actual, expected) for actual, expected in zip(gates, seen))


def test_odd_width_is_rejected():
    with pytest.raises(ValueError, match='multiple of 2 . num_heads = 8.*is 12'):
        ViLBlock(12)
    with pytest.raises(ValueError, match='Unknown mLSTM backend'):
        ViLBlock(16, backend='fast')


def test_initialization_follows_the_released_models():
    torch.manual_seed(0)
    block = ViLBlock(192)
    assert block.proj_up.weight.std().item() == pytest.approx((2 / (5 * 192)) ** 0.5, rel=0.02)
    assert block.q_proj.weight.std().item() == pytest.approx((2 / (5 * 192)) ** 0.5, rel=0.05)
    assert block.proj_down.weight.std().item() == pytest.approx(2 / 192**0.5, rel=0.02)
    assert block.fgate.bias.tolist() == [3, 4, 5, 6]
    assert not block.igate.weight.any() and not block.fgate.weight.any()
    biases = torch.cat([ViLBlock(8).igate.bias for _ in range(100)])
    assert biases.std().item() == pytest.approx(0.1, rel=0.1)
    for module in (block.proj_up, block.q_proj, block.k_proj, block.v_proj, block.proj_down):
        assert not module.bias.any()
    assert (block.skip == 1).all() and (block.norm.weight == 1).all()


class TestDropPath:
    def test_skips_the_work_of_dropped_samples(self):
        torch.manual_seed(0)
        seen = []
        x = torch.randn(64, 3, 4)
        y = DropPath(0.5).train()(x, lambda part: seen.append(len(part)) or torch.ones_like(part))
        difference = y - x
        kept = difference[:, 0, 0] > 0
        assert seen == [kept.sum()] and 16 < seen[0] < 48
        torch.testing.assert_close(difference[kept], torch.full_like(x, 2)[kept])
        assert not difference[~kept].any()

    def test_keeps_the_expectation_for_every_batch_size(self):
        torch.manual_seed(0)
        drop_path = DropPath(0.25).train()
        for batch in (1, 2, 3):
            x = torch.zeros(batch, 1, 1)
            mean = torch.stack([drop_path(x, torch.ones_like).mean() for _ in range(2000)]).mean()
            assert mean.item() == pytest.approx(1, abs=0.05)

    def test_gives_every_parameter_a_gradient_when_all_samples_are_dropped(self):
        torch.manual_seed(0)
        linear, drop_path = torch.nn.Linear(4, 4), DropPath(0.999).train()
        drop_path(torch.randn(1, 3, 4), linear).sum().backward()
        assert linear.weight.grad is not None and not linear.weight.grad.any()

    def test_draws_anew_in_traces_and_for_every_sample_under_vmap(self):
        torch.manual_seed(0)
        drop_path, x = DropPath(0.5).train(), torch.ones(64, 2, 1)
        traced = torch.jit.trace(lambda x: drop_path(x, torch.ones_like), x, check_trace=False)
        mapped = torch.func.vmap(lambda x: drop_path(x, torch.ones_like), randomness='different')
        for y in (traced(x), mapped(x.unsqueeze(1))):
            assert set(y.flatten().tolist()) == {1, 3} and torch.equal(y[..., 0, :], y[..., 1, :])
        assert not torch.equal(traced(x), traced(x))

    def test_is_identity_in_evaluation(self):
        x = torch.randn(2, 3, 4)
        assert torch.equal(DropPath(0.9).eval()(x, torch.ones_like), x + 1)

    @pytest.mark.parametrize('rate', [-0.1, 1.0])
    def test_rejects_rates_outside_zero_to_one(self, rate):
        with pytest.raises(ValueError, match=r'\[0, 1\)'):
            DropPath(rate)


FAULTS = """
import resource, torch
from mmvil.layers import ViLBlock

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block(x, (14, 14))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

block, x = ViLBlock(192), torch.randn(8, 196, 192)
with torch.inference_mode():
    print(sorted(faults() for _ in range(5))[2])  # the heap may still grow in the first passes
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a property of glibc')
def test_inference_reuses_its_memory():
    # In a process of its own: here, other tests may have freed more already.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(('MALLOC_', 'GLIBC_'))}
    command = [sys.executable, '-c', FAULTS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 1500, 'pages; without measures 4000 to 7000'


def test_block_rejects_unknown_lean():
    with pytest.raises(ValueError, match="lean must be True, False or 'cell', but is 'most'"):
        ViLBlock(16, lean='most')
