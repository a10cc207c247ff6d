# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import sys

import pytest
import torch

import mmvil
from mmvil.apis import models
from mmvil.checkpoints import OFFICIAL_CHECKPOINTS
from tests.conftest import ROOT, relative_error

HEAD = dict(in_channels=64)


def tiny():
    """Settings of the small model; mmengine takes the _delete_ out."""
    return dict(backbone=dict(arch=dict(_delete_=True, embed_dims=32, depth=4), img_size=64))


@pytest.fixture
def official():
    """An official checkpoint of a small model, and what it computes."""
    return torch.load(ROOT / 'tests/data/vil2_dim32.pt', weights_only=True)


@pytest.fixture
def file(official, tmp_path):
    path = tmp_path / 'vil2_dim32.th'
    torch.save(dict(state_dict=official['state_dict']), path)
    return path


def test_list_models_filters_by_the_beginning_and_wildcards():
    assert len(mmvil.list_models()) == len(OFFICIAL_CHECKPOINTS) == 13
    assert mmvil.list_models('vil2') == ['vil2-base', 'vil2-small', 'vil2-tiny', 'vil2-tiny-e400']
    assert mmvil.list_models('*stride8') == ['vil-base-stride8', 'vil-smallplus-stride8']
    assert mmvil.list_models('resnet') == []


def test_register_models_makes_every_classifier_known_to_mmpretrain():
    mmpretrain = pytest.importorskip('mmpretrain')
    models.register_models()
    models.register_models()  # once more is harmless

    listed = mmpretrain.list_models('vil', exclude_patterns=['*pretrain'])
    assert set(mmvil.list_models()) <= set(listed)
    for official in OFFICIAL_CHECKPOINTS:
        metainfo = mmpretrain.ModelHub.get(official.model)  # read from where the metafile says
        backbone = metainfo.config.model.backbone
        assert backbone.type == 'mmvil.VisionLSTM' and backbone.arch == official.arch
        assert backbone.get('version', 2) == official.version
        assert backbone.get('stride', 16) == official.stride
        assert metainfo.weights == official.url
        assert metainfo.results[0].metrics['Top 1 Accuracy'] == official.top1


@pytest.mark.parametrize('name', ['vil2-tiny', 'vil-tinyplus', 'vil-smallplus-stride8'])
def test_every_model_has_the_parameters_that_are_listed(name):
    mmpretrain = pytest.importorskip('mmpretrain')
    with torch.device('meta'):
        model = mmvil.get_model(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == mmpretrain.ModelHub.get(name).metadata.data['Parameters']


def test_get_model_computes_the_reference_logits_from_an_official_file(official, file):
    pytest.importorskip('mmpretrain')
    model = mmvil.get_model('vil2-tiny', pretrained=file, num_classes=10, head=HEAD, **tiny())
    assert not model.training
    assert relative_error(model(official['image']), official['logits']) < 1e-5
    (features,) = model.extract_feat(official['image'])
    assert features.shape == (2, 64)


def test_get_model_loads_all_but_the_head_for_other_classes(official, file):
    pytest.importorskip('mmpretrain')
    pretrained = mmvil.get_model('vil2-tiny', file, num_classes=10, head=HEAD, **tiny())
    model = mmvil.get_model('vil2-tiny', file, num_classes=3, head=HEAD, **tiny())
    image = official['image']
    assert model(image).shape == (2, 3)
    assert torch.equal(model.extract_feat(image)[0], pretrained.extract_feat(image)[0])


def test_get_model_names_classes_only_if_the_head_has_them(tmp_path):
    mmpretrain = pytest.importorskip('mmpretrain')
    import numpy as np

    def predict(*args, **kwargs):
        model = mmvil.get_model('vil2-tiny', *args, head=HEAD, **kwargs, **tiny())
        torch.save(
            dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=['a', 'b']))),
            tmp_path / 'own.pth',
        )
        image = np.zeros((64, 64, 3), np.uint8)
        return mmpretrain.inference_model(model, image).get('pred_class')

    assert len(predict()) > 1  # a name of ImageNet's classes
    assert predict(num_classes=2) is None
    assert predict(tmp_path / 'own.pth', num_classes=2) in ('a', 'b')
    assert predict(tmp_path / 'own.pth', num_classes=3) is None


def test_get_model_gives_feature_maps_of_chosen_blocks(official, file):
    pytest.importorskip('mmpretrain')
    model = mmvil.get_model('vil2-tiny', file, out_indices=(1, 2), **tiny())
    assert len(model.backbone.layers) == 3
    assert [tuple(y.shape) for y in model(official['image'])] == [(2, 32, 4, 4)] * 2


def test_get_model_rejects_and_names_mismatches(official, file, tmp_path):
    pytest.importorskip('mmpretrain')
    with pytest.raises(ValueError, match=r'head.fc.weight: \(10, 64\) .*give num_classes'):
        mmvil.get_model('vil2-tiny', file, head=HEAD, **tiny())
    model = mmvil.get_model('vil2-tiny', num_classes=10, head=HEAD, **tiny())
    state = model.state_dict()
    del state['backbone.layers.2.skip'], state['head.fc.bias']
    torch.save(dict(state_dict=state), tmp_path / 'part.pth')
    with pytest.raises(ValueError, match=r'missing \(backbone.layers.2.skip, head.fc.bias\)'):
        mmvil.get_model('vil2-tiny', tmp_path / 'part.pth', num_classes=10, head=HEAD, **tiny())


def test_get_model_reads_files_without_running_code_and_names_what_is_wrong(tmp_path):
    pytest.importorskip('mmpretrain')
    path = tmp_path / 'model.pth'

    def load():
        mmvil.get_model('vil2-tiny', path, head=HEAD, **tiny())

    with pytest.raises(FileNotFoundError, match='Checkpoint not found: .*model.pth'):
        load()
    path.write_text('<!DOCTYPE html>')
    with pytest.raises(ValueError, match='model.pth is damaged or not a checkpoint'):
        load()
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match='model.pth contains no state dict'):
        load()
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(ValueError, match='model.pth asks for torch.nn.modules.linear.Linear'):
        load()
    torch.save({'_orig_mod.backbone.pos_embed': torch.zeros(1)}, path)
    with pytest.raises(ValueError, match='are missing .*; instead, there are _orig_mod.backbone'):
        load()


def test_get_model_adapts_rgb_weights_to_other_channels(official, file):
    settings = tiny()
    settings['backbone'].update(in_channels=1)
    model = mmvil.get_model('vil2-tiny', file, num_classes=10, head=HEAD, **settings)
    weight = official['state_dict']['patch_embed.proj.weight'].sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.backbone.patch_embed.projection.weight, weight)


def test_get_model_says_where_options_of_the_backbone_go():
    with pytest.raises(TypeError, match=r"'vil2-tiny', backbone=dict\(img_size=512\)"):
        mmvil.get_model('vil2-tiny', img_size=512)


def test_get_model_suggests_names():
    with pytest.raises(ValueError, match="'vil2-bse'; choose from .*vil2-base"):
        mmvil.get_model('vil2-bse')


def test_mmpretrain_itself_takes_official_files(official, file):
    mmpretrain = pytest.importorskip('mmpretrain')
    models.register_models()
    settings = dict(tiny(), head=dict(num_classes=10, **HEAD))
    model = mmpretrain.get_model('vil2-tiny', pretrained=str(file), **settings)
    assert relative_error(model(official['image']), official['logits']) < 1e-5


def test_inference_model_classifies_an_image_by_name_and_by_model(file):
    mmpretrain = pytest.importorskip('mmpretrain')
    import numpy as np

    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    model = mmvil.get_model('vil2-tiny', file, num_classes=10, head=HEAD, **tiny())
    result = mmpretrain.inference_model(model, image)
    assert 0 <= result['pred_label'] < 10
    by_name = mmpretrain.inference_model('vil2-tiny', image, pretrained=False)
    assert by_name['pred_class']  # a name of ImageNet's classes


def test_whole_classifier_loads_an_official_state_dict_strictly(official):
    pytest.importorskip('mmpretrain')
    model = mmvil.get_model('vil2-tiny', num_classes=10, head=HEAD, **tiny())
    model.load_state_dict(official['state_dict'], strict=True)
    assert relative_error(model(official['image']), official['logits']) < 1e-5


def test_whole_classifier_starts_from_an_official_file_by_init_cfg(official, file):
    mmpretrain = pytest.importorskip('mmpretrain')
    models.register_models()
    config = mmpretrain.ModelHub.get('vil2-tiny').config
    config.merge_from_dict({'model': dict(tiny(), head=dict(num_classes=10, **HEAD))})
    config.model.init_cfg = dict(type='Pretrained', checkpoint=str(file))
    model = mmpretrain.models.build_classifier(config.model).eval()
    model.init_weights()
    assert relative_error(model(official['image']), official['logits']) < 1e-5

    config.model.backbone.in_channels = 2
    model = mmpretrain.models.build_classifier(config.model)
    model.init_weights()
    weight = official['state_dict']['patch_embed.proj.weight'][:, :2] * 1.5
    torch.testing.assert_close(model.backbone.patch_embed.projection.weight, weight)

    config.model.backbone.arch.embed_dims = 16
    config.model.head.in_channels = 32
    model = mmpretrain.models.build_classifier(config.model)
    with pytest.raises(ValueError, match='official checkpoint does not fit .*embed_dims=16'):
        model.init_weights()


@pytest.mark.parametrize('call', [models.register_models, lambda: mmvil.get_model('vil2-tiny')])
def test_get_model_reports_missing_mmpretrain(monkeypatch, call):
    monkeypatch.setattr(models, '_installed', lambda library: False)
    for module in ('mmpretrain', 'mmpretrain.apis'):
        monkeypatch.setitem(sys.modules, module, None)
    models._register_mmpretrain.cache_clear()
    models.register_models.cache_clear()
    with pytest.raises(ImportError, match=r'\(\) needs mmpretrain'):
        call()


def test_root_is_that_of_the_installed_package_or_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(models, '__file__', str(tmp_path / 'mmvil' / 'apis' / 'models.py'))
    with pytest.raises(FileNotFoundError, match='pip install'):
        models.package_root()
    for root in (tmp_path, tmp_path / 'mmvil' / '.mim'):  # the latter is preferred
        (root / 'configs').mkdir(parents=True)
        (root / 'configs' / 'metafile_imagenet.yml').touch()
        assert models.package_root() == root
