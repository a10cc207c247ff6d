"""The backbone as users meet it: construction, outputs, exactness, freezing, loading."""

import copy
import math
import pickle

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS
from mmengine.runner import load_state_dict as mmengine_load
from torch import nn

import mmvil
from mmvil import VisionLSTM
from mmvil.checkpoints import adapt_input_channels, vil_to_mmvil
from tests.conftest import ROOT, relative_error

TINY = dict(arch=dict(embed_dims=16, depth=4), img_size=64)


def build(**kwargs):
    torch.manual_seed(0)
    return VisionLSTM(**{**TINY, **kwargs}).eval()


def weighted_sum(y):
    """A scalar with gradients also behind a norm, where the sum of squares is constant."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device)
    return (y * weights.view(y.shape)).sum()


# ------------------------------------------------------------------------------ exactness


def classifier_of(checkpoint, meta, dtype, **kwargs):
    """The official model as backbone and linear layer, loaded strictly."""
    version = meta['version']
    backbone = VisionLSTM(
        arch=dict(embed_dims=meta['dim'], depth=meta['depth'] * (2 if version == 2 else 1)),
        version=version,
        img_size=meta['image_size'],
        patch_size=meta['patch_size'],
        stride=meta['stride'],
        out_type='bilateral_concat' if version == 2 else 'bilateral_avg',
        **kwargs,
    )
    fc = nn.Linear(meta['dim'] * version, meta['num_classes'])
    model = nn.ModuleDict(dict(backbone=backbone, head=nn.ModuleDict(dict(fc=fc)))).to(dtype)
    model.load_state_dict(vil_to_mmvil(checkpoint), strict=True)
    return model


def run_classifier(model, image):
    image = image.to(model.backbone.pos_embed.dtype).clone().requires_grad_()
    logits = model.head.fc(model.backbone(image)[0])
    weighted_sum(logits).backward()
    return logits, image.grad, model.backbone.layers[0].proj_up.weight.grad.norm().item()


@pytest.mark.parametrize('name', ['vil2_dim32', 'vil1_dim32'])
@pytest.mark.parametrize('lean', [True, False], ids=['lean', 'plain'])
def test_official_checkpoint_gives_the_reference_logits(name, lean):
    data = torch.load(ROOT / 'tests/data' / f'{name}.pt', weights_only=True)
    model = classifier_of(data['state_dict'], data['meta'], torch.float64, lean=lean)
    logits, image_grad, weight_grad_norm = run_classifier(model, data['image'])
    assert relative_error(logits, data['logits']) < 1e-9
    assert image_grad.norm().item() == pytest.approx(data['image_grad_norm'].item(), rel=1e-9)
    assert weight_grad_norm == pytest.approx(float(data['grad_norm_of_first_proj_up']), rel=1e-8)


@pytest.mark.parametrize('name', ['vil2_dim32', 'vil1_dim32', 'vil1_dim32_stride8'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-8), (torch.float32, 1e-4)])
@pytest.mark.parametrize('backend', ['parallel', 'chunkwise'])
def test_full_reference_vectors(reference, name, dtype, tolerance, backend):
    data = reference(name)
    meta, checkpoint = data['meta'], data['checkpoint']['state_dict']
    model = classifier_of(checkpoint, meta, dtype, backend=backend)
    tapped = build(
        arch=dict(embed_dims=meta['dim'], depth=len(model.backbone.layers)),
        version=meta['version'],
        stride=meta['stride'],
        out_type='raw',
        final_norm=False,
        out_indices=range(len(model.backbone.layers)),
        backend=backend,
    ).to(dtype)
    tapped.load_state_dict(model.backbone.state_dict(), strict=False)
    for case in data['cases']:
        model.zero_grad()
        logits, image_grad, weight_grad_norm = run_classifier(model, case['image'])
        assert relative_error(logits, case['logits']) < tolerance
        assert relative_error(image_grad, case['image_grad']) < tolerance
        expected = float(case['grad_norm_of_first_proj_up'])
        assert weight_grad_norm == pytest.approx(expected, rel=tolerance)
        for tokens, value in zip(tapped(case['image'].to(dtype)), case['tokens']):
            assert relative_error(tokens, value) < tolerance


# ---------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    'version, arch, parameters',
    [
        (2, 'tiny', 6_391_528),
        (2, 'small', 23_398_696),
        (2, 'base', 89_263_528),
        (1, 't', 6_088_360),
        (1, 'tiny_plus', 7_277_840),
        (1, 'small_plus', 24_628_664),
    ],
)
def test_parameter_counts_are_the_published_ones(version, arch, parameters):
    with torch.device('meta'):
        concat = version == 2
        out_type = 'bilateral_concat' if concat else 'bilateral_avg'
        backbone = VisionLSTM(arch, version=version, out_type=out_type)
    width = backbone.embed_dims * (2 if concat else 1)
    assert sum(p.numel() for p in backbone.parameters()) + 1000 * (width + 1) == parameters


def test_backbone_builds_from_the_registry_by_both_names():
    for name in ('mmvil.VisionLSTM', 'VisionLSTM'):
        assert isinstance(MODELS.build(dict(type=name, **TINY)), VisionLSTM)
    assert mmvil.VisionLSTM is VisionLSTM


@pytest.mark.parametrize('library', ['mmseg', 'mmpretrain', 'mmdet', 'mmpose'])
def test_backbone_builds_from_every_library(library):
    registry = pytest.importorskip(f'{library}.registry').MODELS
    for name in ('mmvil.VisionLSTM', 'VisionLSTM'):
        assert type(registry.build(dict(type=name, **TINY))) is VisionLSTM


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(arch='huge'), "Unknown arch 'huge'.*tiny"),
        (dict(arch=dict(embed_dims=16)), "'embed_dims' and 'depth'"),
        (dict(arch=dict(embed_dims=20, depth=2)), 'multiple of 2 . num_heads = 8.*is 20'),
        (dict(arch=dict(embed_dims=16, depth=0)), 'at least 1 block'),
        (dict(version=3), 'version must be 1 or 2, but is 3'),
        (dict(out_type='cls'), "Unknown out_type 'cls'.*featmap"),
        (dict(out_indices=4), r'between 0 and 3 .*\(4,\)'),
        (dict(out_indices=-5), 'between 0 and 3'),
        (dict(out_indices=(2, 1)), 'ascending'),
        (dict(out_indices=(1, 1)), 'ascending'),
        (dict(out_indices=()), 'between 0 and 3'),
        (dict(frozen_stages=5), 'between -1 and the number of blocks 4'),
        (dict(drop_path_mode='cosine'), "'uniform' or 'linear'"),
        (dict(drop_path_rate=1.5), r'\[0, 1\)'),
        (dict(patch_size=(16, 16)), r'patch_size must be one integer, but is \(16, 16\)'),
        (dict(stride=32), 'between 1 and the patch size 16'),
        (dict(stride=8.0), 'stride must be one integer, but is 8.0'),
        (dict(in_channels='3'), "in_channels must be one integer, but is '3'"),
        (dict(frozen_stages=None), 'frozen_stages must be one integer, but is None'),
        (dict(img_size=8), 'at least one patch'),
        (dict(img_size='64'), "img_size must be one or several integers, but is '64'"),
        (dict(img_size=(64, 64.0)), r'img_size must be .* integers, but is \(64, 64.0\)'),
        (dict(img_size=(64, 64, 3)), 'one or two sides of at least one patch'),
        (dict(out_indices=None), 'out_indices must be one or several integers, but is None'),
        (dict(arch=dict(embed_dims=16, depth='4')), r"arch must be .* integers, .*\(16, '4'\)"),
        (dict(backend='cuda'), 'Unknown mLSTM backend'),
        (dict(out_indices=(0, 1), pyramid=dict(strides=(4, 8, 16))), 'each of the 2 out_indices'),
        (dict(pyramid=dict(strides=(16,)), out_type='raw'), "out_type='featmap'"),
        (dict(in_channels=0), 'in_channels must be at least 1, but is 0'),
        (dict(arch=dict(embed_dims=0, depth=2)), 'embed_dims must be at least 1, but is 0'),
        (dict(pyramid=dict(strides=(12,))), 'powers of two'),
        (dict(pyramid=dict(strides=(0,))), 'pyramid.strides must be at least 1 pixel'),
        (dict(pyramid=dict(strides='4')), 'pyramid.strides must be one or several integers'),
        (dict(pyramid=dict(strides=(16,), out_channels=(1, 2))), 'one number or 1 of them'),
    ],
)
def test_backbone_rejects_invalid_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


@pytest.mark.parametrize(
    'shape, message',
    [
        ((3, 64, 64), r'\(B, 3, H, W\), but got \(3, 64, 64\)'),
        ((1, 1, 64, 64), r'\(B, 3, H, W\)'),
        ((1, 3, 15, 64), r'at least one patch .*15 x 64'),
    ],
)
@pytest.mark.parametrize('stride', [16, 8])
def test_forward_rejects_invalid_images(shape, message, stride):
    with pytest.raises(ValueError, match=message):
        build(stride=stride)(torch.zeros(shape))


def test_blocks_after_the_last_tapped_one_are_not_built():
    backbone = build(out_indices=(0, 1))
    assert len(backbone.layers) == 2
    sum(y.sum() for y in backbone(torch.randn(1, 3, 32, 32))).backward()
    assert not [name for name, p in backbone.named_parameters() if p.grad is None]


def test_patch_embedding_is_initialized_as_a_linear_map():
    projection = build(patch_size=8).patch_embed.projection
    bound = (6 / (3 * 8 * 8 + 16)) ** 0.5
    assert 0.95 * bound < projection.weight.abs().max() <= bound and not projection.bias.any()


def test_drop_path_rates_follow_the_mode():
    def rates(**kwargs):
        return [layer.drop_path.drop_prob for layer in build(drop_path_rate=0.3, **kwargs).layers]

    assert rates() == pytest.approx([0.3] * 4)
    assert rates(drop_path_mode='linear') == pytest.approx([0, 0.1, 0.2, 0.3])
    # Rates belong to depths of the whole model, also where its end is not built.
    assert rates(drop_path_mode='linear', out_indices=1) == pytest.approx([0, 0.1])


# --------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize('size', [(64, 64), (16, 16), (70, 33), (17, 100), (96, 224)])
@pytest.mark.parametrize('version, stride', [(2, None), (1, None), (1, 8)])
def test_forward_gives_feature_maps_for_any_image_size(size, version, stride):
    backbone = build(version=version, stride=stride, out_indices=(0, -1))
    outputs = backbone(torch.randn(2, 3, *size))
    grid = tuple(math.ceil((x - 16) / (stride or 16)) + 1 for x in size)
    assert [tuple(y.shape) for y in outputs] == [(2, 16, *grid)] * 2
    assert all(y.isfinite().all() for y in outputs)


def test_forward_pads_with_zeros_right_and_below():
    backbone, image = build(), torch.randn(1, 3, 40, 50)
    padded = torch.zeros(1, 3, 48, 64)
    padded[:, :, :40, :50] = image
    torch.testing.assert_close(backbone(image)[0], backbone(padded)[0])


def test_out_types_agree_with_each_other():
    image = torch.randn(2, 3, 48, 64)
    (raw,) = build(out_type='raw')(image)
    assert raw.shape == (2, 12 + VisionLSTM.num_extra_tokens, 16)
    (maps,) = build(out_type='featmap')(image)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), raw)
    concat, avg = build(out_type='bilateral_concat'), build(out_type='bilateral_avg')
    expected = concat.pool_norm(torch.cat([raw[:, 0], raw[:, -1]], 1))
    torch.testing.assert_close(concat(image)[0], expected)
    torch.testing.assert_close(avg(image)[0], avg.pool_norm((raw[:, 0] + raw[:, -1]) / 2))


def test_bilateral_outputs_before_the_last_have_no_norm():
    image = torch.randn(2, 3, 48, 64)
    raw, _ = build(out_type='raw', out_indices=(1, 3))(image)
    pooled, last = build(out_type='bilateral_avg', out_indices=(1, 3))(image)
    torch.testing.assert_close(pooled, (raw[:, 0] + raw[:, -1]) / 2)
    assert pooled.shape == last.shape


def test_pyramid_has_the_layers_of_the_recipe():
    backbone = build(out_indices=(0, 1, 2, 3), pyramid=dict(strides=(4, 8, 16, 32)))
    assert [[type(layer) for layer in level] for level in backbone.pyramid.levels] == [
        [nn.ConvTranspose2d, nn.BatchNorm2d, nn.GELU, nn.ConvTranspose2d],
        [nn.ConvTranspose2d],
        [],
        [nn.MaxPool2d],
    ]


@pytest.mark.parametrize('size', [(64, 64), (70, 33), (100, 130)])
@pytest.mark.parametrize('out_channels', [None, 8, (4, 8, 16, 32)])
def test_pyramid_gives_the_strides_and_widths_of_a_convolutional_backbone(size, out_channels):
    strides = (4, 8, 16, 32)
    backbone = build(
        out_indices=(0, 1, 2, 3),
        final_norm=False,
        pyramid=dict(strides=strides, out_channels=out_channels),
    )
    widths = (out_channels,) * 4 if isinstance(out_channels, int) else out_channels or (16,) * 4
    expected = [
        (2, width, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        for width, stride in zip(widths, strides)
    ]
    assert [tuple(y.shape) for y in backbone(torch.randn(2, 3, *size))] == expected


def test_pyramid_makes_all_strides_of_the_only_output():
    backbone = build(pyramid=dict(strides=(4, 8, 16, 32, 64), out_channels=8))
    maps = backbone(torch.randn(2, 3, 70, 130))
    assert [tuple(y.shape) for y in maps] == [
        (2, 8, *(math.ceil(side / stride) for side in (70, 130))) for stride in (4, 8, 16, 32, 64)
    ]
    for y in maps:  # each comes from the last block
        grad = torch.autograd.grad(y.sum(), backbone.layers[-1].proj_down.weight, retain_graph=True)
        assert grad[0].abs().sum() > 0


def test_pyramid_strides_count_from_the_stride_of_the_patches():
    pyramid = dict(strides=(4, 8, 16, 32))
    backbone = build(version=1, stride=8, out_indices=(0, 1, 2, 3), pyramid=pyramid)
    sizes = [y.shape[-1] for y in backbone(torch.randn(1, 3, 128, 128))]
    assert sizes == [30, 15, 8, 4]  # 15 x 15 overlapping patches


def test_samples_of_a_batch_do_not_see_each_other():
    backbone, image = build(), torch.randn(3, 3, 48, 64)
    alone = torch.cat([backbone(x[None])[0] for x in image])
    torch.testing.assert_close(backbone(image)[0], alone)


def test_tokens_lie_in_memory_as_the_blocks_read_them():
    """The layout of a convolution's output would pass from block to block, at a cost in each."""
    backbone, seen = build(), []
    for layer in backbone.layers:
        layer.register_forward_hook(lambda _, inputs, y: seen.extend([inputs[0], y]))
    backbone(torch.randn(2, 3, 64, 48))
    assert len(seen) == 2 * len(backbone.layers) and all(x.is_contiguous() for x in seen)


def test_maps_and_what_convolutions_make_of_them_are_channels_last():
    """So heads run channels last without being told, and give the same as when they are told."""
    image = torch.randn(2, 3, 64, 48)
    backbone = build(out_indices=(0, 1, 2, 3), pyramid=dict(strides=(4, 8, 16, 32)))
    expected = backbone(image)
    sum(map(weighted_sum, expected)).backward()
    expected_grads = [parameter.grad.clone() for parameter in backbone.parameters()]
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in expected)

    backbone.zero_grad()
    backbone.to(memory_format=torch.channels_last)
    actual = backbone(image.contiguous(memory_format=torch.channels_last))
    sum(map(weighted_sum, actual)).backward()
    for parameter, grad in zip(backbone.parameters(), expected_grads):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)
    for y, reference in zip(actual, expected):
        torch.testing.assert_close(y, reference)


def test_channels_last_and_strided_images_give_the_same():
    backbone, image = build(), torch.randn(2, 3, 64, 48)
    (expected,) = backbone(image)
    torch.testing.assert_close(backbone(image.to(memory_format=torch.channels_last))[0], expected)
    torch.testing.assert_close(
        backbone(image.transpose(2, 3).contiguous().transpose(2, 3))[0], expected
    )


# -------------------------------------------------------------------------------- training


@pytest.mark.parametrize('frozen_stages', [-1, 0, 3])
def test_frozen_stages_stay_frozen_and_in_evaluation_mode(frozen_stages):
    backbone = build(frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    expected = {
        name
        for name, _ in backbone.named_parameters()
        if (frozen_stages >= 0 and name.startswith(('patch_embed.', 'pos_embed')))
        or any(name.startswith(f'layers.{i}.') for i in range(max(frozen_stages, 0)))
    }
    assert frozen == expected
    assert [layer.training for layer in backbone.layers] == [i >= frozen_stages for i in range(4)]
    backbone(torch.randn(2, 3, 32, 32))[0].sum().backward()
    assert {n for n, p in backbone.named_parameters() if p.grad is None} == expected


@pytest.mark.parametrize('lean', [True, False])
def test_activation_checkpointing_gives_the_same_gradients(lean):
    gradients = []
    for with_cp in (False, True):
        backbone, runs = build(with_cp=with_cp, lean=lean, drop_path_rate=0.3).train(), []
        backbone.layers[2].register_forward_pre_hook(lambda *_, runs=runs: runs.append(None))
        torch.manual_seed(1)
        weighted_sum(backbone(torch.randn(3, 3, 32, 48))[0]).backward()
        assert len(runs) == (2 if with_cp else 1)
        gradients.append({name: p.grad for name, p in backbone.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_layer_depth_counts_pairs_of_blocks():
    with torch.device('meta'):
        backbone = VisionLSTM('tiny', out_indices=(7, 23), pyramid=dict(strides=(8, 16)))
    depths = {name: backbone.get_layer_depth(name) for name, _ in backbone.named_parameters()}
    assert {count for _, count in depths.values()} == {14}
    assert depths['pos_embed'][0] == depths['patch_embed.projection.weight'][0] == 0
    assert depths['layers.0.skip'][0] == depths['layers.1.skip'][0] == 1
    assert depths['layers.22.skip'][0] == depths['layers.23.skip'][0] == 12
    assert depths['norm.weight'][0] == depths['pyramid.levels.0.0.weight'][0] == 13
    assert backbone.get_layer_depth('backbone.layers.4.skip', 'backbone.') == (3, 14)
    assert backbone.get_layer_depth('decode_head.layers.4.skip', 'backbone.') == (13, 14)


# --------------------------------------------------------------------------------- weights


def save(tmp_path, state_dict):
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(state_dict=state_dict), path)
    return dict(type='Pretrained', checkpoint=str(path))


def test_init_cfg_loads_an_official_checkpoint(tmp_path):
    data = torch.load(ROOT / 'tests/data/vil2_dim32.pt', weights_only=True)
    backbone = build(
        arch=dict(embed_dims=32, depth=4),
        img_size=96,
        final_norm=False,
        pyramid=dict(strides=(8,)),
        init_cfg=save(tmp_path, data['state_dict']),
    )
    backbone.init_weights()
    converted = vil_to_mmvil(data['state_dict'])
    torch.testing.assert_close(
        backbone.layers[3].norm.weight, converted['backbone.layers.3.norm.weight'].float()
    )
    assert backbone.pos_embed.shape == (1, 6, 6, 32)


@pytest.mark.parametrize(
    'prefix, options',
    [
        ('', {}),
        ('backbone.', {}),
        ('net.encoder.', dict(prefix='net.encoder')),
        ('module.net.encoder.', dict(prefix='module.net.encoder.')),
    ],
)
def test_init_cfg_loads_our_checkpoints(tmp_path, prefix, options):
    source = build(out_type='bilateral_concat')
    state = {prefix + name: value for name, value in source.state_dict().items()}
    if prefix:
        state['head.fc.weight'] = torch.zeros(3, 32)
    backbone = build(init_cfg=dict(save(tmp_path, state), **options))
    nn.init.zeros_(backbone.layers[2].proj_up.weight)
    backbone.init_weights()
    assert torch.equal(backbone.layers[2].proj_up.weight, source.layers[2].proj_up.weight)
    assert backbone.is_init  # so that a model around it does not load it again


@pytest.mark.parametrize('kind', [PretrainedInit, 'mmengine.model.PretrainedInit', 'Pretrained'])
@pytest.mark.parametrize('others', [[], [dict(type='Constant', layer='Linear', val=1.0)]])
def test_init_cfg_is_recognized_in_all_spellings(tmp_path, kind, others):
    data = torch.load(ROOT / 'tests/data/vil2_dim32.pt', weights_only=True)
    init_cfg = [dict(save(tmp_path, data['state_dict']), type=kind), *others]
    backbone = build(
        arch=dict(embed_dims=32, depth=4), init_cfg=init_cfg, out_type='bilateral_concat'
    )
    given = backbone.init_cfg
    backbone.init_weights()
    expected = vil_to_mmvil(data['state_dict'])['backbone.layers.0.proj_up.weight'].float()
    assert torch.equal(backbone.layers[0].proj_up.weight, expected)
    assert backbone.init_cfg is given


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda state: {'conv1.weight': torch.zeros(1)}, 'no ViL blocks, but conv1.weight'),
        (lambda state: {**state, 'layers.0.skip': torch.ones(64)}, r'layers.0.skip: \(64,\)'),
        (lambda state: {k: v for k, v in state.items() if 'layers.3' not in k}, 'are missing'),
    ],
)
def test_init_cfg_rejects_what_does_not_fit(tmp_path, change, message):
    backbone = build(init_cfg=save(tmp_path, change(build().state_dict())))
    with pytest.raises(ValueError, match=message):
        backbone.init_weights()


@pytest.mark.parametrize('in_channels', [1, 4])
def test_init_cfg_adapts_rgb_weights_and_logs_it(tmp_path, in_channels, monkeypatch):
    said = []
    monkeypatch.setattr(MMLogger, 'log', lambda _, level, message: said.append(message))
    source = build()
    backbone = build(in_channels=in_channels, init_cfg=save(tmp_path, source.state_dict()))
    backbone.init_weights()
    expected = adapt_input_channels(source.patch_embed.projection.weight.detach(), in_channels)
    assert torch.equal(backbone.patch_embed.projection.weight, expected)
    assert any(f'from 3 to {in_channels} input channels' in message for message in said)


def test_init_cfg_reports_mismatched_channels(tmp_path):
    backbone = build(in_channels=8, init_cfg=save(tmp_path, build(in_channels=4).state_dict()))
    with pytest.raises(ValueError, match='has 4 input channels, but the model has in_channels=8'):
        backbone.init_weights()


@pytest.mark.parametrize('strict', [True, False])
def test_state_dict_of_other_channels_is_not_adapted(strict):
    """A trained model and a mistyped in_channels; mmengine would only warn."""
    state = build().state_dict()
    before = build(in_channels=4)
    with pytest.raises(ValueError, match='has 3 input channels, but the model has in_channels=4'):
        mmengine_load(before, state, strict)
    with pytest.raises(ValueError, match='has 3 input channels, but the model has in_channels=4'):
        before.load_state_dict(state, strict=strict)


def test_state_dict_of_another_image_size_loads():
    small, large = build(img_size=64), build(img_size=(96, 128))
    large.load_state_dict(small.state_dict(), strict=True)
    assert large.pos_embed.shape == (1, 6, 8, 16)
    image = torch.randn(1, 3, 96, 128)
    torch.testing.assert_close(large(image)[0], small(image)[0])
    portrait, landscape = build(img_size=(96, 64)), build(img_size=(64, 96))  # 24 patches each
    landscape.load_state_dict(portrait.state_dict(), strict=True)
    image = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(landscape(image)[0], portrait(image)[0])


# --------------------------------------------------------------------- compilers, half precision


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_and_half_models_stay_close_to_float32(dtype):
    if dtype == torch.float16 and torch.__version__ < '2.4':
        pytest.skip('autocast on the CPU knew bfloat16 only')
    backbone, image = build(), torch.randn(2, 3, 64, 48)
    (expected,) = backbone(image)
    with torch.autocast('cpu', dtype=dtype):
        (autocast,) = backbone(image)
    (half,) = backbone.to(dtype)(image.to(dtype))
    assert relative_error(autocast, expected) < 0.03
    assert half.dtype == dtype and relative_error(half, expected) < 0.05


@pytest.mark.skipif(torch.__version__ < '2.5', reason='older compilers lack transforms')
@pytest.mark.parametrize('lean', [True, 'cell', False], ids=['lean', 'cell', 'plain'])
def test_compile_has_no_graph_break_and_the_same_gradients(lean):
    backbone = build(arch=dict(embed_dims=16, depth=2), lean=lean).train()
    image = torch.randn(2, 3, 40, 64)
    weighted_sum(backbone(image)[0]).backward()
    expected = {name: p.grad.clone() for name, p in backbone.named_parameters()}
    backbone.zero_grad()
    compiled = torch.compile(backbone, backend='aot_eager', fullgraph=True)
    weighted_sum(compiled(image)[0]).backward()
    for name, p in backbone.named_parameters():
        assert relative_error(p.grad, expected[name]) < 1e-4, name


@pytest.mark.skipif(torch.__version__ < '2.5', reason='older compilers lack transforms')
@pytest.mark.parametrize('option', [{}, dict(with_cp=True), dict(drop_path_rate=0.5)])
def test_option_compile_makes_one_graph_of_the_blocks_for_training_only(option):
    from torch._dynamo.utils import counters

    options = dict(arch=dict(embed_dims=16, depth=2), out_indices=(0, 1), **option)
    plain = build(**options).train()
    model = build(compile=dict(backend='eager', fullgraph=True), **options).train()
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        results, image = [], torch.randn(2, 3, 64, 48)
        for net in (plain, model):
            net.zero_grad()
            weighted_sum(torch.cat(net(image))).backward()
            results.append({name: p.grad for name, p in net.named_parameters()})
        if 'drop_path_rate' not in option:
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    copy.deepcopy(model)(image)
    pickle.loads(pickle.dumps(model)).eval()(image)
    model.eval()
    model(image[:1])
    assert counters['stats']['unique_graphs'] == 1
    torch.testing.assert_close(model(image), plain.eval()(image))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='wants a GPU')
@pytest.mark.parametrize('options', [dict(mode='reduce-overhead'), dict(backend='cudagraphs')])
def test_cuda_graphs_of_the_blocks_train_like_the_blocks(options, monkeypatch):
    monkeypatch.setattr('mmvil.ops.triton.verdict.self_test_problem', lambda *_: None)  # takes long
    results = []
    for compiled in (False, options):
        net = build(arch=dict(embed_dims=64, depth=4), out_indices=(1, 3), compile=compiled)
        net = net.cuda().train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        torch.manual_seed(1)
        losses = []
        for _ in range(6):
            image = torch.randn(4, 3, 64, 64, device='cuda')
            with torch.autocast('cuda', torch.bfloat16):
                loss = weighted_sum(torch.cat(net(image))).float() / 1000
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append(torch.stack(losses))
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize('options', [dict(mode='fast'), dict(modes='default')])
def test_invalid_options_of_compile_are_named(options):
    with pytest.raises(ValueError, match='compile=.* is invalid|compile needs PyTorch 2.5'):
        build(compile=options)


@pytest.mark.skipif(torch.__version__ < '2.6', reason='older compilers lack dynamic shapes')
@pytest.mark.parametrize('version', [1, 2])
def test_compiled_takes_images_of_any_size(version):
    backbone = build(arch=dict(embed_dims=16, depth=2), version=version)
    compiled = torch.compile(backbone, backend='aot_eager', dynamic=True, fullgraph=True)
    for size in ((64, 48), (33, 47), (70, 35)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(image)[0], backbone(image)[0])


@pytest.mark.skipif(torch.__version__ < '2.8', reason='older exporters lack dynamic shapes')
def test_export_works_for_other_batch_sizes():
    backbone, image = build(arch=dict(embed_dims=16, depth=2)), torch.randn(2, 3, 64, 48)
    batch = torch.export.Dim('batch', min=1, max=8)
    exported = torch.export.export(backbone, (image,), dynamic_shapes=({0: batch},)).module()
    for size in (2, 3):
        image = torch.randn(size, 3, 64, 48)
        torch.testing.assert_close(exported(image)[0], backbone(image)[0])
