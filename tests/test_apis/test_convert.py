# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Official checkpoints: read without trust, converted, fetched by name."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import _load_checkpoint

from mmvil import VisionLSTM
from mmvil.apis import convert, convert_checkpoint, fetch_checkpoint, read_checkpoint
from mmvil.checkpoints import OFFICIAL_CHECKPOINTS, find_official
from tests.conftest import REFERENCE, ROOT
from tests.test_checkpoints.test_keys import load, to_standalone

LISTED = REFERENCE / 'official_checkpoint_keys.json'


class Attack:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch attacked',)


def save(path, state_dict, **others):
    torch.save(dict(state_dict=state_dict, **others), path)
    return path


# ------------------------------------------------------------------------------------------ reading


def test_read_checkpoint_takes_what_the_authors_training_code_writes(tmp_path):
    notes = dict(ctor_kwargs=dict(kind='vislstm', stride=8, input_shape=(3, 224, 224)), ckpt={})
    path = save(tmp_path / 'a.th', load('vil1_dim32'), **notes)
    assert read_checkpoint(path)['ctor_kwargs']['stride'] == 8
    torch.save(load('vil1_dim32'), tmp_path / 'flat.th', _use_new_zipfile_serialization=False)
    assert 'pos_embed.embed' in read_checkpoint(tmp_path / 'flat.th')['state_dict']


@pytest.mark.skipif(torch.__version__ < '2.6', reason='older PyTorch takes no numbers of NumPy')
def test_read_checkpoint_takes_numbers_of_numpy(tmp_path):
    path = save(tmp_path / 'a.th', load('vil1_dim32'), loss=np.float64(0.5), step=np.int64(3))
    assert read_checkpoint(path)['loss'] == 0.5


@pytest.mark.parametrize('zipped', [True, False])
def test_read_checkpoint_executes_nothing(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save(
        dict(state_dict=load('vil1_dim32'), attack=Attack()),
        'bad.th',
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ValueError, match=r'bad.th is refused, .*execute code \(posix.system\)'):
        read_checkpoint('bad.th')
    assert not os.path.exists('attacked')


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('part', [0.01, 0.5, 0.999])
def test_read_checkpoint_says_that_a_file_is_truncated(tmp_path, zipped, part):
    path = tmp_path / 'half.th'
    torch.save(dict(state_dict=load('vil1_dim32')), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match='half.th is truncated'):
        read_checkpoint(path)


def test_read_checkpoint_says_what_else_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match='Checkpoint not found: .*nothing.th'):
        read_checkpoint(tmp_path / 'nothing.th')
    page = tmp_path / 'page.th'
    page.write_text('<html>404</html>')
    with pytest.raises(ValueError, match='page.th is not a PyTorch checkpoint'):
        read_checkpoint(page)
    torch.save([1, 2], tmp_path / 'list.th')
    with pytest.raises(ValueError, match='list.th holds no state dict'):
        read_checkpoint(tmp_path / 'list.th')


# --------------------------------------------------------------------------------------- converting


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
    assert stride('a_stride8.th', 4, ctor_kwargs=dict(stride=8)) == (4, 'as given')
    with pytest.raises(ValueError, match='cannot|stride must be between 1 and the patch size 16'):
        stride('a.th', 32)


def test_convert_checkpoint_names_all_that_is_wrong(tmp_path):
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
        'backbone.layers.1.skip, head.fc.bias.',
        'xlstm.blocks.0.surprise, cls_token.',
        'xlstm.blocks.2.xlstm.q_proj.weight: (16, 4, 5) instead of (16, 4, 4)',
        'pos_embed.embed: (1, 4, 4, 31) instead of (1, 4, 4, 32)',
    ):
        assert expected in said
    with pytest.raises(
        ValueError, match='no complete Vision-LSTM classifier. .* no head.fc.weight'
    ):
        headless = {key: x for key, x in load('vil2_dim32').items() if 'head.1' not in key}
        convert_checkpoint(save(tmp_path / 'a.th', headless))


def test_convert_checkpoint_names_a_block_in_the_middle_that_is_missing(tmp_path):
    source = {key: x for key, x in load('vil2_dim32').items() if '.blocks.1.' not in key}
    with pytest.raises(ValueError, match='Missing .* 19: backbone.layers.1.skip, .*4 blocks|4 blo'):
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
def test_convert_checkpoint_refuses_other_models(tmp_path, state_dict):
    with pytest.raises(ValueError, match='a.th is not a Vision-LSTM in an official layout'):
        convert_checkpoint(save(tmp_path / 'a.th', state_dict))


# ----------------------------------------------------------------------------------------- fetching


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache, a small stand-in for the official files, and no internet."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))

    def no_internet(url, dst, **kwargs):
        raise OSError('Name or service not known')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_internet)
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    return tmp_path / 'hub/checkpoints'


def test_offline_the_error_says_which_file_to_place_where(hub):
    with pytest.raises(FileNotFoundError) as error:
        fetch_checkpoint('mmvil://vil2_base16')
    said = str(error.value)
    assert 'vil2_base16_e400_in1k.th is not in the cache' in said
    assert 'Name or service not known' in said
    assert f'put it at {hub / "vil2_base16_e400_in1k.th"}' in said
    assert 'https://ml.jku.at/research/vision_lstm/download/vil2_base16_e400_in1k.th' in said


def test_download_goes_where_mmengine_looks_and_happens_once(hub, monkeypatch):
    downloads = []

    def download(url, dst, **kwargs):
        downloads.append(url)
        save(dst, load('vil2_dim32'))

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    for _ in range(2):
        assert fetch_checkpoint('mmvil://vil2_tiny16') == hub / 'vil2_tiny16_e800_in1k.th'
    assert downloads == [find_official('mmvil://vil2_tiny16').url]


@pytest.mark.parametrize(
    'address', ['mmvil://vil_base16_stride8', find_official('vil-base-stride8').url]
)
def test_mmengine_loads_official_checkpoints_converted(hub, address):
    save(hub / 'vil_base16_e400_in1k_stride8.th', load('vil1_dim32'))
    checkpoint = _load_checkpoint(address, map_location='cpu')
    assert checkpoint['meta']['architecture']['stride'] == 8
    backbone = VisionLSTM(
        arch=dict(embed_dims=32, depth=4),
        version=1,
        img_size=96,
        init_cfg=dict(type='Pretrained', checkpoint=address),
    )
    backbone.init_weights()
    expected = checkpoint['state_dict']['backbone.layers.3.proj_down.weight']
    assert torch.equal(backbone.layers[3].proj_down.weight, expected)


def test_damaged_file_in_the_cache_is_to_be_removed(hub):
    (hub / 'vil2_tiny16_e800_in1k.th').write_bytes(b'PK\x03\x04')
    with pytest.raises(ValueError, match='truncated.* Remove .*vil2_tiny16_e800_in1k.th'):
        _load_checkpoint('mmvil://vil2_tiny16')


@pytest.mark.parametrize('size, name', [('t', 'tiny'), ('s', 'small'), ('b', 'base')])
def test_segmentation_recipe_starts_from_the_published_checkpoint(size, name):
    backbone = Config.fromfile(ROOT / f'configs/upernet_vil_{size}_ade20k.py').model.backbone
    official = find_official(backbone.init_cfg.checkpoint)
    assert backbone.init_cfg.type == 'Pretrained'
    assert (official.arch, official.version) == (backbone.arch, 2) == (name, 2)
    assert official in OFFICIAL_CHECKPOINTS[:4] and convert.cached_path(official).name
