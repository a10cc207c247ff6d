# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The backbone in the hands of other libraries: adapters, transforms, tracers, FLOP counters."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from mmvil import VisionLSTM
from mmvil.layers import ViLBlock
from mmvil.ops.flops import flop_formulas
from tests.conftest import relative_error

TINY = dict(arch=dict(embed_dims=16, depth=2), img_size=64)


def build(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    net = VisionLSTM(**{**TINY, **kwargs}).to(dtype).eval()
    for parameter in net.parameters():  # gates with weights, norms and skips off their identity
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def images(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# ------------------------------------------------------------------------------- adapters

# What peft offers for each kind of submodule: LoRA modules for linear layers, LoRA on a parameter
# for block-diagonal ones, trained copies for the rest (which it wants beside LoRA elsewhere).
ADAPTERS = {
    **dict.fromkeys(('proj_up', 'igate', 'fgate', 'proj_down'), 'target_modules'),
    **dict.fromkeys(('q_proj', 'k_proj', 'v_proj'), 'target_parameters'),
    **dict.fromkeys(('norm', 'conv', 'out_norm'), 'modules_to_save'),
}


@pytest.mark.parametrize('name', ADAPTERS)
def test_peft_adapters_train_and_merge(name):
    peft = pytest.importorskip('peft')
    kind = ADAPTERS[name]
    value = rf'.*layers\.\d+\.{name}' if kind == 'target_modules' else [name]
    value = [f'{name}.weight'] if kind == 'target_parameters' else value
    elsewhere = r'.*layers\.1\.proj_up' if kind == 'modules_to_save' else []
    config = {'target_modules': elsewhere, **{kind: value}}
    net = build(torch.float64)
    image = images(2, 3, 40, 64, dtype=torch.float64)
    before = net(image)[0]
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=4, **config))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any(f'layers.0.{name}.' in n for n in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(image)[0].square().mean().backward()
        optimizer.step()
    assert all(p.grad.any() for p in trained.values())
    unmerged = model(image)[0]
    assert relative_error(unmerged, before) > 1e-8
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(image)[0], unmerged)
    assert all(block._fusible_weights() is not None for block in merged.layers)


# ----------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize('version', [1, 2])
def test_per_sample_gradients_equal_those_of_single_samples(version):
    net, batch = build(torch.float64, version=version), images(3, 3, 40, 64, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, image):
        return functional_call(net, parameters, (image[None],))[0].pow(3).sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, batch)
    for index, image in enumerate(batch):
        net.zero_grad()
        net(image[None])[0].pow(3).sum().backward()
        for name, parameter in net.named_parameters():
            assert relative_error(together[name][index], parameter.grad) < 1e-9, name


def test_functional_call_takes_other_weights():
    net, other, image = build(), build(), images(2, 3, 40, 64)
    for parameter in other.parameters():
        parameter.data *= 1.1
    expected = other(image)[0]
    state = dict(other.named_parameters())
    actual = functional_call(net, state, (image,))[0]
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize('context', [torch.no_grad, torch.enable_grad])
def test_vmap_over_images_and_over_models_equals_loops(context):
    nets, batches = [build(), build()], images(2, 2, 3, 40, 64)
    nets[1].layers[0].proj_up.weight.data *= 1.1
    with context():
        actual = vmap(nets[0])(batches)[0]
        expected = torch.stack([nets[0](batch)[0] for batch in batches])
        torch.testing.assert_close(actual, expected)
        stacked = {
            name: torch.stack([dict(net.named_parameters())[name].detach() for net in nets])
            for name, _ in nets[0].named_parameters()
        }
        actual = vmap(lambda p: functional_call(nets[0], p, (batches[0],))[0])(stacked)
        torch.testing.assert_close(actual, torch.stack([net(batches[0])[0] for net in nets]))


def test_vjp_equals_autograd_and_higher_derivatives_are_rejected_in_words():
    net, image = build(torch.float64), images(1, 3, 40, 64, dtype=torch.float64)
    y, pull = vjp(lambda x: net(x)[0], image)
    (actual,) = pull(torch.ones_like(y))
    x = image.clone().requires_grad_()
    (expected,) = torch.autograd.grad(net(x)[0].sum(), x)
    torch.testing.assert_close(actual, expected)
    with pytest.raises(NotImplementedError, match="forward-mode.*backend='reference'"):
        jvp(lambda x: net(x)[0], (image,), (image,))
    with pytest.raises(NotImplementedError, match="cannot be differentiated.*'reference'"):
        grad(lambda x: grad(lambda x: net(x)[0].pow(3).sum())(x).sum())(image)


def test_reference_backend_has_forward_mode_and_second_derivatives():
    net = build(torch.float64, backend='reference')
    image = images(1, 3, 32, 32, dtype=torch.float64)
    direction = torch.ones_like(image)
    _, forward = jvp(lambda x: net(x)[0].sum(), (image,), (direction,))
    backward = (grad(lambda x: net(x)[0].sum())(image) * direction).sum()
    torch.testing.assert_close(forward, backward)
    assert grad(lambda x: grad(lambda x: net(x)[0].pow(3).sum())(x).sum())(image).any()


# -------------------------------------------------------------------------------- tracing

LOAD_TRACE = """
import sys, torch
trace, (image, expected) = torch.jit.load(sys.argv[1]), torch.load(sys.argv[2])
assert 'mmvil' not in sys.modules
for batch in (image, image[:1], torch.cat([image, image])):
    y = trace(batch)[0]
    torch.testing.assert_close(y[:1], expected[:1], rtol=1e-4, atol=1e-5)
try:
    trace(image[..., :-16])
except torch.jit.Error as error:
    print(error)
"""


@pytest.mark.parametrize('gradients', [True, False], ids=['gradients', 'no_grad'])
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(version=1, stride=8, out_type='bilateral_avg'),
        dict(out_indices=(0, 1), pyramid=dict(strides=(8, 32))),
        dict(img_size=(40, 64), lean=False),
    ],
    ids=['v2', 'v1_stride8', 'pyramid', 'plain'],
)
def test_traces_run_where_mmvil_is_not_installed(tmp_path, kwargs, gradients):
    net, image = build(**kwargs), images(2, 3, 42, 64)
    with torch.set_grad_enabled(gradients), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', torch.jit.TracerWarning)
        trace = torch.jit.trace(net, image)
    assert not [warning for warning in caught if 'mmvil' in warning.filename]
    trace.save(tmp_path / 'trace.pt')
    torch.save((image, net(image)[0].detach()), tmp_path / 'case.pt')
    code = [sys.executable, '-c', LOAD_TRACE, tmp_path / 'trace.pt', tmp_path / 'case.pt']
    result = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'traced for images of 42 x 64 only, but got 42 x 48' in result.stdout


def test_traces_have_no_activation_checkpointing():
    net, image = build(with_cp=True), images(1, 3, 64, 64)
    torch.testing.assert_close(torch.jit.trace(net, image)(image), net(image))


def test_traces_have_gradients():
    net, image = build(torch.float64), images(2, 3, 40, 64, dtype=torch.float64)
    trace = torch.jit.trace(net, image)
    gradients = []
    for model in (net, trace):
        x = image.clone().requires_grad_()
        model(x)[0].pow(3).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'torchscript'])
def test_onnx_export_by_hand_gives_the_same_features(tmp_path, dynamo):
    runtime = pytest.importorskip('onnxruntime')
    if dynamo and not hasattr(torch.compiler, 'is_exporting'):
        pytest.skip('this PyTorch exports by tracing only')
    net, image = build(out_indices=(0, 1), pyramid=dict(strides=(8, 32))), images(2, 3, 42, 64)
    file = str(tmp_path / 'net.onnx')
    torch.onnx.export(net, (image,), file, **(dict(dynamo=dynamo) if not dynamo else {}))
    session = runtime.InferenceSession(file, providers=['CPUExecutionProvider'])
    actual = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    for y, expected in zip(actual, net(image)):
        assert relative_error(torch.from_numpy(y), expected) < 1e-4


def test_exported_programs_have_no_operators_of_ours():
    if not hasattr(torch.compiler, 'is_exporting'):
        pytest.skip('this PyTorch does not tell exporting from compiling')
    net, image = build(), images(2, 3, 48, 64)
    program = torch.export.export(net, (image,))
    assert 'mmvil' not in program.graph_module.code
    torch.testing.assert_close(program.module()(image)[0], net(image)[0], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- FLOP counters


def multiply_adds(net, height, width, joined=4):
    """Multiply-adds of the products and convolutions of one image, by the model's equations with
    all pairs of tokens; ``joined`` is the width of the blocks of the projections to q, k and v.
    """
    tokens = math.ceil(height / 16) * math.ceil(width / 16)
    dims = net.embed_dims
    inner, heads = 2 * dims, net.num_heads
    kernel = net.layers[0].conv.weight[0].numel()
    per_token = 3 * dims * inner + inner * (kernel + 3 * joined) + 2 * heads * 3 * inner
    patches = tokens * dims * net.in_channels * 16 * 16
    return patches + len(net.layers) * (tokens * per_token + 2 * tokens**2 * inner)


@pytest.mark.parametrize('version', [1, 2])
def test_complexity_analysis_of_mmengine_counts_the_model(version):
    from mmengine.analysis import FlopAnalyzer, get_model_complexity_info

    net = build(version=version)
    result = get_model_complexity_info(net, (3, 40, 64), show_table=False, show_arch=False)
    counter = FlopAnalyzer(net, (images(1, 3, 40, 64),))
    counter.unsupported_ops_warnings(False)
    counts = counter.by_operator()
    expected = multiply_adds(net, 40, 64)
    if version == 1:  # the causal convolution is padded on both sides: K - 1 outputs more
        expected += len(net.layers) * 3 * 2 * net.embed_dims * 4
    counted = sum(counts[kind] for kind in ('conv', 'linear', 'matmul', 'einsum'))
    assert counted == expected
    assert result['flops'] == counter.total()


def test_flop_counter_of_torch_counts_what_is_executed():
    from torch.utils.flop_counter import FlopCounterMode

    # Module by module, as new versions of the counter, which add hooks, have it in any case.
    net, image = build(lean=False), images(1, 3, 40, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    # It cannot look into the mLSTM operator: that takes the formulas (docs/compatibility.md).
    cell = len(net.layers) * 2 * 12**2 * 2 * net.embed_dims
    expected = multiply_adds(net, 40, 64, joined=8)  # joined blocks are executed
    assert counter.get_total_flops() == 2 * (expected - cell)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        with torch.no_grad():
            net(image)
    assert counter.get_total_flops() == 2 * expected


# ------------------------------------------------------------------- deferred initialization


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('mode', ['uniform', 'linear'])
def test_models_are_built_on_the_meta_device_and_initialized_later(mode, version):
    options = dict(drop_path_rate=0.2, drop_path_mode=mode, pyramid=dict(strides=(8,)))
    kwargs = dict(TINY, version=version, **options)
    with torch.device('meta'):
        net = VisionLSTM(**kwargs)
    assert all(p.is_meta for p in net.parameters())
    net.to_empty(device='cpu')
    for parameter in net.parameters():
        nn.init.constant_(parameter, math.nan)
    torch.manual_seed(0)
    net.reset_parameters()
    expected = VisionLSTM(**kwargs)
    torch.manual_seed(0)
    expected.reset_parameters()
    for name, value in expected.state_dict().items():
        actual = net.state_dict()[name]
        assert actual.isfinite().all(), name
        torch.testing.assert_close(actual, value)
    block = net.layers[0]
    assert isinstance(block, ViLBlock) and (block.skip == 1).all()
    assert block.fgate.bias.tolist() == [3, 4, 5, 6]


# ----------------------------------------------------------------------------- whole models


@pytest.mark.parametrize('library', ['mmseg', 'mmpretrain'])
def test_models_of_the_libraries_are_traced(library, tmp_path):
    pytest.importorskip(library)
    from mmengine.registry import MODELS, init_default_scope

    backbone = dict(type='mmvil.VisionLSTM', **TINY)
    if library == 'mmseg':
        pyramid = dict(strides=(8, 16), norm_cfg=dict(type='BN'))
        head = dict(
            type='UPerHead', in_channels=[16, 16], in_index=[0, 1], pool_scales=(1, 2), channels=8
        )
        head.update(num_classes=3, norm_cfg=dict(type='BN'), align_corners=False)
        model = dict(type='EncoderDecoder', decode_head=head, test_cfg=dict(mode='whole'))
        model['backbone'] = dict(backbone, out_indices=(0, 1), pyramid=pyramid)
    else:
        head = dict(type='LinearClsHead', num_classes=3, in_channels=32)
        model = dict(type='ImageClassifier', head=head)
        model['backbone'] = dict(backbone, out_type='bilateral_concat')
    init_default_scope(library)
    model = MODELS.build(model).eval()
    image = images(2, 3, 40, 64)
    with torch.no_grad():
        trace = torch.jit.trace(model, image)
        trace.save(tmp_path / 'model.pt')
        torch.testing.assert_close(
            torch.jit.load(tmp_path / 'model.pt')(image), model(image), rtol=1e-4, atol=1e-5
        )
