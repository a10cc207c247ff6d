# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import numpy as np
import pytest
import torch

from mmvil import VisionLSTM
from mmvil.apis.inspect_blocks import (
    block_features,
    block_gates,
    decay_weights,
    default_blocks,
    half_life,
    principal_colors,
    receptive_field,
)
from mmvil.ops import mlstm, mlstm_reference


def small_backbone(**options):
    torch.manual_seed(0)
    backbone = VisionLSTM(arch=dict(embed_dims=16, depth=2), img_size=48, **options).eval()
    for name, parameter in backbone.named_parameters():
        if 'gate.weight' in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return backbone


@pytest.mark.parametrize('version', [1, 2])
def test_block_gates_are_those_that_the_cell_reads(version, monkeypatch):
    backbone = small_backbone(version=version, lean=False)
    images = torch.randn(1, 3, 48, 64)
    read = []

    def spy(*args, **kwargs):
        read.append((kwargs['igate'], kwargs['fgate']))
        return mlstm(*args, **kwargs)

    monkeypatch.setattr('mmvil.layers.vil_block.mlstm', spy)
    with torch.no_grad():
        backbone(images)
    monkeypatch.undo()
    backbone = small_backbone(version=version)
    with torch.no_grad():
        gates = block_gates(backbone, images)
        features = block_features(backbone, images)
    assert len(gates) == len(read) == 2
    for actual, expected in zip(gates, read):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        backbone.norm(features[-1]).mT.reshape(1, 16, 3, 4), backbone(images)[0]
    )
    assert not any(module._forward_hooks for module in backbone.modules())


@pytest.mark.parametrize('reverse', [False, True])
def test_decay_weights_are_those_of_the_cell(reverse):
    """With q = k = 1 the cell returns the mean of the values by these weights."""
    generator = torch.Generator().manual_seed(0)
    igate, fgate = torch.randn(2, 1, 4, 12, generator=generator, dtype=torch.float64)
    igate = igate + 20  # so that the sum of the weights is the denominator
    value = torch.rand(1, 4, 12, 1, generator=generator, dtype=torch.float64)
    one = torch.ones_like(value)
    h = mlstm_reference(one, one, value, igate, fgate, reverse)
    for token in (0, 5, 11):
        weights = decay_weights(igate, fgate, reverse, token)
        assert weights.max().item() == pytest.approx(1)
        expected = (weights * value[..., 0]).sum(-1) / weights.sum(-1)
        torch.testing.assert_close(h[:, :, token, 0], expected, rtol=1e-5, atol=0)


def test_half_life_of_known_gates():
    gates = torch.logit(torch.tensor([0.5, 0.25, 0.5**0.1]))
    expected = torch.tensor([1, 0.5, 10], dtype=torch.float64)
    torch.testing.assert_close(half_life(gates), expected, rtol=1e-5, atol=0)


def test_receptive_field_covers_the_tokens_read():
    """After one forward block of version 1, with its causal convolution: nothing to come."""
    backbone = small_backbone(version=1)
    at = (0.5, 0.5)
    (first, both) = receptive_field(backbone, [torch.randn(1, 3, 48, 48)], [0, 1], at)
    assert first.shape == (48, 48) and first.max() == 1
    assert (first[:16] > 0).all() and (first[16:32, :32] > 0).all()  # rows above, tokens before
    assert (first[16:32, 32:] == 0).all() and (first[32:] == 0).all()
    assert (both > 0).float().mean() > 0.99


def test_principal_colors_are_the_strongest_directions():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 10, generator=generator)).Q[:3]
    strengths = torch.randn(400, 3, generator=generator) * torch.tensor([9.0, 3, 1])
    tokens = strengths @ basis + 0.001 * torch.randn(400, 10, generator=generator)
    colors = torch.cat(principal_colors([tokens[:150], tokens[150:]]))
    assert colors.shape == (400, 3) and colors.min() == 0 and colors.max() == 1
    for i in range(3):
        assert abs(np.corrcoef(colors[:, i], strengths[:, i])[0, 1]) > 0.95


def test_default_blocks_show_both_directions():
    backbone = VisionLSTM(arch=dict(embed_dims=16, depth=12), img_size=32, out_indices=(3, 7, 11))
    assert default_blocks(backbone, pairs=False) == [3, 7, 11]
    pairs = default_blocks(backbone, pairs=True)
    assert pairs == [0, 1, 6, 7, 10, 11]
