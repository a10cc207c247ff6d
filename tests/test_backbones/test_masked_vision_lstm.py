# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The backbone of masked image modeling: masked pixels stay unread, weights go on to VisionLSTM."""

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.runner import load_state_dict as mmengine_load

from mmvil import MaskedVisionLSTM, VisionLSTM

TINY = dict(arch=dict(embed_dims=16, depth=4), img_size=64)
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(2, 4, 6, dtype=torch.long)
MASK[0, :2, 2:4] = 1
MASK[1, 2:] = 1


def build(cls=MaskedVisionLSTM, **kwargs):
    torch.manual_seed(0)
    return cls(**{**TINY, **kwargs}).eval()


@pytest.fixture(params=[1, 2])
def network(request):
    return build(version=request.param)


def test_masked_is_registered_in_the_root_registry():
    for name in ('mmvil.MaskedVisionLSTM', 'MaskedVisionLSTM'):
        assert isinstance(MODELS.build(dict(type=name, **TINY)), MaskedVisionLSTM)


@pytest.mark.parametrize('options', [{}, dict(out_indices=(1, 3), pyramid=dict(strides=(8, 16)))])
def test_masked_without_masked_patches_equals_vision_lstm(options):
    plain, masked = build(VisionLSTM, **options), build(**options)
    expected = plain(IMAGES)
    for mask in (None, torch.zeros_like(MASK)):
        for actual, y in zip(masked(IMAGES, mask), expected, strict=True):
            assert torch.equal(actual, y)


def test_masked_pixels_are_not_read(network):
    pixels = MASK.repeat_interleave(16, 1).repeat_interleave(16, 2).bool().unsqueeze(1)
    other = torch.where(pixels, float('nan'), IMAGES)
    expected = network(IMAGES, MASK)[0]
    assert expected.isfinite().all()
    assert torch.equal(network(other, MASK)[0], expected)
    assert not torch.equal(network(IMAGES.roll(1, 0), MASK)[0], expected)


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.float32])
def test_mask_may_have_any_dtype(network, dtype):
    assert torch.equal(network(IMAGES, MASK.to(dtype))[0], network(IMAGES, MASK)[0])


def test_every_parameter_gets_a_gradient_from_visible_and_from_masked_patches(network):
    y = network.train()(IMAGES, MASK)[0]
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize(
    'size, shape',
    [
        ((64, 96), (2, 6, 4)),
        ((64, 96), (2, 24)),
        ((64, 96), (1, 4, 6)),
        ((64, 96), (2, 16, 24)),  # patches of 4
        ((60, 96), (2, 4, 6)),  # the images are padded to whole patches
    ],
)
def test_masked_rejects_a_mask_that_does_not_fit(network, size, shape):
    height, width = size
    with pytest.raises(ValueError, match=f'16 x 16 .* {height} x {width}.*model_patch_size'):
        network(torch.zeros(2, 3, height, width), torch.ones(shape))


def test_masked_rejects_overlapping_patches():
    with pytest.raises(ValueError, match='stride=8 .* overlap'):
        build(stride=8)


def test_mask_token_belongs_to_the_embeddings():
    for prefix in ('', 'backbone.'):
        assert build().get_layer_depth(prefix + 'mask_token', prefix) == (0, 4)
    assert build().get_layer_depth('layers.1.skip') == (1, 4)


def test_reset_parameters_initializes_the_mask_token():
    with torch.device('meta'):
        network = build()
    network.to_empty(device='cpu')
    network.mask_token.data.fill_(7)
    network.reset_parameters()
    assert 0.01 < network.mask_token.std() < 0.03


@pytest.fixture
def checkpoint(tmp_path):
    """File of a pre-trained SimMIM model, and its backbone."""
    network = build()
    state = {f'backbone.{name}': value for name, value in network.state_dict().items()}
    state['neck.decoder.0.weight'] = torch.zeros(768, 16, 1, 1)
    torch.save(dict(state_dict=state), tmp_path / 'simmim.pth')
    return str(tmp_path / 'simmim.pth'), network


@pytest.mark.parametrize('final_norm', [True, False])  # as in classifiers, in UperNet
def test_pretrained_weights_go_into_vision_lstm(checkpoint, final_norm, caplog):
    file, pretrained = checkpoint
    torch.manual_seed(1)
    network = VisionLSTM(
        **{**TINY, 'img_size': 96},
        final_norm=final_norm,
        init_cfg=dict(type='Pretrained', checkpoint=file),
    )
    MMLogger.get_current_instance().addHandler(caplog.handler)
    with caplog.at_level('INFO'):
        network.init_weights()
    total = len(network.state_dict())
    assert f'Loaded {total} of {total} backbone tensors' in caplog.text
    assert not [record for record in caplog.records if record.levelname == 'WARNING']
    assert network.pos_embed.shape == (1, 6, 6, 16)
    expected = pretrained.state_dict()
    for name, value in network.state_dict().items():
        assert name == 'pos_embed' or torch.equal(value, expected[name])


def test_pretrained_weights_go_into_vision_lstm_by_load_from(checkpoint):
    file, pretrained = checkpoint
    model = torch.nn.ModuleDict(dict(backbone=VisionLSTM(**TINY)))
    mmengine_load(model, torch.load(file, weights_only=True)['state_dict'])
    assert torch.equal(model.backbone(IMAGES)[0], pretrained(IMAGES)[0])


def test_masked_starts_from_weights_of_vision_lstm(tmp_path):
    plain = build(VisionLSTM)
    torch.save(plain.state_dict(), tmp_path / 'vil.pth')
    torch.manual_seed(1)
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'vil.pth'))
    network = MaskedVisionLSTM(**TINY, init_cfg=init_cfg).eval()
    token = network.mask_token.clone()
    network.init_weights()
    assert torch.equal(network(IMAGES)[0], plain(IMAGES)[0])
    assert torch.equal(network.mask_token, token)
