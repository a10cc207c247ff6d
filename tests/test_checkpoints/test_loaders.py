# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Checkpoints by file, name and URL, read without running code."""

import os

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

from mmvil import VisionLSTM
from mmvil.checkpoints import (
    OFFICIAL_CHECKPOINTS,
    cached_path,
    fetch_checkpoint,
    find_official,
    read_checkpoint,
)
from tests.conftest import ROOT
from tests.test_checkpoints.test_keys import load, save


class Attack:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch attacked',)


# ------------------------------------------------------------------------------------------ reading


def test_read_checkpoint_takes_what_the_authors_training_code_writes(tmp_path):
    notes = dict(ctor_kwargs=dict(kind='vislstm', stride=8, input_shape=(3, 224, 224)), ckpt={})
    path = save(tmp_path / 'a.th', load('vil1_dim32'), **notes)
    assert read_checkpoint(path)['ctor_kwargs']['stride'] == 8
    torch.save(load('vil1_dim32'), tmp_path / 'flat.th', _use_new_zipfile_serialization=False)
    assert 'pos_embed.embed' in read_checkpoint(tmp_path / 'flat.th')['state_dict']


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
    with pytest.raises(ValueError, match=r'bad.th asks for posix.system, .*weights_only=False'):
        read_checkpoint('bad.th')
    assert not os.path.exists('attacked')


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('part', [0.01, 0.5, 0.999])
def test_read_checkpoint_reports_damaged_files(tmp_path, zipped, part):
    path = tmp_path / 'half.th'
    torch.save(dict(state_dict=load('vil1_dim32')), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match='half.th is damaged'):
        read_checkpoint(path)


def test_read_checkpoint_rejects_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='Checkpoint not found: .*nothing.th'):
        read_checkpoint(tmp_path / 'nothing.th')
    page = tmp_path / 'page.th'
    page.write_text('<html>404</html>')
    with pytest.raises(ValueError, match='page.th is damaged or not a checkpoint'):
        read_checkpoint(page)
    torch.save([1, 2], tmp_path / 'list.th')
    with pytest.raises(ValueError, match='list.th contains no state dict'):
        read_checkpoint(tmp_path / 'list.th')


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
    checkpoint = CheckpointLoader.load_checkpoint(address, map_location='cpu')
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
    with pytest.raises(ValueError, match='damaged.* Remove .*vil2_tiny16_e800_in1k.th'):
        CheckpointLoader.load_checkpoint('mmvil://vil2_tiny16')


@pytest.mark.parametrize('dropped', ['layers.1.', 'layers.1.xlstm.q_proj.weight'])
def test_official_file_without_a_part_of_a_block_is_rejected(hub, dropped):
    state = {
        name: value
        for name, value in load('vil2_dim32').items()
        if not name.startswith(f'xlstm.{dropped.replace("layers", "blocks")}')
    }
    save(hub / find_official('vil2_tiny16').file, state)
    with pytest.raises(ValueError, match=r'Block 1 does not have .*q_proj.weight.*Remove .*\.th'):
        CheckpointLoader.load_checkpoint('mmvil://vil2_tiny16')


@pytest.mark.parametrize('size, name', [('t', 'tiny'), ('s', 'small'), ('b', 'base')])
def test_segmentation_recipe_starts_from_the_published_checkpoint(size, name):
    backbone = Config.fromfile(ROOT / f'configs/upernet_vil_{size}_ade20k.py').model.backbone
    official = find_official(backbone.init_cfg.checkpoint)
    assert backbone.init_cfg.type == 'Pretrained'
    assert (official.arch, official.version) == (backbone.arch, 2) == (name, 2)
    assert official in OFFICIAL_CHECKPOINTS[:4] and cached_path(official).name
