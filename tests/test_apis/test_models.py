# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import sys

import pytest

from mmvil import VisionLSTM
from mmvil.apis import models


def test_register_models_makes_every_classifier_known_to_mmpretrain():
    mmpretrain = pytest.importorskip('mmpretrain')
    models.register_models()
    models.register_models()  # once more is harmless

    names = mmpretrain.list_models('vil-*')
    assert len(names) == 6
    for name in names:
        config = mmpretrain.ModelHub.get(name).config  # read from where the metafile says
        assert config.model.backbone.type == 'mmvil.VisionLSTM'


def test_register_models_lets_get_model_build():
    mmpretrain = pytest.importorskip('mmpretrain')
    models.register_models()
    model = mmpretrain.get_model('vil-tiny_in1k')
    assert isinstance(model.backbone, VisionLSTM)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == model._metainfo.metadata.data['Parameters']


def test_register_models_without_mmpretrain_says_what_is_missing(monkeypatch):
    for module in ('mmpretrain', 'mmpretrain.apis'):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'register_models\(\) needs mmpretrain'):
        models.register_models.__wrapped__()


def test_root_is_that_of_the_installed_package_or_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(models, '__file__', str(tmp_path / 'mmvil' / 'apis' / 'models.py'))
    with pytest.raises(FileNotFoundError, match='pip install'):
        models._root()
    for root in (tmp_path, tmp_path / 'mmvil' / '.mim'):  # the latter is preferred
        (root / 'configs').mkdir(parents=True)
        (root / 'configs' / 'metafile_imagenet.yml').touch()
        assert models._root() == root
