# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Which checkpoints are weights to start from, and which are of this model."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import BaseLoop
from torch import nn

from mmvil import VisionLSTM
from mmvil.checkpoints import adapt_input_channels
from mmvil.engine import AdaptInputChannelsHook

NAME = 'backbone.patch_embed.projection.weight'


class Loop(BaseLoop):
    def __init__(self):
        pass

    def run(self):
        pass


def runner(model, resume=False, training=True):
    return SimpleNamespace(model=model, _resume=resume, _train_loop=Loop() if training else {})


@pytest.fixture
def model():
    arch = dict(embed_dims=16, depth=2)
    return nn.ModuleDict(dict(backbone=VisionLSTM(arch=arch, img_size=32, in_channels=4)))


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_hook_adapts_initial_weights(model, wrapped, prefix):
    weight = torch.randn(16, 3, 16, 16)
    checkpoint = dict(state_dict={prefix + NAME: weight})
    whole = nn.ModuleDict(dict(module=model)) if wrapped else model
    AdaptInputChannelsHook().after_load_checkpoint(runner(whole), checkpoint)
    assert torch.equal(checkpoint['state_dict'][prefix + NAME], adapt_input_channels(weight, 4))


@pytest.mark.parametrize('options', [dict(resume=True), dict(training=False)])
def test_hook_leaves_the_checkpoint_of_a_trained_model_alone(model, options):
    weight = torch.randn(16, 3, 16, 16)
    checkpoint = {NAME: weight}
    AdaptInputChannelsHook().after_load_checkpoint(runner(model, **options), checkpoint)
    assert checkpoint[NAME] is weight
