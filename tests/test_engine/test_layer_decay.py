# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmvil

RATE = 0.5
PARAMWISE = dict(
    layer_decay_rate=RATE, flat_decay_mult=0.0, custom_keys={'pos_embed': dict(decay_mult=0.0)}
)


class Segmentor(nn.Module):
    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = backbone or mmvil.VisionLSTM(
            arch=dict(embed_dims=16, depth=5), img_size=32, frozen_stages=-1
        )
        self.neck = nn.Conv2d(16, 16, 1)
        self.decode_head = nn.Conv2d(16, 3, 1)


class Wrapper(nn.Module):
    """Like DistributedDataParallel: the model is its `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def build(model, **options):
    options = {**dict(paramwise_cfg=PARAMWISE), **options}
    return build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            constructor='mmvil.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
            **options,
        ),
    )


def settings(model, **options):
    """{parameter name: (learning rate, weight decay)}."""
    names = {param: name for name, param in model.named_parameters()}
    return {
        names[param]: (group['lr'], group['weight_decay'])
        for group in build(model, **options).optimizer.param_groups
        for param in group['params']
    }


def test_constructor_decays_the_rate_once_per_pair_of_blocks():
    rate_of = {name: lr for name, (lr, _) in settings(Segmentor()).items()}
    # 5 blocks are 3 pairs: 5 layers with the embeddings below and the norm above.
    assert rate_of['backbone.pos_embed'] == RATE**4
    assert rate_of['backbone.patch_embed.projection.weight'] == RATE**4
    assert rate_of['backbone.layers.0.proj_up.weight'] == RATE**3
    assert rate_of['backbone.layers.1.proj_up.weight'] == RATE**3
    assert rate_of['backbone.layers.2.igate.bias'] == RATE**2
    assert rate_of['backbone.layers.4.skip'] == RATE
    assert rate_of['backbone.norm.weight'] == 1
    assert rate_of['neck.weight'] == rate_of['decode_head.bias'] == 1


def test_constructor_covers_each_parameter_once():
    model = Segmentor()
    groups = build(model).optimizer.param_groups
    given = [param for group in groups for param in group['params']]
    assert len(given) == len(set(given))
    assert set(given) == set(model.parameters())


def test_constructor_decays_matrices_only():
    decay_of = {name: decay for name, (_, decay) in settings(Segmentor()).items()}
    shapes = {name: param.ndim for name, param in Segmentor().named_parameters()}
    for name, decay in decay_of.items():
        exempt = shapes[name] <= 1 or name == 'backbone.pos_embed'
        assert decay == (0 if exempt else 0.1), name


def test_constructor_merges_parameters_into_few_groups():
    # One group with and one without weight decay for each of the five layers.
    assert len(build(Segmentor()).optimizer.param_groups) == 10


def test_constructor_leaves_frozen_parameters_out():
    backbone = mmvil.VisionLSTM(arch=dict(embed_dims=16, depth=4), img_size=32, frozen_stages=2)
    trained = settings(Segmentor(backbone))
    assert not any('pos_embed' in name or 'layers.1.' in name for name in trained)
    assert 'backbone.layers.2.proj_up.weight' in trained


def test_constructor_sees_through_wrappers():
    model = Segmentor()
    plain = [group['lr'] for group in build(model).optimizer.param_groups]
    assert [group['lr'] for group in build(Wrapper(model)).optimizer.param_groups] == plain
    model.backbone = Wrapper(model.backbone)
    assert [group['lr'] for group in build(model).optimizer.param_groups] == plain


def test_constructor_custom_keys_scale_the_rate_of_the_head():
    paramwise = {**PARAMWISE, 'custom_keys': dict(decode_head=dict(lr_mult=10.0))}
    of = settings(Segmentor(), paramwise_cfg=paramwise)
    assert of['decode_head.weight'] == (10, 0.1)
    assert of['neck.weight'] == (1, 0.1)


def test_constructor_longest_custom_key_wins():
    keys = {'backbone': dict(lr_mult=0.1), 'backbone.norm': dict(lr_mult=3.0)}
    of = settings(Segmentor(), paramwise_cfg=dict(custom_keys=keys))
    assert of['backbone.norm.weight'][0] == 3
    assert of['backbone.pos_embed'][0] == pytest.approx(0.1)


def test_constructor_steps_each_layer_by_its_rate():
    torch.manual_seed(0)
    model = Segmentor()
    before = {name: param.clone() for name, param in model.named_parameters()}
    loss = model.decode_head(model.neck(model.backbone(torch.rand(2, 3, 32, 32))[0])).sum()
    build(model).update_params(loss)
    with torch.no_grad():
        moved = {name: (p - before[name]).abs().max() for name, p in model.named_parameters()}
    # The first step of AdamW is the learning rate in each coordinate.
    for name, layers_above in (('backbone.layers.0.proj_up.bias', 3), ('neck.bias', 0)):
        assert moved[name] == pytest.approx(RATE**layers_above, rel=1e-2), name


def test_constructor_rejects_a_backbone_without_depth():
    model = Segmentor(nn.Conv2d(3, 16, 1))
    with pytest.raises(TypeError, match='get_layer_depth.*Segmentor is Conv2d'):
        build(model)
    assert len(settings(model, paramwise_cfg=dict(flat_decay_mult=0.0))) == 6


def test_constructor_rejects_a_model_without_backbone():
    with pytest.raises(TypeError, match='get_layer_depth'):
        build(nn.Linear(2, 2))


@pytest.mark.parametrize('rate', [0, -0.5, 1.5])
def test_constructor_rejects_a_rate_outside_its_range(rate):
    with pytest.raises(ValueError, match='layer_decay_rate'):
        build(Segmentor(), paramwise_cfg=dict(layer_decay_rate=rate))


@pytest.mark.parametrize(
    'paramwise_cfg', [dict(norm_decay_mult=0.0), dict(custom_keys=dict(norm=dict(lr_scale=1.0)))]
)
def test_constructor_rejects_unknown_options(paramwise_cfg):
    with pytest.raises(ValueError, match='unknown option'):
        build(Segmentor(), paramwise_cfg=paramwise_cfg)
