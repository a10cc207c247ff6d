# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Which checkpoints are weights to start from, and which are of this model."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import BaseLoop
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch import nn

from mmvil import VisionLSTM
from mmvil.checkpoints import adapt_input_channels, vil_to_mmvil
from mmvil.engine import AdaptInputChannelsHook
from tests.test_checkpoints.test_keys import load

NAME = 'backbone.patch_embed.projection.weight'


class Loop(BaseLoop):
    def __init__(self):
        pass

    def run(self):
        pass


def runner(model, resume=False, training=True, **cfg):
    loop = Loop() if training else {}
    return SimpleNamespace(
        model=model, cfg=cfg, _load_from='a.pth', _resume=resume, _train_loop=loop
    )


def build(in_channels=4, embed_dims=16, depth=2, **options):
    arch = dict(embed_dims=embed_dims, depth=depth)
    backbone = VisionLSTM(arch=arch, img_size=32, in_channels=in_channels, **options)
    return nn.ModuleDict(dict(backbone=backbone))


def start(model, checkpoint, **options):
    AdaptInputChannelsHook().after_load_checkpoint(runner(model, **options), checkpoint)
    _load_checkpoint_to_model(model, checkpoint)


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_hook_adapts_initial_weights(nested, wrapped, prefix):
    model, rgb = build(), build(3).state_dict()
    state = {prefix + name: value for name, value in rgb.items()}
    whole = nn.ModuleDict(dict(module=model)) if wrapped else model
    checkpoint = dict(state_dict=state) if nested else state
    AdaptInputChannelsHook().after_load_checkpoint(runner(whole), checkpoint)
    _load_checkpoint_to_model(model, checkpoint, strict=True)
    adapted = {**rgb, NAME: adapt_input_channels(rgb[NAME], 4)}
    torch.testing.assert_close(dict(model.state_dict()), adapted)


@pytest.mark.parametrize('options', [dict(resume=True), dict(training=False)])
def test_hook_leaves_the_checkpoint_of_a_trained_model_alone(options):
    weight = torch.randn(16, 3, 16, 16)
    checkpoint = {NAME: weight}
    AdaptInputChannelsHook().after_load_checkpoint(runner(build(), **options), checkpoint)
    assert checkpoint[NAME] is weight


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_hook_converts_an_official_checkpoint_for_any_model(prefix):
    model = build(3, 32, 4, out_indices=(0, 3))  # as a segmentor's, without pooling
    official = load('vil2_dim32')
    start(model, dict(state_dict={prefix + name: value for name, value in official.items()}))
    expected = vil_to_mmvil(official)
    for name, value in model.state_dict().items():
        if name.startswith('backbone.layers.'):
            torch.testing.assert_close(value, expected[name].to(value.dtype))


def test_hook_rejects_weights_that_do_not_fit():
    model, small = build(), build(3, 8).state_dict()
    others = {name.replace('backbone', 'encoder'): x for name, x in build().state_dict().items()}
    head = {'head.weight': torch.ones(1)}
    with pytest.raises(ValueError, match=r'a.pth, backbone.\*, does not fit .* in the file'):
        start(model, small)
    for state in (others, head):
        with pytest.raises(ValueError, match='a.pth does not fit .* it has no ViL blocks, but'):
            start(model, dict(state_dict=state))
        start(model, dict(state_dict=state), strategy=dict(type='FSDPStrategy'))
    pretrained = build(init_cfg=dict(type='Pretrained', checkpoint='b.pth'))
    start(pretrained, head)
    resnet = {**head, 'backbone.conv1.weight': torch.ones(1)}
    start(pretrained, resnet)
    with pytest.raises(ValueError, match='a.pth does not fit .* no ViL blocks, but conv1.weight'):
        start(model, resnet)
    start(build(), build().state_dict())
