"""The mLSTM operator against the paper's time loop, output and all gradients."""

import functools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmvil.ops import mlstm, mlstm_reference
from mmvil.ops.chunkwise import MAX_RISE, chunk_gates, chunkwise_backward, chunkwise_forward
from mmvil.ops.flops import mlstm_flops
from mmvil.ops.gates import gate_statistics

FORMS = [('parallel', None), ('chunkwise', 16), ('chunkwise', 100), ('auto', None)]


def make_inputs(length, width, gate_scale=1.0, dtype=torch.float64, batch=2, heads=2, seed=0):
    """Random q, k, v (B, NH, N, DH) and gates (B, NH, N); forget gates are mostly open."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = [randn(batch, heads, length, width).to(dtype) for _ in range(3)]
    igate = randn(batch, heads, length) * gate_scale
    fgate = randn(batch, heads, length) * gate_scale + 3
    return [x.requires_grad_() for x in (*features, igate.to(dtype), fgate.to(dtype))]


def output_and_gradients(function, inputs):
    q, k, v, igate, fgate = inputs
    h = function(q, k, v, igate=igate, fgate=fgate)
    weight = torch.linspace(-1, 1, h.numel(), dtype=torch.float64).view(h.shape).to(h)
    grads = torch.autograd.grad((h * weight).sum(), inputs, materialize_grads=True)
    return dict(zip(('h', 'q', 'k', 'v', 'igate', 'fgate'), (h, *grads)))


def assert_close(actual, expected, tolerance):
    # Errors are relative to each tensor, but a gradient far below the others counts as zero.
    floor = 1e-6 * max(x.norm().item() for x in expected.values())
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm() / value.double().norm().clamp_min(
            floor
        )
        assert error < tolerance, f'{name}: relative error {error:.1e}'


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('backend, chunk_size', FORMS)
@pytest.mark.parametrize('length, width', [(1, 8), (2, 24), (63, 8), (64, 96), (197, 8), (300, 12)])
@pytest.mark.parametrize('gate_scale', [0.1, 3, 100])
def test_mlstm_equals_reference(length, width, gate_scale, backend, chunk_size, reverse):
    inputs = make_inputs(length, width, gate_scale)
    expected = output_and_gradients(
        lambda *args, igate, fgate: mlstm_reference(*args, igate, fgate, reverse), inputs
    )

    def form(*args, **gates):
        return mlstm(*args, **gates, reverse=reverse, backend=backend, chunk_size=chunk_size)

    assert_close(output_and_gradients(form, inputs), expected, 1e-8)


@pytest.mark.parametrize('width', [96, 192, 384])
@pytest.mark.parametrize('length', [196, 400])
def test_mlstm_equals_reference_at_the_models_widths(width, length):
    inputs = make_inputs(length, width, batch=1, heads=1)
    expected = output_and_gradients(
        lambda *args, igate, fgate: mlstm_reference(*args, igate, fgate), inputs
    )
    assert_close(output_and_gradients(mlstm, inputs), expected, 1e-9)


@pytest.mark.parametrize('backend, chunk_size', FORMS)
@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_mlstm_lower_precision_is_close_to_float64(dtype, tolerance, backend, chunk_size):
    inputs = make_inputs(197, 24, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = output_and_gradients(mlstm, exact)

    def form(*args, **gates):
        return mlstm(*args, **gates, backend=backend, chunk_size=chunk_size)

    actual = output_and_gradients(form, inputs)
    assert all(x.dtype == dtype for x in actual.values())
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('backend, chunk_size', FORMS)
def test_mlstm_keeps_float32_digits_where_much_is_forgotten(backend, chunk_size, reverse):
    """Logarithms of the weights run to thousands: rounded one by one they would cost 3 digits."""
    inputs = make_inputs(256, 8, dtype=torch.float32)
    with torch.no_grad():
        for x in inputs[:2]:
            x.abs_()  # no sum cancels
        inputs[3].mul_(20)
        inputs[4].sub_(3).mul_(20)

    def form(*args, **gates):
        return mlstm(*args, **gates, reverse=reverse, backend=backend, chunk_size=chunk_size)

    expected = output_and_gradients(form, [x.detach().double().requires_grad_() for x in inputs])
    assert_close(output_and_gradients(form, inputs), expected, 1e-5)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('rise', [0.5, MAX_RISE - 1, MAX_RISE + 1, 200])
def test_chunks_keep_float32_digits_up_to_the_range_of_products_and_beyond(rise, reverse):
    """Within one chunk of 32 tokens the running maximum of one sequence rises so far."""
    inputs = make_inputs(96, 8, dtype=torch.float32)
    with torch.no_grad():
        for x in inputs[:2]:
            x.abs_()  # no sum cancels
        inputs[3].zero_()
        inputs[4][1, 1] = -torch.tensor(rise / 31).expm1().log()  # log(forget gate) = -rise / 31
    gates = [x.detach().flatten(0, 1) for x in inputs[3:]]
    tiles = chunk_gates(gate_statistics(*gates, reverse), 32, reverse, torch.float32, 2)
    assert [tile.factorized for tile in tiles] == [True, rise < MAX_RISE]

    def form(*args, **gates):
        return mlstm(*args, **gates, reverse=reverse, backend='chunkwise', chunk_size=32)

    expected = output_and_gradients(form, [x.detach().double().requires_grad_() for x in inputs])
    assert_close(output_and_gradients(form, inputs), expected, 1e-5)


@pytest.mark.parametrize('autocast', [False, True], ids=['plain', 'autocast'])
def test_reference_backend_sums_half_precision_in_float32(autocast):
    inputs = [x.detach() for x in make_inputs(64, 8, dtype=torch.bfloat16)]
    gates = dict(igate=inputs[3].float(), fgate=inputs[4].float())
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        actual = mlstm(*inputs[:3], **gates, backend='reference')
    expected = mlstm(*(x.double() for x in inputs[:3]), **gates, backend='reference')
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_reference_has_finite_gradients_where_input_gates_are_shut(dtype):
    inputs = make_inputs(5, 4, dtype=dtype)
    inputs[3].data[..., :2] = -1e3
    reference = functools.partial(mlstm, backend='reference')
    expected = output_and_gradients(mlstm, [x.detach().double().requires_grad_() for x in inputs])
    assert_close(output_and_gradients(reference, inputs), expected, 1e-4)


@pytest.mark.parametrize('backend, chunk_size', FORMS)
def test_mlstm_sums_in_float32_under_autocast(backend, chunk_size):
    inputs = make_inputs(64, 8, dtype=torch.float32)

    def form(*args, **gates):
        return mlstm(*args, **gates, backend=backend, chunk_size=chunk_size)

    expected = output_and_gradients(form, inputs)
    with torch.autocast('cpu', torch.bfloat16):
        actual = output_and_gradients(form, inputs)
    for name, value in expected.items():
        assert actual[name].equal(value), name


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('igate', [-1e3, 0.0, 1e3, None], ids=['shut', 'zero', 'open', 'mixed'])
@pytest.mark.parametrize('fgate', [-1e3, 1e3, None], ids=['forget', 'keep', 'mixed'])
def test_mlstm_stays_finite_with_extreme_gates(igate, fgate, dtype, reverse):
    inputs = make_inputs(130, 8, dtype=dtype)
    mixed = torch.tensor([-1e3, 1e3, 0.0, 5.0, -5.0, 1e3, -1e3]).repeat(19)[:130].to(dtype)
    for gate, value in ((inputs[3], igate), (inputs[4], fgate)):
        gate.data.copy_(mixed if value is None else torch.full_like(mixed, value))

    def form(*args, **gates):
        return mlstm(*args, **gates, reverse=reverse, backend='chunkwise', chunk_size=32)

    actual = output_and_gradients(form, inputs)
    expected = output_and_gradients(form, [x.detach().double().requires_grad_() for x in inputs])
    for name, value in actual.items():
        # A gradient that float16 cannot represent is infinite (loss scalers look for that).
        too_large = expected[name].abs() > 0.9 * torch.finfo(dtype).max
        assert (value.isfinite() | too_large).all() and not value.isnan().any(), name
    assert actual['h'].isfinite().all()


def test_mlstm_gradcheck():
    inputs = make_inputs(5, 4, batch=1)
    for reverse in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, k, v, i, f, r=reverse: mlstm(
                q, k, v, igate=i, fgate=f, reverse=r, backend='chunkwise', chunk_size=2
            ),
            inputs,
        )


def test_mlstm_rejects_double_backward():
    inputs = make_inputs(5, 4)
    h = mlstm(*inputs[:3], igate=inputs[3], fgate=inputs[4])
    (grad,) = torch.autograd.grad(h.sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), inputs[1])
    h = mlstm(*inputs[:3], igate=inputs[3], fgate=inputs[4], backend='reference')
    (grad,) = torch.autograd.grad(h.sum(), inputs[0], create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), inputs[1])
    assert second.any()


def test_mlstm_accepts_any_strides():
    q, k, v, igate, fgate = (x.detach() for x in make_inputs(30, 8))
    expected = mlstm(q, k, v, igate=igate, fgate=fgate)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, igate, fgate)]
    assert not strided[0].is_contiguous()
    actual = mlstm(*strided[:3], igate=strided[3], fgate=strided[4])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_mlstm_empty_batch():
    q = torch.randn(0, 2, 5, 8, requires_grad=True)
    gate = torch.randn(0, 2, 5)
    h = mlstm(q, q, q, igate=gate, fgate=gate)
    h.sum().backward()
    assert h.shape == q.shape and q.grad.shape == q.shape


def test_mlstm_reverse_reads_the_sequence_backwards():
    inputs = [x.detach() for x in make_inputs(50, 8)]
    flipped = [x.flip(2) for x in inputs]
    expected = mlstm(*flipped[:3], igate=flipped[3], fgate=flipped[4]).flip(2)
    actual = mlstm(*inputs[:3], igate=inputs[3], fgate=inputs[4], reverse=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_mlstm_is_mapped_over_any_dimension():
    inputs = [x.detach() for x in make_inputs(5, 4)]

    def form(q, k, v, igate, fgate):
        return mlstm(q, k, v, igate=igate, fgate=fgate)

    stacked = [torch.stack([x, x.flip(0)], 2) for x in inputs]
    actual = torch.func.vmap(form, in_dims=2)(*stacked)
    expected = torch.stack([form(*inputs), form(*(x.flip(0) for x in inputs))])
    torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(not hasattr(torch.library, 'opcheck'), reason='torch.library.opcheck is newer')
@pytest.mark.parametrize('reverse', [False, True])
def test_mlstm_operator_is_registered_completely(reverse):
    inputs = make_inputs(20, 8, dtype=torch.float32)
    torch.library.opcheck(torch.ops.mmvil.mlstm.default, (*inputs, reverse, 8))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(k=torch.zeros(1, 2, 4, 8)), 'same shape'),
        (dict(igate=torch.zeros(1, 2, 5, 1)), r'igate and fgate must have the shape \(B, NH, N\)'),
        (dict(fgate=torch.zeros(1, 2, 4)), r'igate and fgate must have the shape \(B, NH, N\)'),
        (dict(v=torch.zeros(1, 2, 5, 8).half()), 'one floating dtype'),
        (dict(fgate=torch.zeros(1, 2, 5).long()), 'must be floating point'),
        (dict(backend='fast'), "Unknown mLSTM backend 'fast'.*parallel"),
        (dict(chunk_size=0), 'at least 1'),
    ],
)
def test_mlstm_rejects_invalid_arguments(change, message):
    x, gate = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5)
    arguments = {**dict(q=x, k=x, v=x, igate=gate, fgate=gate), **change}
    with pytest.raises(ValueError, match=message):
        mlstm(**arguments)


@pytest.mark.parametrize('chunk_size', [32, 40, 96])
def test_flop_formulas_count_the_products_that_are_executed(chunk_size):
    inputs, shape = [x.detach() for x in make_inputs(96, 8)], (2, 2, 96, 8)
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as forward:
        results = chunkwise_forward(*inputs, False, chunk_size)
    with FlopCounterMode(display=False, custom_mapping=in_place) as backward:
        chunkwise_backward(results[0], *inputs, *results, False, chunk_size)
    assert forward.get_total_flops() == mlstm_flops(shape, chunk_size)
    assert backward.get_total_flops() == mlstm_flops(shape, chunk_size, backward=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('backend', ['parallel', 'chunkwise'])  # for Triton: test_triton_mlstm.py
def test_mlstm_on_gpu_equals_cpu(backend, dtype, tolerance):
    inputs = make_inputs(300, 96, dtype=dtype)
    form = functools.partial(mlstm, backend=backend)
    expected = output_and_gradients(form, [x.detach().double().requires_grad_() for x in inputs])
    actual = output_and_gradients(form, [x.detach().cuda().requires_grad_() for x in inputs])
    assert_close({name: x.cpu() for name, x in actual.items()}, expected, tolerance)
