# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""ViL keeps the promises that timm's models make, as far as timm's own tests check them."""

import pytest
import torch

from tests.conftest import ROOT, relative_error

timm = pytest.importorskip('timm')
timm_models = pytest.importorskip('mmvil.apis.timm_models')  # registers them
SMALL = dict(arch=dict(embed_dims=32, depth=4), img_size=64)
VERSIONS = {1: 'mmvil1_tiny_patch16_224', 2: 'mmvil_tiny_patch16_224'}


def create(version=2, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(VERSIONS[version], **{**SMALL, **kwargs}).eval()


@pytest.fixture
def image():
    torch.manual_seed(1)
    return torch.randn(2, 3, 64, 48)


# ------------------------------------------------------------------------------ names and weights


def test_models_and_their_checkpoints_are_listed():
    assert {'mmvil_tiny_patch16_224', 'mmvil_small_patch16_224', 'mmvil_base_patch16_224'} < set(
        timm.list_models('mmvil*')
    )
    tags = timm.list_pretrained('mmvil_tiny*')
    assert tags == ['mmvil_tiny_patch16_224.e400_in1k', 'mmvil_tiny_patch16_224.e800_in1k']
    assert len(timm.list_pretrained('mmvil*')) == 13


@pytest.mark.parametrize('name', timm.list_models('mmvil*'))
def test_default_cfg_describes_the_model(name):
    with torch.device('meta'):
        model = timm.create_model(name)
        cfg, state = model.default_cfg, model.state_dict()
        maps = model.forward_features(torch.zeros(1, *cfg['input_size']))
    assert cfg['tag'] in ('e800_in1k', 'e400_in1k')
    assert maps.shape == (1, model.num_features, *cfg['pool_size'])
    assert f'{cfg["first_conv"]}.weight' in state and f'{cfg["classifier"]}.weight' in state
    assert (cfg['crop_pct'], cfg['interpolation']) == (1.0, 'bicubic')


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('layout', ['official', 'own'])
def test_pretrained_weights_compute_the_reference_logits(version, layout, tmp_path):
    data = torch.load(ROOT / f'tests/data/vil{version}_dim32.pt', weights_only=True)
    torch.save(dict(state_dict=data['state_dict']), tmp_path / 'a.pth')
    kwargs = dict(version=version, num_classes=10, pretrained=True)
    overlay = dict(file=str(tmp_path / 'a.pth'), num_classes=10)
    model = create(**kwargs, pretrained_cfg_overlay=overlay)
    if layout == 'own':
        torch.save(model.state_dict(), tmp_path / 'a.pth')
        model = create(**kwargs, pretrained_cfg_overlay=overlay)
    assert relative_error(model(data['image']), data['logits']) < 1e-5


@pytest.mark.parametrize('name', ['vil2_dim32', 'vil1_dim32', 'vil1_dim32_stride8'])
def test_reference_vectors_in_float64(reference, name):
    data = reference(name)
    meta = data['meta']
    model = create(
        version=meta['version'],
        arch=dict(embed_dims=32, depth=meta['depth'] * meta['version']),
        stride=meta['stride'],
        num_classes=meta['num_classes'],
    ).double()
    model.load_state_dict(timm_models.checkpoint_filter_fn(data['checkpoint'], model))
    for case in data['cases']:
        image = case['image'].double()
        assert relative_error(model(image), case['logits']) < 1e-8
        tokens = model.forward_intermediates(image, output_fmt='NLC', intermediates_only=True)
        for actual, expected in zip(tokens, case['tokens']):
            assert relative_error(actual, expected) < 1e-8


@pytest.mark.parametrize('num_classes', [0, 5])
def test_pretrained_weights_fit_other_channels_and_classes(num_classes, tmp_path):
    data = torch.load(ROOT / 'tests/data/vil2_dim32.pt', weights_only=True)
    torch.save(dict(state_dict=data['state_dict']), tmp_path / 'a.pth')
    overlay = dict(file=str(tmp_path / 'a.pth'), num_classes=10)
    model = create(
        pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=num_classes
    )
    weight = data['state_dict']['patch_embed.proj.weight'].sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.backbone.patch_embed.projection.weight, weight)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, num_classes or 64)


# ----------------------------------------------------------------------------------- classifier


@pytest.mark.parametrize('version, width', [(1, 32), (2, 64)])
def test_reset_classifier_replaces_head_and_pooling(image, version, width):
    model = create(version)
    assert (model.num_features, model.head_hidden_size) == (32, width)
    maps = model.forward_features(image)
    pooled = model.forward_head(maps, pre_logits=True)
    assert maps.shape == (2, 32, 4, 3) and pooled.shape == (2, width)

    model.reset_classifier(7)
    assert model.num_classes == 7 and model(image).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    assert torch.equal(model.forward_head(maps, pre_logits=True), pooled)  # pooling is kept
    model.reset_classifier(0)
    assert torch.equal(model(image), pooled)
    model.reset_classifier(0, '')
    assert torch.equal(model(image), maps)
    model.reset_classifier(7, 'avg')
    assert model.head_hidden_size == 32 and model(image).shape == (2, 7)
    with pytest.raises(ValueError, match="Unknown global_pool 'max'"):
        model.reset_classifier(7, 'max')


def test_created_without_classifier_and_pooling(image):
    assert create(num_classes=0)(image).shape == (2, 64)
    assert create(num_classes=0, global_pool='')(image).shape == (2, 32, 4, 3)


def test_reset_classifier_keeps_device_dtype_mode_and_frozen_weights():
    model = create().requires_grad_(False).to(device='meta', dtype=torch.float64)
    model.reset_classifier(0, '')
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.reset_classifier(2, 'avg')
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.float64)}
    assert not any(module.training for module in model.modules())


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match='not_an_argument'):
        create(not_an_argument=1)


def test_device_and_dtype_of_create_model():
    model = create(device='meta', dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert {(x.device.type, x.dtype) for x in tensors} == {('meta', torch.bfloat16)}


# -------------------------------------------------------------------------------------- features


def test_features_only_gives_maps_of_the_chosen_blocks(image):
    model = create(features_only=True, out_indices=(0, 2))
    assert model.feature_info.channels() == [32, 32]
    assert model.feature_info.reduction() == [16, 16]
    assert [tuple(y.shape) for y in model(image)] == [(2, 32, 4, 3)] * 2
    assert len(model.model.backbone.layers) == 3  # later ones are removed
    stride8 = create(1, features_only=True, stride=8)
    assert stride8.feature_info.reduction() == [8, 8, 8]
    assert [tuple(y.shape) for y in stride8(image)] == [(2, 32, 7, 5)] * 3


@pytest.mark.parametrize('version', [1, 2])
def test_forward_intermediates_agree_with_forward_features(image, version):
    model = create(version)
    expected = model.forward_features(image)
    final, maps = model.forward_intermediates(image)
    assert len(maps) == len(model.feature_info) == 4
    assert torch.equal(final, expected)
    _, normed = model.forward_intermediates(image, indices=1, norm=True)
    torch.testing.assert_close(normed[0], expected)
    (second,) = model.forward_intermediates(
        image, [1], stop_early=True, output_fmt='NLC', intermediates_only=True
    )
    assert torch.equal(second, maps[1].flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="'NCHW' or 'NLC'"):
        model.forward_intermediates(image, output_fmt='NHWC')


@pytest.mark.parametrize('indices, prune_norm', [([0], False), ([3], False), (range(4), True)])
def test_pruned_model_has_no_unused_parameters(image, indices, prune_norm):
    model = create(drop_rate=0.5).train()
    take = model.prune_intermediate_layers(list(indices), prune_norm=prune_norm)
    features = model.forward_intermediates(
        image, take, norm=not prune_norm, intermediates_only=True
    )
    # A weighted sum: behind a norm, the plain one is constant.
    sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in features).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.eval()
    assert torch.equal(model(image), model(image))


# -------------------------------------------------------------------------------------- training


@pytest.mark.parametrize('features_only', [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(image, features_only):
    gradients = []
    for enable in (False, True):
        model = create(features_only=features_only).train()
        (model.model if features_only else model).set_grad_checkpointing(enable)
        outputs = model(image) if features_only else [model.forward_features(image)]
        sum(y.pow(3).mean() for y in outputs).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 60
    for expected, actual in zip(*gradients):
        torch.testing.assert_close(actual, expected)


def test_layer_groups_are_those_of_our_layer_decay(image):
    from timm.models._manipulate import group_parameters

    model = create()
    names = [name for name, _ in model.named_parameters()]
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    for name in names:
        assert groups[name] == model.backbone.get_layer_depth(name, 'backbone.')[0], name
    assert groups['head.weight'] == groups['backbone.norm.weight'] == 3
    assert model.no_weight_decay() <= set(names)


def test_backward_reaches_every_parameter_and_bfloat16_stays(image):
    model = create(num_classes=42).train()
    model(image).mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert model.to(torch.bfloat16).eval()(image.bfloat16()).dtype == torch.bfloat16
