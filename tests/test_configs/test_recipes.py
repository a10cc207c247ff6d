# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The configs say what was published, number by number."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config

CONFIGS = Path(__file__).parents[2] / 'configs'
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
NO_DECAY = dict(flat_decay_mult=0.0, custom_keys=dict(pos_embed=dict(decay_mult=0.0)))


def load(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def step(pipeline, kind):
    (found,) = [transform for transform in pipeline if transform['type'] == kind]
    return {key: value for key, value in found.items() if key != 'type'}


def assert_adamw(optim_wrapper, lr, paramwise):
    assert optim_wrapper.optimizer == dict(
        type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=0.05
    )
    assert optim_wrapper.paramwise_cfg == paramwise
    assert optim_wrapper.type == 'AmpOptimWrapper'


@pytest.mark.parametrize(
    'size, arch, width, channels, drop_path',
    [('t', 'tiny', 192, 192, 0), ('s', 'small', 384, 384, 0.05), ('b', 'base', 768, 384, 0.1)],
)
def test_ade20k_model_is_as_published(size, arch, width, channels, drop_path):
    model = load(f'upernet_vil_{size}_ade20k').model
    assert (model.data_preprocessor.mean, model.data_preprocessor.std) == (MEAN, STD)

    backbone = model.backbone
    assert backbone.arch == arch and backbone.img_size == 512
    assert backbone.out_indices == (7, 11, 15, 23) and backbone.final_norm is False
    assert backbone.pyramid.strides == (4, 8, 16, 32)
    assert (backbone.drop_path_rate, backbone.drop_path_mode) == (drop_path, 'linear')

    head, auxiliary = model.decode_head, model.auxiliary_head
    assert head.in_channels == [width] * 4 and head.channels == channels
    assert head.pool_scales == (1, 2, 3, 6)
    assert auxiliary.in_channels == width and auxiliary.channels == channels
    assert (auxiliary.in_index, auxiliary.num_convs, auxiliary.concat_input) == (2, 1, False)
    for each, weight in ((head, 1.0), (auxiliary, 0.4)):
        assert each.num_classes == 150 and each.dropout_ratio == 0
        assert each.norm_cfg.type == 'SyncBN' and each.align_corners is False
        # The mean over the labelled pixels of all processes.
        assert each.loss_decode.type == 'mmvil.engine.GlobalBatchCrossEntropyLoss'
        assert each.loss_decode.loss_weight == weight
    assert model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))


@pytest.mark.parametrize('size', 'tsb')
def test_ade20k_schedule_is_as_published(size):
    cfg = load(f'upernet_vil_{size}_ade20k')
    assert_adamw(cfg.optim_wrapper, 5e-4, dict(layer_decay_rate=0.65, **NO_DECAY))
    assert cfg.optim_wrapper.get('dtype') is None  # float16
    assert 'clip_grad' not in cfg.optim_wrapper
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.type, warm_up.begin, warm_up.end) == ('LinearLR', 0, 1500)
    assert (cosine.type, cosine.begin, cosine.end) == ('CosineAnnealingLR', 1500, 160000)
    assert cosine.eta_min_ratio * cfg.optim_wrapper.optimizer.lr == pytest.approx(1e-6)
    assert cfg.train_cfg.max_iters == 160000
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 16


def test_ade20k_pipelines_are_as_published():
    cfg = load('upernet_vil_t_ade20k')
    bicubic = dict(keep_ratio=True, interpolation='bicubic', backend='pillow')
    train = cfg.train_dataloader.dataset.pipeline
    assert step(train, 'RandomResize') == dict(scale=(2048, 512), ratio_range=(0.5, 2.0), **bicubic)
    assert step(train, 'RandomCrop') == dict(crop_size=(512, 512), cat_max_ratio=0.75)
    assert step(train, 'mmpretrain.ColorJitter') == dict(
        brightness=0.5, contrast=0.5, saturation=0.5, hue=0.25
    )
    assert step(cfg.test_dataloader.dataset.pipeline, 'Resize') == dict(
        scale=(2048, 512), **bicubic
    )
    sizes, flips, *_ = step(cfg.tta_pipeline, 'TestTimeAug')['transforms']
    assert [size.scale[1] / 512 for size in sizes] == [0.75, 1, 1.25, 1.5, 1.75]
    assert [size.scale[0] / 2048 for size in sizes] == [0.75, 1, 1.25, 1.5, 1.75]
    assert [flip.prob for flip in flips] == [0, 1]


@pytest.mark.parametrize('size, width', [('t', 192), ('s', 384), ('b', 768)])
def test_mask2former_is_as_published_on_the_backbone_and_data_of_upernet(size, width):
    cfg, upernet = load(f'mask2former_vil_{size}_ade20k'), load(f'upernet_vil_{size}_ade20k')
    for key in ('backbone', 'data_preprocessor', 'test_cfg'):
        assert cfg.model[key] == upernet.model[key]
    for key in ('train_dataloader', 'val_dataloader', 'train_cfg', 'auto_scale_lr'):
        assert cfg[key] == upernet[key]
    head = cfg.model.decode_head
    assert head.in_channels == [width] * 4 and cfg.model.auxiliary_head is None
    assert (head.num_queries, head.feat_channels, head.out_channels) == (100, 256, 256)
    assert head.pixel_decoder.encoder.num_layers == 6 and head.transformer_decoder.num_layers == 9
    weights = [head[name].loss_weight for name in ('loss_cls', 'loss_mask', 'loss_dice')]
    assert weights == [cost.weight for cost in head.train_cfg.assigner.match_costs] == [2, 5, 5]
    assert head.loss_cls.class_weight == [1] * 150 + [0.1]

    optim = cfg.optim_wrapper
    assert optim.type == 'OptimWrapper' and optim.clip_grad == dict(max_norm=0.01)
    assert (optim.optimizer.lr, optim.optimizer.weight_decay) == (1e-4, 0.05)
    without_decay = {'pos_embed', 'query_embed', 'query_feat', 'level_embed'}
    assert set(optim.paramwise_cfg.custom_keys) == without_decay
    (poly,) = cfg.param_scheduler
    assert (poly.type, poly.power, poly.end) == ('PolyLR', 0.9, 160000)


@pytest.mark.parametrize(
    'size, arch, drop_path', [('t', 'tiny', 0), ('s', 'small', 0.05), ('b', 'base', 0.1)]
)
def test_mask_rcnn_has_one_pyramid_from_the_last_map(size, arch, drop_path):
    cfg = load(f'mask_rcnn_vil_{size}_coco')
    model = cfg.model
    assert (model.data_preprocessor.mean, model.data_preprocessor.std) == (MEAN, STD)
    assert (model.backbone.arch, model.backbone.img_size) == (arch, 1024)
    assert (model.backbone.drop_path_rate, 'out_indices' in model.backbone) == (drop_path, False)
    strides = model.backbone.pyramid.strides
    assert list(strides) == model.rpn_head.anchor_generator.strides == [4, 8, 16, 32, 64]
    for kind in ('bbox', 'mask'):
        extractor = model.roi_head[f'{kind}_roi_extractor']
        assert extractor.featmap_strides == [4, 8, 16, 32]
        assert model.roi_head[f'{kind}_head'].num_classes == 80
    for loader in (cfg.train_dataloader, cfg.test_dataloader):  # the same token grid in both
        pipeline = loader.dataset.pipeline
        assert step(pipeline, 'Resize') == dict(scale=(1024, 1024), keep_ratio=True)
        assert all(each.type != 'Pad' for each in pipeline)  # boxes could lie in the padding
    assert model.data_preprocessor.pad_size_divisor == 1024


def test_mask_rcnn_schedule_is_1x_with_layer_decay():
    cfg = load('mask_rcnn_vil_t_coco')
    optimizer = dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1)
    assert cfg.optim_wrapper.optimizer == optimizer
    assert cfg.optim_wrapper.paramwise_cfg == dict(layer_decay_rate=0.7, **NO_DECAY)
    _, steps = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == steps.end == 12 and steps.milestones == [8, 11]
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 16


@pytest.mark.parametrize('size', 'tsb')
def test_semantic_fpn_replaces_only_the_decoder(size):
    fpn, upernet = load(f'fpn_vil_{size}_ade20k'), load(f'upernet_vil_{size}_ade20k')
    for key in ('backbone', 'data_preprocessor', 'test_cfg'):
        assert fpn.model[key] == upernet.model[key]
    for key in ('train_dataloader', 'test_dataloader', 'tta_pipeline'):
        assert fpn[key] == upernet[key]
    neck, head = fpn.model.neck, fpn.model.decode_head
    assert neck.in_channels == upernet.model.decode_head.in_channels
    assert head.in_channels == [neck.out_channels] * 4
    assert head.feature_strides == list(fpn.model.backbone.pyramid.strides)
    assert fpn.model.auxiliary_head is None


def test_semantic_fpn_schedule_is_as_published():
    cfg = load('fpn_vil_b_ade20k')
    assert cfg.optim_wrapper == dict(
        type='AmpOptimWrapper', optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4)
    )
    (decay,) = cfg.param_scheduler
    assert (decay.type, decay.power, decay.end) == ('PolyLR', 0.9, cfg.train_cfg.max_iters)
    assert cfg.train_cfg.max_iters == 80000
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 16


@pytest.mark.parametrize(
    'size, arch, width, drop_path',
    [('t', 'tiny', 192, 0), ('s', 'small', 384, 0.05), ('b', 'base', 768, 0.2)],
)
@pytest.mark.parametrize('stage, img_size', [('', 224), ('_pretrain192', 192)])
def test_imagenet_model_is_as_published(size, arch, width, drop_path, stage, img_size):
    model = load(f'vil_{size}_imagenet{stage}').model
    preprocessor, backbone = model.data_preprocessor, model.backbone
    assert (preprocessor.mean, preprocessor.std) == (MEAN, STD)
    assert (backbone.arch, backbone.img_size) == (arch, img_size)
    assert backbone.out_type == 'bilateral_concat'
    assert backbone.get('drop_path_rate', 0) == drop_path
    assert backbone.get('drop_path_mode', 'uniform') == 'uniform'
    assert model.head.in_channels == 2 * width
    assert model.head.loss == dict(type='CrossEntropyLoss', use_soft=True)  # no smoothing
    assert model.train_cfg.augments == [
        dict(type='Mixup', alpha=0.8),
        dict(type='CutMix', alpha=1.0),
    ]


@pytest.mark.parametrize(
    'name, lr, epochs, warm_up_epochs, batch, clip',
    [
        ('vil_t_imagenet_pretrain192', 2e-3, 800, 5, 2048, dict(max_norm=1.0)),
        ('vil_s_imagenet_pretrain192', 2e-3, 400, 5, 2048, dict(max_norm=1.0)),
        ('vil_b_imagenet_pretrain192', 2e-3, 400, 5, 2048, dict(max_norm=1.0)),
        ('vil_t_imagenet', 1e-5, 20, 5, 1024, None),
        ('vil_s_imagenet', 1e-5, 20, 5, 1024, None),
        ('vil_b_imagenet', 1e-5, 5, 1, 1024, None),
    ],
)
def test_imagenet_schedule_is_as_published(name, lr, epochs, warm_up_epochs, batch, clip):
    cfg = load(name)
    assert_adamw(cfg.optim_wrapper, lr, NO_DECAY)
    assert cfg.optim_wrapper.dtype == 'bfloat16'
    assert cfg.optim_wrapper.get('clip_grad') == clip
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.type, warm_up.begin, warm_up.end) == ('LinearLR', 0, warm_up_epochs)
    assert cosine.type == 'CosineAnnealingLR' and cosine.eta_min == 1e-6
    assert (cosine.begin, cosine.end) == (warm_up_epochs, epochs)
    assert warm_up.convert_to_iter_based and cosine.convert_to_iter_based
    assert cfg.train_cfg.max_epochs == epochs
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == batch


@pytest.mark.parametrize(
    'name, size', [('vil_t_imagenet', 224), ('vil_t_imagenet_pretrain192', 192)]
)
def test_imagenet_pipelines_are_as_published(name, size):
    cfg = load(name)
    train = cfg.train_dataloader.dataset.pipeline
    test = cfg.test_dataloader.dataset.pipeline
    bicubic = dict(backend='pillow', interpolation='bicubic')
    assert step(train, 'RandomResizedCrop') == dict(
        scale=size, crop_ratio_range=(0.08, 1.0), **bicubic
    )
    assert step(train, 'ColorJitter') == dict(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.0)
    (gray,), (solarize,), (blur,) = step(train, 'RandomChoice')['transforms']
    assert gray.prob == solarize.prob == blur.prob == 1  # always one of the three
    assert solarize.thr == 128
    assert blur.magnitude_range == (0.1, 2.0) and blur.magnitude_std == 'inf'
    assert step(test, 'ResizeEdge') == dict(scale=size, edge='short', **bicubic)
    assert step(test, 'CenterCrop') == dict(crop_size=size)


@pytest.mark.parametrize(
    'name, arch, width, drop_path',
    [('vil1_s_plus', 'small_plus', 384, 0.05), ('vil1_b', 'base', 768, 0.2)],
)
def test_long_sequence_recipe_is_as_published(name, arch, width, drop_path):
    cfg = load(f'{name}_imagenet_stride8')
    backbone = cfg.model.backbone
    assert (backbone.version, backbone.arch, backbone.stride) == (1, arch, 8)
    assert backbone.img_size == 224 and 'patch_size' not in backbone  # 16
    assert (backbone.out_type, backbone.drop_path_rate) == ('bilateral_avg', drop_path)
    assert cfg.model.head.in_channels == width
    assert cfg.optim_wrapper.optimizer == dict(
        type='AdamW', lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-8
    )
    assert cfg.optim_wrapper.paramwise_cfg == NO_DECAY
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == ('AmpOptimWrapper', 'bfloat16')
    assert 'clip_grad' not in cfg.optim_wrapper
    (warm_up,) = cfg.param_scheduler  # then constant
    assert (warm_up.type, warm_up.begin, warm_up.end) == ('LinearLR', 0, 5)
    assert cfg.train_cfg.max_epochs == 30
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 1024
    finetune = load('vil_t_imagenet')
    assert cfg.model.train_cfg == finetune.model.train_cfg
    for loader in ('train_dataloader', 'val_dataloader'):
        assert cfg[loader].dataset == finetune[loader].dataset


@pytest.mark.parametrize('name', ['a', 'r', 'sketch', 'c'])
@pytest.mark.parametrize('size', 'tsb')
def test_robustness_is_evaluated_as_imagenet_is(size, name):
    cfg, imagenet = load(f'robustness/vil_{size}_imagenet_{name}'), load(f'vil_{size}_imagenet')
    dataset = cfg.test_dataloader.dataset
    for part in dataset.get('datasets', [dataset]):
        assert part.pipeline == imagenet.test_dataloader.dataset.pipeline
    for key in ('arch', 'img_size', 'out_type'):
        assert cfg.model.backbone[key] == imagenet.model.backbone[key]
    assert cfg.model.head == imagenet.model.head
    assert cfg.model.data_preprocessor == imagenet.model.data_preprocessor


@pytest.mark.parametrize('name', ['a', 'r'])
def test_robustness_subsets_are_the_200_classes(name):
    timm = find_spec('timm')
    if timm is None:
        pytest.skip('the lists of classes are in timm')
    folder = Path(timm.origin).parent / 'data/_info'
    synsets, subset = (
        (folder / f'imagenet{part}_synsets.txt').read_text().split() for part in ('', f'_{name}')
    )
    classes = load(f'robustness/vil_t_imagenet_{name}').test_evaluator.classes
    assert [synsets[i] for i in classes] == sorted(subset)
    assert synsets == sorted(synsets)  # the order of folders is the order of classes


def test_imagenet_c_has_15_corruptions_at_5_severities():
    cfg = load('robustness/vil_t_imagenet_c')
    prefixes = {part.data_prefix for part in cfg.test_dataloader.dataset.datasets}
    names = cfg.test_evaluator.reference_errors
    assert len(names) == 15
    assert prefixes == {f'{name}/{severity}' for name in names for severity in range(1, 6)}


VTAB_CLASSES = dict(
    **dict(caltech101=102, cifar=100, dtd=47, oxford_flowers102=102, oxford_iiit_pet=37),
    **dict(svhn=10, sun397=397, patch_camelyon=2, eurosat=10, resisc45=45),
    **dict(diabetic_retinopathy=5, clevr_count=8, clevr_dist=6, dmlab=6, kitti=4),
    **dict(dsprites_loc=16, dsprites_ori=16, smallnorb_azi=18, smallnorb_ele=9),
)


def test_vtab1k_has_19_datasets():
    assert {path.stem for path in (CONFIGS / 'vtab1k').glob('*.py')} == set(VTAB_CLASSES)
    for name, classes in VTAB_CLASSES.items():
        assert load(f'vtab1k/{name}').model.head.num_classes == classes


@pytest.mark.parametrize('name', VTAB_CLASSES)
def test_vtab1k_recipe_is_as_published(name):
    cfg = load(f'vtab1k/{name}')
    model = cfg.model
    assert (model.data_preprocessor.mean, model.data_preprocessor.std) == (MEAN, STD)
    assert model.train_cfg is None and 'drop_path_rate' not in model.backbone
    assert (model.backbone.img_size, model.backbone.out_type) == (224, 'bilateral_concat')
    assert model.head.loss == dict(type='CrossEntropyLoss', use_soft=False)

    train, val = cfg.train_dataloader, cfg.val_dataloader
    assert train.batch_size == cfg.auto_scale_lr.base_batch_size == 64 and train.drop_last
    assert (train.dataset.ann_file, val.dataset.ann_file) == ('train800.txt', 'val200.txt')
    for loader in (train, val):
        load_file, resize, _ = loader.dataset.pipeline
        assert load_file == dict(type='LoadImageFromFile')
        assert resize == dict(
            type='Resize', scale=(224, 224), backend='pillow', interpolation='bicubic'
        )

    assert_adamw(cfg.optim_wrapper, 1e-3, dict(layer_decay_rate=0.65, flat_decay_mult=0.0))
    assert cfg.optim_wrapper.dtype == 'bfloat16' and 'clip_grad' not in cfg.optim_wrapper
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.type, warm_up.begin, warm_up.end) == ('LinearLR', 0, 5)
    assert (cosine.type, cosine.begin, cosine.end) == ('CosineAnnealingLR', 5, 50)
    assert cosine.eta_min == 0 and cfg.train_cfg.max_epochs == 50
    assert warm_up.convert_to_iter_based and cosine.convert_to_iter_based


@pytest.mark.parametrize('other', ['upernet_r18_camvid', 'fpn_vil_t_camvid'])
def test_camvid_networks_are_compared_under_equal_conditions(other):
    vil, other = load('upernet_vil_t_camvid'), load(other)
    for key in ('train_dataloader', 'val_dataloader', 'optim_wrapper', 'param_scheduler'):
        assert vil[key] == other[key]
    for key in ('channels', 'num_classes', 'loss_decode', 'norm_cfg'):
        assert vil.model.decode_head[key] == other.model.decode_head[key]
    assert vil.model.test_cfg == other.model.test_cfg
    assert len(vil.val_dataloader.dataset.metainfo.classes) == vil.model.decode_head.num_classes


@pytest.mark.parametrize(
    'size, arch, width', [('t', 'tiny', 192), ('s', 'small', 384), ('b', 'base', 768)]
)
def test_simmim_recipe_is_as_published(size, arch, width):
    cfg = load(f'simmim_vil_{size}_pretrain192')
    model = cfg.model
    assert (model.data_preprocessor.mean, model.data_preprocessor.std) == (MEAN, STD)
    assert (model.backbone.arch, model.backbone.img_size) == (arch, 192)
    assert (model.neck.in_channels, model.neck.encoder_stride) == (width, 16)
    assert (model.head.patch_size, model.head.loss.criterion) == (16, 'L1')
    pipeline = cfg.train_dataloader.dataset.pipeline
    assert step(pipeline, 'RandomResizedCrop') == dict(scale=192, crop_ratio_range=(0.67, 1.0))
    assert step(pipeline, 'SimMIMMaskGenerator') == dict(
        input_size=192, mask_patch_size=32, model_patch_size=16, mask_ratio=0.6
    )
    custom_keys = {**NO_DECAY['custom_keys'], 'mask_token': dict(decay_mult=0.0)}
    assert_adamw(cfg.optim_wrapper, 8e-4, dict(flat_decay_mult=0.0, custom_keys=custom_keys))
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5.0)
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.begin, warm_up.end, cosine.begin, cosine.end) == (0, 10, 10, 100)
    assert (warm_up.start_factor, cosine.eta_min_ratio) == (0.005, 0.05)  # of 2e-4
    assert cfg.train_cfg.max_epochs == 100
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 2048
