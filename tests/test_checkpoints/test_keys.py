"""Official state dicts in both layouts."""

import json

import pytest
import torch

from mmvil import VisionLSTM
from mmvil.checkpoints import (
    OFFICIAL_CHECKPOINTS,
    find_official,
    infer_architecture,
    is_official,
    vil_to_mmvil,
    weights_of,
)
from tests.conftest import REFERENCE, ROOT


def load(name):
    return torch.load(ROOT / 'tests/data' / f'{name}.pt', weights_only=True)['state_dict']


def save(path, state_dict, **others):
    torch.save(dict(state_dict=state_dict, **others), path)
    return path


def to_standalone(state_dict, version):
    """Rename a training checkpoint to the layout of the standalone models."""
    renamed = {}
    for key, value in state_dict.items():
        if key.startswith('xlstm.blocks.'):
            _, _, block, rest = key.split('.', 3)
            rest = rest.replace('xlstm_norm', 'norm').replace('conv1d', 'conv')
            rest = rest.replace('conv.conv', 'conv').replace('xlstm.', 'layer.')
            if version == 2:
                side = 'rowwise_from_bot_right' if int(block) % 2 else 'rowwise_from_top_left'
                block = f'{int(block) // 2}.{side}'
            key = f'blocks.{block}.{rest}'
        after_blocks, after_pooling = ('norm', 'legacy_norm')[:: 1 if version == 2 else -1]
        key = key.replace('xlstm.post_blocks_norm', after_blocks)
        renamed[key.replace('head.0', after_pooling).replace('head.1', 'head')] = value
    return renamed


@pytest.mark.parametrize('version', [1, 2])
def test_both_official_layouts_give_the_same(version):
    source = load(f'vil{version}_dim32')
    expected = vil_to_mmvil(source)
    actual = vil_to_mmvil(to_standalone(source, version))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_norms_inside_the_stack_get_their_one_and_the_others_do_not():
    source = {key: torch.zeros_like(value) for key, value in load('vil2_dim32').items()}
    converted = vil_to_mmvil(source)
    ones = {key for key, value in converted.items() if value.any()}
    expected = {'backbone.norm.weight'}
    for block in range(4):
        expected |= {f'backbone.layers.{block}.{norm}.weight' for norm in ('norm', 'out_norm')}
    assert ones == expected and all((converted[key] == 1).all() for key in ones)


def test_causal_masks_are_dropped():
    source = load('vil1_dim32')
    masked = {**source, 'xlstm.blocks.0.xlstm.mlstm_cell.causal_mask': torch.ones(1)}
    assert vil_to_mmvil(masked).keys() == vil_to_mmvil(source).keys()


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('nested', [True, False])
def test_weights_of_a_checkpoint_have_our_names(prefix, nested):
    official = load('vil2_dim32')
    expected = vil_to_mmvil(official)
    for state in (official, expected):
        state = {prefix + name: value for name, value in state.items()}
        found = weights_of(dict(state_dict=state, meta={}) if nested else state)
        assert found is not state and found.keys() == expected.keys()


@pytest.mark.parametrize('checkpoint', [[torch.zeros(1)], torch.zeros(1), dict(state_dict=None)])
def test_weights_of_rejects_what_is_no_state_dict(checkpoint):
    with pytest.raises(ValueError, match='must be a state dict, .* not of type'):
        weights_of(checkpoint)


def test_other_state_dicts_are_rejected():
    assert not is_official({'layers.0.skip': torch.ones(1)})
    with pytest.raises(ValueError, match='not an official Vision-LSTM state dict'):
        vil_to_mmvil({'conv1.weight': torch.ones(1)})
    with pytest.raises(ValueError, match='Unknown names .*: xlstm.blocks.0.surprise.weight'):
        vil_to_mmvil({**load('vil2_dim32'), 'xlstm.blocks.0.surprise.weight': torch.ones(1)})


@pytest.mark.skipif(
    not (REFERENCE / 'official_checkpoint_keys.json').exists(),
    reason='the list of official keys is not there',
)
def test_all_published_layouts_load_strictly():
    listed = json.loads((REFERENCE / 'official_checkpoint_keys.json').read_text())
    assert len(listed) == 6
    for name, shapes in listed.items():
        with torch.device('meta'):
            source = {key: torch.empty(shape) for key, shape in shapes.items()}
            depth = 1 + max(int(key.split('.')[2]) for key in shapes if 'xlstm.blocks' in key)
            version = 2 if name.startswith('vil2') else 1
            width = shapes['pos_embed.embed'][-1]
            backbone = VisionLSTM(
                arch=dict(embed_dims=width, depth=depth),
                version=version,
                stride=8 if 'stride8' in name else None,
                out_type='bilateral_concat' if version == 2 else 'bilateral_avg',
            )
            converted = vil_to_mmvil(source)
        own = {f'backbone.{key}': tuple(x.shape) for key, x in backbone.state_dict().items()}
        own.update({'head.fc.weight': (1000, width * version), 'head.fc.bias': (1000,)})
        assert {key: tuple(value.shape) for key, value in converted.items()} == own


# ---------------------------------------------------------------------------- what tensors tell


@pytest.mark.parametrize('version, classes_of', [(1, 'bilateral_avg'), (2, 'bilateral_concat')])
def test_architecture_is_read_off_the_tensors(version, classes_of):
    assert infer_architecture(vil_to_mmvil(load(f'vil{version}_dim32'))) == dict(
        version=version,
        embed_dims=32,
        depth=4,
        num_heads=4,
        patch_size=16,
        in_channels=3,
        img_size=(64, 64),
        out_type=classes_of,
        num_classes=10,
    )


def test_architecture_of_other_sizes():
    converted = vil_to_mmvil(load('vil2_dim32'))
    converted['backbone.patch_embed.projection.weight'] = torch.zeros(32, 5, 8, 8)
    converted['backbone.pos_embed'] = torch.zeros(1, 3, 7, 32)
    converted['head.fc.weight'] = torch.zeros(2, 64)
    found = infer_architecture(converted)
    assert (found['patch_size'], found['in_channels'], found['num_classes']) == (8, 5, 2)
    assert found['img_size'] == (24, 56)  # height first


@pytest.mark.parametrize('name', ['head.fc.weight', 'backbone.pos_embed'])
def test_architecture_names_the_tensor_that_it_misses(name):
    converted = vil_to_mmvil(load('vil2_dim32'))
    with pytest.raises(ValueError, match=f'needs {name} .* missing'):
        infer_architecture({key: value for key, value in converted.items() if key != name})
    with pytest.raises(ValueError, match=rf'{name} .* of shape \(3,\)'):
        infer_architecture({**converted, name: torch.zeros(3)})


# ------------------------------------------------------------------------ what the authors publish


def test_official_checkpoints_are_those_of_the_reference():
    files = {each.file for each in OFFICIAL_CHECKPOINTS}
    assert len(files) == 13
    assert {each.name for each in OFFICIAL_CHECKPOINTS} == {
        file.removesuffix('.th').replace('_in1k', '').replace('_e400', '').replace('_e800', '')
        for file in files
    } | {'vil2_tiny16_e400', 'vil_tiny16_e400', 'vil_tinyplus16_e400'}
    for each in OFFICIAL_CHECKPOINTS:
        assert (each.version == 2) == each.file.startswith('vil2_')
        assert (each.stride == 8) == ('stride8' in each.file)
        assert each.arch.replace('_', '') in each.file


@pytest.mark.parametrize(
    'address',
    [
        'mmvil://vil2_base16',
        'mmvil://vil2_base16_e400_in1k.th',
        'https://ml.jku.at/research/vision_lstm/download/vil2_base16_e400_in1k.th',
        'vil2-base',
    ],
)
def test_find_official_knows_names_files_and_urls(address):
    assert find_official(address).file == 'vil2_base16_e400_in1k.th'


def test_find_official_lists_what_there_is():
    with pytest.raises(ValueError, match="'mmvil://vil3'; known names are vil2_tiny16, "):
        find_official('mmvil://vil3')
