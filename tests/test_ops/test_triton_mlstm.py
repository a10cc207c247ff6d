# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The Triton kernels of the mLSTM: on a GPU, or without one in Triton's interpreter and offline.

With a GPU all of it runs: ``pytest tests/test_ops/test_triton_mlstm.py``. Without one, the cases
that launch kernels, those of ``test_triton_layer.py`` included, run in a second process, in which
Triton interprets them.
"""

import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from mmvil.layers import ViLBlock
from mmvil.ops import mlstm
from mmvil.ops.mlstm import Form, choose_form
from mmvil.ops.triton import is_interpreted, triton_problem
from tests.conftest import ROOT, relative_error
from tests.test_ops.test_mlstm import make_inputs, output_and_gradients

pytestmark = pytest.mark.triton
DEVICE = 'cuda' if torch.cuda.is_available() and not is_interpreted() else 'cpu'
needs_triton = pytest.mark.skipif(bool(triton_problem()), reason=str(triton_problem()))


def launches(test):
    """Mark a comparison that runs on a GPU or in the interpreter."""
    problem = triton_problem()
    if DEVICE == 'cpu' and not is_interpreted():
        problem = problem or 'needs a GPU or TRITON_INTERPRET=1'
    return pytest.mark.gpu(pytest.mark.skipif(problem is not None, reason=str(problem))(test))


def slow(*values):
    """Cases that the interpreter takes long for, and that others represent."""
    return [
        pytest.param(*(x if type(x) is tuple else (x,)), marks=pytest.mark.slow) for x in values
    ]


def needs_gpu(test):
    problem = triton_problem() or ('needs a GPU' if DEVICE == 'cpu' else None)
    return pytest.mark.gpu(pytest.mark.skipif(problem is not None, reason=str(problem))(test))


TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Six to ten times the errors with the roundings of tensor cores, up to 1025 tokens: 1e-5 with
three passes of tf32, 7e-4 in float16, 5e-3 in bfloat16 (12e-3 where the interpreter truncates).
"""


def random_inputs(length, width, dtype=torch.float32, **kwargs):
    """Inputs as in the layer: features with the memory of tokens, gates in float32."""
    inputs = [x.detach().to(DEVICE) for x in make_inputs(length, width, batch=1, **kwargs)]
    features = [x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    return [*features, *(x.float() for x in inputs[3:])]


def check(inputs, reverse=False, chunk_size=None, tolerance=None):
    """Compare the kernels, output and all gradients, with PyTorch in float64."""

    def form(backend, chunk_size=None):
        return lambda *args, **gates: mlstm(
            *args, **gates, reverse=reverse, backend=backend, chunk_size=chunk_size
        )

    exact = [x.double().requires_grad_() for x in inputs]
    expected = output_and_gradients(form('parallel'), exact)
    ours = [x.detach().requires_grad_() for x in inputs]
    actual = output_and_gradients(form('triton', chunk_size), ours)
    for x, (name, value) in zip((inputs[0], *inputs), actual.items()):
        assert value.dtype == x.dtype and value.shape == x.shape, name
        assert value.isfinite().all(), name
    tolerance = tolerance or TOLERANCE[inputs[0].dtype]
    # A gradient far below the others is the difference of terms as large as they are.
    floor = 1e-2 * max(x.norm() for x in expected.values())
    for name, value in expected.items():
        error = (actual[name].double() - value).norm() / value.norm().clamp_min(floor)
        assert error < tolerance, f'{name}: relative error {error:.1e}'


@launches
@pytest.mark.parametrize(
    'length, reverse',
    [(1, False), (15, True), (64, True), (65, False)]
    + slow((63, False), (196, False), (197, True)),
)
def test_kernels_at_any_length(length, reverse):
    check(random_inputs(length, 24, heads=1), reverse, chunk_size=64)


@launches
@pytest.mark.parametrize('width', [8, 40, *slow(96, 112, 192, 256, 384)])
def test_kernels_at_any_head_width(width):
    check(random_inputs(70, width, heads=1), reverse=True, chunk_size=64)


@launches
def test_kernels_that_share_the_columns_of_a_head():
    check(random_inputs(20, 256, heads=1), chunk_size=16)


@launches
@pytest.mark.parametrize('dtype, reverse', [(torch.float16, False), (torch.bfloat16, True)])
def test_kernels_in_half_precision(dtype, reverse):
    check(random_inputs(150, 96, dtype, heads=1), reverse, chunk_size=64)


@launches
def test_errors_of_the_forget_gates_gradient_cancel():
    """It is a sum over all later tokens, of differences that are smaller than their rounding."""
    check(random_inputs(400, 16, torch.bfloat16, heads=1, seed=2), chunk_size=128, tolerance=2e-2)


@launches
@pytest.mark.parametrize('chunk_size', [1, *slow(128, 1000)])
def test_kernels_agree_for_any_chunk_size(chunk_size):
    check(random_inputs(150, 16, heads=1), chunk_size=chunk_size)


@launches
@pytest.mark.parametrize(
    'dtype, width, length, reverse',
    [(torch.float32, 24, 197, True), (torch.bfloat16, 96, 150, False)]
    + slow((torch.float16, 192, 260, True), (torch.bfloat16, 384, 260, True)),
)
def test_kernels_sum_all_chunks_in_one_launch(monkeypatch, dtype, width, length, reverse):
    """As they do when there are enough heads to occupy a GPU."""
    monkeypatch.setattr('mmvil.ops.triton.mlstm_launch.MULTIPROCESSORS', 1)
    inputs = random_inputs(length, width, dtype, heads=1)
    check(inputs, reverse, chunk_size=64)
    inputs[4][..., length // 2 :: 3] = -300  # forgets almost everything
    check(inputs, reverse, chunk_size=64)


@launches
def test_kernels_scan_the_gates_of_long_sequences_in_blocks(monkeypatch):
    monkeypatch.setattr('mmvil.ops.triton.mlstm_launch.GATE_BLOCK', 64)
    check(random_inputs(150, 16, heads=1), chunk_size=64)


@launches
@pytest.mark.parametrize(
    'igate, fgate',  # None is a mix
    [(-50.0, -300.0), (300.0, 300.0), (300.0, -300.0), (None, None)]
    + slow((-50.0, 300.0), (-50.0, None), (300.0, None), (None, -300.0), (None, 300.0))
    + slow((0.0, -300.0), (0.0, 300.0), (0.0, None)),
)
def test_kernels_at_extreme_gates(igate, fgate):
    inputs = random_inputs(70, 16, heads=1)
    for x in inputs[:2]:  # no normalizer near 0: without a floor, it multiplies rounding errors
        x.abs_()
    mixed = torch.tensor([-300.0, 300.0, 0.0, 5.0, -5.0, 300.0, -300.0]).repeat(10)
    for gate, value in ((inputs[3], igate), (inputs[4], fgate)):
        gate.copy_(mixed if value is None else torch.full_like(mixed, value))
    check(inputs, chunk_size=64, tolerance=1e-3)


@launches
def test_kernels_hold_states_beyond_the_range_of_float16():
    inputs = random_inputs(260, 16, torch.float16, heads=1)
    for x in inputs[1:3]:
        x.copy_(x.abs() * 40)  # the memory sums up to products of 1000, up to 330 000
    inputs[0].abs_()  # no scores that cancel, whose gradients would be out of range too
    inputs[4].fill_(20)
    check(inputs, chunk_size=64, tolerance=6e-3)  # GPUs truncate such states to TF32


@launches
@pytest.mark.parametrize('fgate', [None, *slow(-300.0, 300.0)])
def test_kernels_hold_weights_beyond_the_range_of_float16(fgate):
    """Open input gates leave a denominator no floor, and 1 / denominator goes into the weights."""
    inputs = random_inputs(70, 16, torch.float16, heads=1)
    for x in inputs[:2]:
        x.copy_(x.abs() * 3e-3)
    inputs[2].mul_(4)
    inputs[3].fill_(300)
    mixed = torch.tensor([-300.0, 300.0, 0.0, 5.0, -5.0, 300.0, 3.0]).repeat(10)
    inputs[4].copy_(mixed if fgate is None else torch.full_like(mixed, fgate))
    check(inputs, chunk_size=64, tolerance=3e-2)  # large weights cancel, and with them digits


@launches
def test_kernels_hold_scores_beyond_the_range_of_float16():
    inputs = random_inputs(70, 16, torch.float16, heads=1)
    for x in inputs[:2]:
        x.copy_(x.abs() * 300)  # products up to a million
    q, k, v, igate, fgate = inputs
    h = mlstm(q, k, v, igate=igate, fgate=fgate, backend='triton', chunk_size=64)
    expected = mlstm(q, k, v, igate=igate, fgate=fgate, backend='parallel')
    assert relative_error(h, expected) < TOLERANCE[torch.float16]


@launches
@pytest.mark.parametrize('reverse', [True, *slow(False)])
def test_kernels_accept_any_strides(reverse):
    q, k, v, igate, fgate = random_inputs(70, 16)
    q = q.transpose(2, 3).contiguous().transpose(2, 3)  # channels lie apart
    kv = torch.cat([k, v], -1)  # parts of one tensor
    k, v = kv.chunk(2, -1)
    gates = torch.stack([igate, fgate], -1)
    check([q, k, v, gates[..., 0], gates[..., 1]], reverse, chunk_size=64)


@launches
def test_kernels_accept_an_expanded_gradient():
    inputs = [x.requires_grad_() for x in random_inputs(20, 16)]
    h = mlstm(*inputs[:3], igate=inputs[3], fgate=inputs[4], backend='triton')
    actual = torch.autograd.grad(h.sum(), inputs)
    h = mlstm(*inputs[:3], igate=inputs[3], fgate=inputs[4], backend='parallel')
    for a, b in zip(actual, torch.autograd.grad(h.sum(), inputs)):
        assert relative_error(a, b) < 1e-3


@launches
def test_kernels_accept_an_empty_batch():
    q, gate = torch.zeros(0, 2, 5, 8, device=DEVICE), torch.zeros(0, 2, 5, device=DEVICE)
    h = mlstm(q.requires_grad_(), q, q, igate=gate, fgate=gate, backend='triton')
    h.sum().backward()
    assert h.shape == q.grad.shape == q.shape


@launches
@pytest.mark.parametrize(
    'reverse, lean', [(True, 'cell'), (True, False), *slow(*product((True, False), (True, 'cell')))]
)
def test_block_with_kernels_equals_block_without(reverse, lean):
    torch.manual_seed(0)
    block = ViLBlock(16, num_heads=2, reverse=reverse, backend='triton', lean=lean).to(DEVICE)
    x = torch.randn(2, 30, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn_like(x)

    def run(backend):
        block.backend = backend
        y = block(x, (5, 6))
        return [y, *torch.autograd.grad((y * weight).sum(), [x, *block.parameters()])]

    for a, b in zip(run('triton'), run('chunkwise')):
        assert relative_error(a, b) < 1e-4


@launches
def test_operator_with_kernels_is_registered_completely():
    inputs = [x.requires_grad_() for x in random_inputs(5, 8, heads=1)]
    torch.library.opcheck(torch.ops.mmvil.mlstm.default, (*inputs, False, 5, True))


@launches
@pytest.mark.parametrize('dynamic', [None, True])
def test_kernels_inside_a_compiled_function(dynamic):
    inputs = random_inputs(20, 16)

    def function(q, k, v, igate, fgate):
        return mlstm(q, k, v, igate=igate, fgate=fgate, backend='triton').sum(-1)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend='aot_eager')
    assert relative_error(compiled(*inputs), function(*inputs)) < 1e-6


@launches
def test_kernels_repeat_to_the_bit_in_deterministic_mode():
    inputs = [x.requires_grad_() for x in random_inputs(150, 16, heads=1)]

    def run():
        return output_and_gradients(
            lambda *args, **gates: mlstm(*args, **gates, backend='triton', chunk_size=64), inputs
        )

    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- Without launching -----------------------------------------------------------------------------


@needs_triton
@pytest.mark.skipif(DEVICE == 'cuda' or is_interpreted(), reason='kernels run in this process')
@pytest.mark.parametrize('which', ['not slow', *slow('slow')])
def test_kernels_pass_in_the_interpreter(which):
    """All cases above and those of the layer, in one process in which Triton interprets kernels."""
    files = [__file__, str(Path(__file__).with_name('test_triton_layer.py'))]
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', which, *files],
        cwd=ROOT,
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert ' passed' in result.stdout


@pytest.mark.skipif(DEVICE == 'cuda' or is_interpreted(), reason='kernels run in this process')
def test_backend_triton_reports_why_it_cannot_run():
    x, gate = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5)
    with pytest.raises(ValueError, match="backend='triton' cannot run: .* Use 'auto'"):
        mlstm(x, x, x, igate=gate, fgate=gate, backend='triton')
    x = x.double()
    with pytest.raises(ValueError, match='the dtype is torch.float64, not one of'):
        mlstm(x, x, x, igate=gate, fgate=gate, backend='triton')
    assert choose_form(x.device, x.dtype, 5, 8, 'auto') == Form(5, triton=False)


@pytest.mark.skipif(DEVICE == 'cuda' or is_interpreted(), reason='kernels run in this process')
def test_auto_chooses_kernels_on_a_gpu_only_for_what_they_can(monkeypatch):
    monkeypatch.setattr('mmvil.ops.triton.triton_problem', lambda: None)
    monkeypatch.setattr('mmvil.ops.triton.device_problem', lambda kind, index: None)
    monkeypatch.setattr('mmvil.ops.triton.verdict.self_test_problem', lambda *_: None)
    gpu = torch.device('cuda', 0)
    assert choose_form(gpu, torch.bfloat16, 196, 96, 'auto').triton
    assert choose_form(gpu, torch.bfloat16, 196, 96, 'auto', 64) == Form(64, triton=True)
    assert not choose_form(gpu, torch.float64, 196, 96, 'auto').triton
    assert not choose_form(gpu, torch.bfloat16, 196, 96, 'chunkwise').triton
    assert choose_form(gpu, torch.bfloat16, 196, 96, 'parallel') == Form(196, triton=False)
    assert not choose_form(torch.device('cpu'), torch.bfloat16, 196, 96, 'auto').triton


@needs_triton
@pytest.mark.skipif(is_interpreted(), reason='the interpreter launches nothing')
def test_offsets_in_a_tile_fit_into_32_bits():
    from mmvil.ops.triton.mlstm_launch import mlstm_backward
    from tests.test_ops.triton_offline import record_launches

    rows, columns = (
        torch.empty_strided((1, 1, 70, 512), strides, device='meta')
        for strides in ((0, 0, 2**25, 1), (0, 0, 1, 2**23))
    )
    gate = torch.empty(1, 1, 70, device='meta')
    args = (rows, columns, rows, columns, gate, gate, rows, gate, True)
    for launch in record_launches(lambda: mlstm_backward(*args)):
        for name, strides in launch.kwargs.items():
            if name.endswith('strides') and len(strides) == 4:
                assert 128 * abs(strides[2]) + 512 * strides[3] < 2**31, (launch.label, name)


SIDES = ('query_side_kernel', 'gradients_kernel')
QUICK = [
    ('sm_80', 192, SIDES[1:]),
    ('sm_90', 96, SIDES[:1]),
    ('sm_100', 384, (SIDES[1], 'gate_gradients_kernel')),
]
PER_SCORE = {96: 21.5, 192: 30, 384: 37}
"""Most instructions for a score in a loop, by head width. At 96, tiles of 64 columns take 16.5, but
more time on an H100.
"""


@needs_triton
@pytest.mark.skipif(is_interpreted(), reason='TRITON_INTERPRET=1 leaves nothing to compile')
@pytest.mark.parametrize(
    'arch, width, size, labels',
    [(arch, width, 1024, labels) for arch, width, labels in QUICK]
    + slow(*product(('sm_80', 'sm_90', 'sm_100'), (96, 192, 384), (224, 512, 1024), [None])),
)
def test_kernels_compile_to_code_without_waste(arch, width, size, labels):
    from tests.test_ops.triton_offline import (
        OLD_COMPILER,
        SHARED_LIMIT,
        cell_launches,
        compile_launch,
    )

    if OLD_COMPILER:
        pytest.skip('older versions compile to more instructions')
    for label, launch in cell_launches(arch, width, size).items():
        if labels and label not in labels:
            continue
        facts = compile_launch(launch, arch)
        print(f'{arch} {width} {size} {label}: {facts}')
        # More blocks per multiprocessor are worth a few spills.
        few = 80 if 'maxnreg' in launch.kwargs else 8 if arch == 'sm_100' else 0
        assert facts['spills'] <= few, label
        assert facts['shared_bytes'] <= SHARED_LIMIT[arch], label
        assert not facts['serialized'], label
        assert facts['rows_per_warp'] is None or facts['rows_per_warp'] >= 16, label
        if label in SIDES:
            assert facts['blocks'] * launch.kwargs['num_warps'] >= 8, label
            scored = [loop for loop in facts['loops'] if loop.exponentials > 2]
            # One exponential for a score, or for both of those that share a program.
            assert {loop.per_score(launch)[1] for loop in scored} == {1}, label
            together = label == SIDES[1] and launch.kwargs['TOGETHER']
            assert len(scored) == (2 if label == SIDES[0] else 4 if together else 6)
            instructions = sorted(loop.per_score(launch)[0] for loop in scored)
            if together:  # the longest two loops compute two scores
                instructions[-2:] = (x / 2 for x in instructions[-2:])
            assert max(instructions) < PER_SCORE[width], label


@needs_triton
@pytest.mark.skipif(is_interpreted(), reason='the interpreter launches nothing')
@pytest.mark.parametrize('width', [96, 192, 384])
def test_long_sequences_occupy_a_gpu(width):
    """The scans of gates, one program per head, take two steps instead."""
    from tests.test_ops.triton_offline import cell_launches

    for label, launch in cell_launches('sm_90', width, 1024).items():
        if label.startswith('gate_'):
            assert launch.kwargs['length'] <= 2 * launch.kwargs['BLOCK'], label
        else:
            assert math.prod(launch.grid) >= 132, label  # multiprocessors of an H100


@needs_triton
@pytest.mark.skipif(is_interpreted(), reason='TRITON_INTERPRET=1 leaves nothing to compile')
@pytest.mark.parametrize(
    'arch, width, dtype',
    slow(
        *product(('sm_80', 'sm_86', 'sm_90', 'sm_100'), (8, 64, 96, 128, 192, 256, 384), TOLERANCE),
        ('gfx942', 192, torch.bfloat16),
    ),
)
def test_kernels_compile_within_the_limits_of(arch, width, dtype):
    """Shared memory and registers suffice. All of it takes 20 minutes."""
    from tests.test_ops.triton_offline import SHARED_LIMIT, cell_launches, compile_launch

    launches = cell_launches(arch, width, 1024, dtype)
    assert len(launches) == (9 if 'sum_states_kernel' in launches else 7)
    for label, launch in launches.items():
        needs = compile_launch(launch, arch)
        print(f'{arch} {width} {str(dtype)[6:]} {label}: {needs}')
        assert needs['shared_bytes'] <= SHARED_LIMIT[arch], label
        # Up to 16 registers may spill where speed matters less: in float32, at widths that no ViL
        # has, on small GPUs.
        matters = dtype != torch.float32 and width in (96, 192, 384) and arch != 'sm_86'
        few = 80 if 'maxnreg' in launch.kwargs else 0
        assert needs['spills'] <= (few if matters else max(few, 64)), label


@needs_gpu
def test_kernels_in_a_cuda_graph():
    q, k, v, igate, fgate = random_inputs(196, 96, torch.bfloat16)

    def run():
        return mlstm(q, k, v, igate=igate, fgate=fgate, backend='triton')

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = run()
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(h, run())


@needs_gpu
def test_auto_takes_the_kernels_after_their_self_test(monkeypatch, tmp_path):
    from mmvil.ops.triton import is_usable, verdict

    monkeypatch.setattr(verdict, '_folders', lambda: [tmp_path])
    verdict._cached_problem.cache_clear()
    assert is_usable(torch.device('cuda', 0), torch.bfloat16, 96)
    assert len([*tmp_path.glob('*.json')]) == 1, 'the verdict is not stored'


@needs_gpu
@pytest.mark.parametrize('width', [96, 192, 384])
@pytest.mark.parametrize('length', [196, 1024, 1025])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_on_gpu_at_the_models_sizes(dtype, length, width):
    inputs = random_inputs(length, width, dtype)
    check(inputs)
    check(inputs, reverse=True)
