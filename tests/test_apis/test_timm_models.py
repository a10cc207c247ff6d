# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""ViL keeps the promises that timm's models make, as far as timm's own tests check them."""

import pytest
import torch

from mmvil.checkpoints import adapt_input_channels
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


def test_pretrained_weights_follow_one_rule_for_channels(tmp_path):
    data = torch.load(ROOT / 'tests/data/vil2_dim32.pt', weights_only=True)
    torch.save(dict(state_dict=data['state_dict']), tmp_path / 'a.pth')
    overlay = dict(file=str(tmp_path / 'a.pth'), num_classes=10)
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    model = create(in_chans=4, **kwargs)
    expected = adapt_input_channels(data['state_dict']['patch_embed.proj.weight'], 4)
    torch.testing.assert_close(model.backbone.patch_embed.projection.weight, expected)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='has 4 input channels, but the model has in_channels=8'):
        create(in_chans=8, **kwargs)


def test_pretrained_weights_fit_another_pooling_with_a_new_classifier(image, tmp_path):
    source = create(num_classes=10)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    kwargs = dict(
        pretrained=True,
        global_pool='avg',
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'a.pth'), num_classes=10),
    )
    model = create(num_classes=5, **kwargs)
    assert torch.equal(model.forward_features(image), source.forward_features(image))
    assert torch.equal(model.fc_norm.weight, torch.ones(32)) and model(image).shape == (2, 5)
    with pytest.raises(RuntimeError, match='(?s)fc_norm.weight.*head.weight'):
        create(num_classes=10, **kwargs)


@pytest.mark.parametrize('pool', ['bilateral_concat', 'avg', ''])
def test_hub_folder_restores_the_model(image, tmp_path, pool):
    model = create(num_classes=10, img_size=(64, 48), in_chans=3)
    model.set_input_size((96, 80), patch_size=8)
    model.reset_classifier(7 if pool else 0, pool)
    timm.models.save_for_hf(model, tmp_path)

    restored = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert restored.num_classes == model.num_classes and restored.img_size == (96, 80)
    assert torch.equal(restored(image), model(image))
    tuned = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3, img_size=64)
    assert tuned.backbone.pos_embed.shape == (1, 8, 8, 32)

    features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True)
    assert torch.equal(features.eval()(image)[0], model.forward_intermediates(image)[1][1])


# ------------------------------------------------------------------------------------- image size


@pytest.mark.parametrize(
    'kwargs, strict',
    [
        (dict(), False),
        (dict(strict_img_size=True), True),
        (dict(dynamic_img_size=False), True),  # strict is timm's default
        (dict(strict_img_size=False, dynamic_img_size=False), False),
        (dict(strict_img_size=True, dynamic_img_size=True), False),
    ],
)
def test_size_arguments_mean_what_they_mean_in_timm(image, kwargs, strict):
    model = create(**kwargs)
    assert model.dynamic_img_size is not strict
    assert timm.models.get_model_input_config(model)['fixed_input_size'] is strict
    if strict:
        with pytest.raises(ValueError, match='must be 64 x 64 large, but are 64 x 48'):
            model(image)
        assert timm.data.resolve_input_data_config(model)['input_size'] == (3, 64, 64)
        model.set_input_size((64, 48))
    assert torch.equal(model(image), create()(image))
    assert timm.data.resolve_model_data_config(model)['input_size'] == (3, 224, 224)


@pytest.mark.parametrize('strict', [False, True])
def test_without_padding_patches_must_tile_the_image(image, strict):
    kwargs = dict(strict_img_size=strict, dynamic_img_pad=False)
    model = create(img_size=(64, 48), **kwargs)
    assert torch.equal(model(image), create(img_size=(64, 48))(image))
    if not strict:
        with pytest.raises(ValueError, match='must tile the image, but it is 64 x 47'):
            model(image[..., :47])
    with pytest.raises(ValueError, match='must tile the image, but it is 72 x 72'):
        create(img_size=72, **kwargs)
    overlapping = create(1, stride=8, img_size=72, **kwargs)
    assert overlapping.forward_features(torch.zeros(1, 3, 72, 72)).shape == (1, 32, 8, 8)
    padding = create(img_size=72, strict_img_size=strict)
    assert padding.forward_features(torch.zeros(1, 3, 72, 72)).shape == (1, 32, 5, 5)


def test_set_input_size_equals_loading_into_a_model_of_that_size(image):
    model, larger = create().double().requires_grad_(False), create(img_size=(96, 80)).double()
    larger.load_state_dict(model.state_dict())
    model.set_input_size((96, 80))
    assert torch.equal(model(image.double()), larger(image.double()))
    embedding = model.backbone.pos_embed
    assert embedding.dtype == torch.float64 and not embedding.requires_grad
    model.set_input_size()
    assert model.backbone.pos_embed is embedding


def test_set_input_size_resamples_patches():
    model = create(1, stride=8, img_size=(64, 48))
    # Patches of one gray: resampling keeps what it is embedded to.
    image = torch.full((1, 3, 32, 32), 0.7)
    expected = model.backbone.patch_embed(image)[0][:, 0]
    model.backbone.patch_embed.requires_grad_(False)
    model.set_input_size(patch_size=32)
    tokens, grid = model.backbone.patch_embed(image)
    assert grid == (1, 1)
    torch.testing.assert_close(tokens[:, 0], expected, rtol=0.05, atol=0.02)
    assert model.backbone.stride == 16 and model.feature_info[0]['reduction'] == 16
    assert model.backbone.pos_embed.shape == (1, 2, 1, 32)
    assert not model.backbone.patch_embed.projection.weight.requires_grad
    assert model.forward_features(torch.zeros(1, 3, 64, 48)).shape == (1, 32, 3, 2)


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(img_size=8), r'at least one patch \(16\), but is \(8, 8\)'),
        (dict(img_size=70), 'must tile the image, but it is 70 x 70'),
        (dict(patch_size=15), 'patch_size must give a whole stride .* but is 15'),
        (dict(patch_size=0), 'patch_size must give a whole stride .* but is 0'),
    ],
)
def test_set_input_size_rejects_what_does_not_fit_and_changes_nothing(kwargs, match):
    model = create(1, stride=8, dynamic_img_pad=False)
    before = dict(model.state_dict())
    with pytest.raises(ValueError, match=match):
        model.set_input_size(**kwargs)
    assert model.img_size == (64, 64) and model.backbone.patch_size == 16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stride_follows_the_patch_size_unless_the_model_is_one_with_overlap():
    with torch.device('meta'):
        assert create(patch_size=8).backbone.stride == 8
        overlapping = timm.create_model('mmvil1_base_patch16_stride8_224')
    assert (overlapping.backbone.patch_size, overlapping.backbone.stride) == (16, 8)


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
    model.reset_classifier(7, '')
    with pytest.raises(ValueError, match='classifier needs a pooling'):
        model(image)


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


def test_unknown_arguments_are_rejected():
    with pytest.raises(TypeError, match='not_an_argument'):
        create(not_an_argument=1)
    with pytest.raises(TypeError, match='does not take out_type, with_cp; timm has features_only'):
        create(with_cp=True, out_type='raw')
    with pytest.raises(TypeError, match='does not take compile; .* torch.compile'):
        create(compile=True)


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


@pytest.mark.parametrize('version', [1, 2])
def test_symbolic_trace_computes_the_same_for_any_size(image, version):
    pytest.importorskip('torchvision')
    model = create(version, num_classes=5)
    traced = timm.layers.create_feature_extractor(model, ['backbone.layers.1', 'head'])
    for size in (48, 40):
        outputs = traced(image[..., :size])
        assert torch.equal(outputs['head'], model(image[..., :size]))
    outputs['head'].mean().backward()
    assert all(p.grad is not None for p in traced.parameters())
    features = create(version, features_only=True, feature_cls='fx', out_indices=(0, 2))
    assert [tuple(y.shape) for y in features(image)] == [(2, 12, 32)] * 2


# -------------------------------------------------------------------------------------- training


@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing_follows_timms_setting(image, monkeypatch, reentrant):
    chosen = []
    run = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint,
        'checkpoint',
        lambda *args, use_reentrant: (
            chosen.append(use_reentrant) or run(*args, use_reentrant=use_reentrant)
        ),
    )
    monkeypatch.setattr(timm.layers.config, '_USE_REENTRANT_CKPT', reentrant)
    model = create().train()
    model.set_grad_checkpointing()
    model(image).mean().backward()
    assert chosen == [reentrant] * 4
    assert not [name for name, p in model.named_parameters() if p.grad is None]


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


@pytest.mark.parametrize('name', VERSIONS.values())
def test_smallest_registered_models_train(name):
    model = timm.create_model(name, num_classes=42, drop_path_rate=0.1, global_pool='avg')
    logits = model(torch.randn(2, 3, 48, 64))
    logits.mean().backward()
    assert logits.shape == (2, 42) and logits.isfinite().all()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_freeze_ema_and_layer_decay_of_timm(image):
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3, freeze, unfreeze

    model = create(num_classes=5).train()
    ema = ModelEmaV3(model, decay=0.5)
    freeze(model, 'backbone.layers.0')
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith('backbone.layers.0.') for name in frozen)

    optimizer = create_optimizer_v2(model, 'lion', lr=0.1, layer_decay=0.5)  # steps by the sign
    scales = {group['lr_scale'] for group in optimizer.param_groups}
    assert scales == {1, 0.5, 0.25, 0.125}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(image).square().mean().backward()
    optimizer.step()
    ema.update(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name in frozen), name
        torch.testing.assert_close(ema.module.state_dict()[name], (value + before[name]) / 2)
    unfreeze(model, 'backbone.layers.0')
    assert all(p.requires_grad for p in model.parameters())
