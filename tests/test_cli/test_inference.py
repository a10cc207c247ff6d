# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmvil.cli.errors import UserError
from mmvil.cli.inference import ImageReader, build_model, find_images, picture, predict

CLASSIFIER = dict(
    default_scope='mmpretrain',
    model=dict(
        type='ImageClassifier',
        data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3),
        backbone=dict(type='mmvil.VisionLSTM', arch=dict(embed_dims=8, depth=2), img_size=32),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=2, in_channels=8),
        train_cfg=dict(augments=dict(type='Mixup', alpha=0.8)),
    ),
    test_dataloader=dict(
        dataset=dict(
            type='CustomDataset',
            data_root='data',
            classes=['cat', 'dog'],
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='Resize', scale=(32, 32)),
                dict(type='PackInputs'),
            ],
        )
    ),
)


def test_find_images_lists_a_folder_by_name(tmp_path):
    for name in ('b.JPG', 'a.png', 'notes.txt'):
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / 'a.png', tmp_path / 'b.JPG']
    assert find_images(tmp_path / 'notes.txt') == [tmp_path / 'notes.txt']
    with pytest.raises(UserError, match='image not found'):
        find_images(tmp_path / 'none.png')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='no images in'):
        find_images(tmp_path / 'empty')


@pytest.mark.parametrize('wrapped', [False, True])
def test_a_notebook_builds_a_model_and_predicts(tmp_path, wrapped):
    pytest.importorskip('mmpretrain')
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config(CLASSIFIER)
    if wrapped:
        datasets = [cfg.test_dataloader.dataset]
        cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=datasets)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    before = cfg.to_dict()
    model = build_model(cfg, str(tmp_path / 'weights.pth'))
    assert cfg.to_dict() == before and not model.training
    assert list(model.dataset_meta['classes']) == ['cat', 'dog']

    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / 'a.png')
    reader = ImageReader(cfg)
    loaded = reader.load(tmp_path / 'a.png')
    assert loaded['img'].shape == (40, 50, 3)
    result = predict(model, reader.prepare(loaded))
    assert result.pred_score.sum().item() == pytest.approx(1)
    (tmp_path / 'broken.png').write_text('no image')
    with pytest.raises(UserError, match='cannot read the image .*broken.png'):
        reader.load(tmp_path / 'broken.png')
    other = torch.load(tmp_path / 'weights.pth', weights_only=True)['state_dict']
    del other['head.fc.weight']
    torch.save(dict(state_dict=other), tmp_path / 'other.pth')
    with pytest.raises(UserError, match='other.pth does not fit'):
        build_model(cfg, str(tmp_path / 'other.pth'))


def test_picture_keeps_rgb_images_and_stretches_others():
    photograph = np.random.default_rng(0).integers(0, 255, (4, 5, 3)).astype(np.uint8)
    assert (picture(photograph) == photograph[..., ::-1]).all()
    assert (picture(photograph, bgr=False) == photograph).all()
    gray = picture(np.linspace(1000, 5000, 20, dtype=np.float32).reshape(4, 5))
    assert gray.shape == (4, 5, 3) and gray.min() == 0 and gray.max() == 255
    bands = np.full((4, 5, 6), np.nan, np.float32)
    bands[0, 0] = 1
    assert picture(bands).shape == (4, 5, 3)
