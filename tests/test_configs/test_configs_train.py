# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Every config builds its model, and one training step reaches every parameter."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

import mmvil
from mmvil.engine.config_nodes import dicts

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
# Families whose members differ in data and number of classes only.
FAMILIES = sorted((ROOT / 'configs').glob('[!_]*/*.py'))

SIZE = (52, 70)  # neither square nor multiples of the patch

# As published: segmentors in millions, and without the auxiliary head, which only trains.
PARAMETERS = dict(
    upernet_vil_t_ade20k=11e6,
    upernet_vil_s_ade20k=42e6,
    upernet_vil_b_ade20k=115e6,
    vil_t_imagenet=6_391_528,
    vil_s_imagenet=23_398_696,
    vil_b_imagenet=89_263_528,
)


METAFILES = {
    Path(model['Config']).stem: model
    for metafile in load(ROOT / 'model-index.yml')['Import']
    for model in load(ROOT / metafile)['Models']
}


def build_model(cfg):
    types = [str(node.get('type')) for node in dicts(cfg.model)]
    for library in sorted(
        {cfg.default_scope, *(name.split('.')[0] for name in types if '.' in name)}
    ):
        pytest.importorskip(library)
    init_default_scope(cfg.default_scope)
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def make_batch(cfg):
    """Two images with labels, as the data loader gives them."""
    if cfg.model.type == 'SimMIM':
        return make_masked_batch(cfg.model.head.patch_size)
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(image_shapes=(3, *SIZE), num_classes=6, with_mask=True)
    images = [torch.randint(256, (3, *SIZE), dtype=torch.uint8) for _ in range(2)]
    samples = []
    for _ in images:
        if cfg.default_scope == 'mmseg':
            from mmseg.structures import SegDataSample

            labels = torch.randint(cfg.model.decode_head.num_classes, (1, *SIZE))
            samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels)))
        else:
            from mmpretrain.structures import DataSample

            samples.append(DataSample().set_gt_label(7))
    return dict(inputs=images, data_samples=samples)


def make_masked_batch(patch):
    """Two images with masks, as the data loader gives them."""
    from mmpretrain.structures import DataSample

    images = torch.randint(256, (2, 3, 4 * patch, 6 * patch), dtype=torch.uint8)
    return dict(inputs=images, data_samples=[DataSample(mask=torch.eye(4, 6)) for _ in images])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_trains_every_parameter(path):
    cfg = Config.fromfile(path)
    if 'size' in cfg.model.data_preprocessor:
        cfg.model.data_preprocessor.size = SIZE  # the crop size, to which images are padded
    if 'pad_size_divisor' in cfg.model.data_preprocessor:
        cfg.model.data_preprocessor.pad_size_divisor = 32
    model = build_model(cfg)
    if path.stem in PARAMETERS:
        count = sum(
            param.numel()
            for name, param in model.named_parameters()
            if not name.startswith('auxiliary_head.')
        )
        tolerance = 0.5e6 if cfg.default_scope == 'mmseg' else 0
        assert abs(count - PARAMETERS[path.stem]) <= tolerance
        assert count == METAFILES[path.stem]['Metadata']['Parameters']

    model.train()
    batch = model.data_preprocessor(make_batch(cfg), training=True)
    losses = model(**batch, mode='loss')
    total, _ = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    lacking = [name for name, param in model.named_parameters() if param.grad is None]
    assert not lacking


def test_detector_predicts_boxes_and_masks():
    cfg = Config.fromfile(ROOT / 'configs/mask_rcnn_vil_t_demo.py')
    model = build_model(cfg).eval()
    with torch.no_grad():
        results = model.test_step(make_batch(cfg))
    assert len(results) == 2
    for found in (result.pred_instances for result in results):
        assert 0 < len(found) <= 100  # untrained, every class has a seventh of the probability
        assert found.bboxes.shape == (len(found), 4) and found.masks.shape == (len(found), *SIZE)
        assert found.masks.dtype == torch.bool
        assert set(found.labels.tolist()) <= set(range(6))


@pytest.mark.parametrize('path', FAMILIES, ids=lambda path: f'{path.parent.stem}-{path.stem}')
def test_config_of_a_family_trains_in_small(path):
    cfg = Config.fromfile(path)
    cfg.model.backbone.arch = dict(embed_dims=16, depth=2)
    cfg.model.head.in_channels = 32
    model = build_model(cfg)
    batch = model.data_preprocessor(make_batch(cfg), training=True)
    classes = cfg.model.head.num_classes
    for sample in batch['data_samples']:
        sample.set_gt_label(sample.gt_label % classes)
    assert model(**batch, mode='predict')[0].pred_score.shape == (classes,)
    model(**batch, mode='loss')['loss'].backward()
    assert not [name for name, param in model.named_parameters() if param.grad is None]


def test_metafiles_name_configs_that_exist():
    assert set(METAFILES) <= {path.stem for path in CONFIGS}
    assert set(PARAMETERS) <= set(METAFILES)


def test_metafiles_reach_the_model_listing_of_mmpretrain():
    model = pytest.importorskip('mmpretrain.apis.model')
    mmvil.register_models()
    assert 'vil2-tiny' in model.list_models('vil', task='Image Classification')
    assert model.ModelHub.get('vil2-base').config.model.backbone.arch == 'base'
