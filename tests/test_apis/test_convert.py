# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Official checkpoints: converted, described, rejected if incomplete."""

import hashlib
import json

import pytest
import torch
from mmengine.config import Config

from mmvil import VisionLSTM
from mmvil.apis import convert_checkpoint
from mmvil.apis.convert import find_stride
from mmvil.checkpoints import find_official
from tests.conftest import REFERENCE
from tests.test_checkpoints.test_keys import load, save, to_standalone

LISTED = REFERENCE / 'official_checkpoint_keys.json'


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('layout', ['training', 'standalone'])
def test_convert_checkpoint_describes_model_and_source(tmp_path, version, layout):
    source = load(f'vil{version}_dim32')
    source = source if layout == 'training' else to_standalone(source, version)
    path = save(tmp_path / 'small.th', source)
    converted = convert_checkpoint(path)
    assert {value.dtype for value in converted['state_dict'].values()} == {torch.float32}
    meta = converted['meta']
    assert meta['source'] == 'small.th'
    assert meta['source_sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    backbone = Config.fromstring(meta['cfg'], '.py').model.backbone
    assert backbone.arch == dict(embed_dims=32, depth=4) and backbone.version == version
    backbone.pop('type')
    own = VisionLSTM(**backbone).state_dict()
    assert {f'backbone.{name}' for name in own} == {
        name for name in converted['state_dict'] if name.startswith('backbone.')
    }
    wrapped = save(path, {f'module.{name}': x for name, x in source.items()})  # by DDP
    assert convert_checkpoint(wrapped)['state_dict'].keys() == converted['state_dict'].keys()
    torch.save(converted, path)
    torch.load(path, weights_only=True)  # nothing in it but plain types
    with pytest.raises(ValueError, match="already has mmvil's layout"):
        convert_checkpoint(path)


@pytest.mark.skipif(not LISTED.exists(), reason='the list of official keys is not there')
@pytest.mark.parametrize('file', ['vil2_tiny16_e800_in1k.th', 'vil_tinyplus16_e800_in1k.th'])
def test_convert_checkpoint_recognizes_the_published_models(tmp_path, file):
    shapes = json.loads(LISTED.read_text())[file]
    zero = torch.zeros(())  # one number on the disk, seen in every shape
    path = save(tmp_path / file, {key: zero.expand(shape) for key, shape in shapes.items()})
    official = find_official(f'mmvil://{file}')
    backbone = Config.fromstring(convert_checkpoint(path)['meta']['cfg'], '.py').model.backbone
    assert backbone.arch == official.arch and backbone.version == official.version
    assert backbone.img_size == (224, 224) and backbone.stride == official.stride


def test_stride_comes_from_the_caller_the_file_its_name_or_the_patch_size(tmp_path):
    def stride(name, given=None, **notes):
        path = save(tmp_path / name, load('vil1_dim32'), **notes)
        found = convert_checkpoint(path, given)['meta']['architecture']
        return found['stride'], found['stride_from'].split(':')[0]

    assert stride('a.th') == (16, 'assumed')
    assert stride('a_stride8.th') == (8, 'by the name of the file')
    assert stride('a.th', ctor_kwargs=dict(stride=8)) == (8, 'noted in the file')
    assert stride('a.th', ctor_kwargs=dict(stride=None)) == (16, 'assumed')
    model = (
        "model = dict(backbone=dict(type='mmvil.VisionLSTM'{}), head=dict(type='Head', stride=2))"
    )
    for options, expected in (('', 16), (', stride=8', 8), (', patch_size=4', 4)):
        noted = dict(cfg=f'lr = 1e-3\n{model.format(options)}')  # mmengine's text, not run
        assert find_stride(dict(meta=noted), 'a.pth', 16) == (expected, 'noted in the file')
    for text in ('raise SystemExit', 'model = dict(', None, b'', "backbone = dict(type='ViT')"):
        number, origin = find_stride(dict(meta=dict(cfg=text)), 'a.pth', 12)
        assert number == 12 and origin.startswith('assumed')
    assert stride('a_stride8.th', 4, ctor_kwargs=dict(stride=8)) == (4, 'as given')
    with pytest.raises(ValueError, match='cannot|stride must be between 1 and the patch size 16'):
        stride('a.th', 32)


def test_convert_checkpoint_lists_all_mismatches(tmp_path):
    source = load('vil2_dim32')
    del source['xlstm.blocks.1.xlstm.learnable_skip'], source['head.1.bias']
    source['xlstm.blocks.0.surprise'] = torch.zeros(1)
    source['cls_token'] = torch.zeros(1)
    source['xlstm.blocks.2.xlstm.q_proj.weight'] = torch.zeros(16, 4, 5)
    source['pos_embed.embed'] = torch.zeros(1, 4, 4, 31)
    with pytest.raises(ValueError) as error:
        convert_checkpoint(save(tmp_path / 'a.th', source))
    said = str(error.value)
    for expected in (
        'are missing (backbone.layers.1.skip, head.fc.bias)',
        'are unknown (xlstm.blocks.0.surprise, cls_token)',
        'layers.2.q_proj.weight: (16, 4, 5) in the file, (16, 4, 4) in the model',
        'pos_embed: (1, 4, 4, 31) in the file, (1, 4, 4, 32) in the model',
    ):
        assert expected in said
    with pytest.raises(
        ValueError, match='not a complete Vision-LSTM classifier. .* head.fc.weight .* missing'
    ):
        headless = {key: x for key, x in load('vil2_dim32').items() if 'head.1' not in key}
        convert_checkpoint(save(tmp_path / 'a.th', headless))


def test_convert_checkpoint_names_a_block_in_the_middle_that_is_missing(tmp_path):
    source = {key: x for key, x in load('vil2_dim32').items() if '.blocks.1.' not in key}
    with pytest.raises(ValueError, match='4 blocks.* 21 of .* missing .backbone.layers.1.skip, '):
        convert_checkpoint(save(tmp_path / 'a.th', source))


@pytest.mark.parametrize(
    'state_dict',
    [
        {'conv1.weight': torch.zeros(3, 3)},
        {  # the authors' DeiT-III, which shares names with ViL
            'pos_embed.embed': torch.zeros(1, 14, 14, 192),
            'blocks.0.attn.qkv.weight': torch.zeros(2, 2),
        },
    ],
)
def test_convert_checkpoint_rejects_other_models(tmp_path, state_dict):
    with pytest.raises(ValueError, match='a.th: This is not an official Vision-LSTM .*, but '):
        convert_checkpoint(save(tmp_path / 'a.th', state_dict))
