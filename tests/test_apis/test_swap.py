# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""swap_backbone puts ViL into the configs that the installed OpenMMLab libraries bring along."""

import copy
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmvil import LayerDecayOptimWrapperConstructor, VisionLSTM, swap_backbone
from mmvil.apis.swap.recipe import drop_old_weights
from mmvil.apis.swap.rewire import choose_out_indices
from tests.conftest import ROOT

TINY = dict(embed_dims=32, depth=10)
SIMMIM = 'mmpretrain/simmim/simmim_swin-base-w6_8xb256-amp-coslr-100e_in1k-192px.py'
PSPNET = 'mmseg/pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py'
UPERNET = 'mmseg/upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'
RESNET = 'mmpretrain/resnet/resnet50_8xb32_in1k.py'


def config_file(name):
    library, _, path = name.partition('/')
    root = Path(pytest.importorskip(library).__file__).parent / '.mim' / 'configs'
    if not (root / path).exists():
        pytest.skip(f'{library} is installed without {path}')
    return root / path


def load(name):
    return Config.fromfile(config_file(name))


@pytest.fixture(scope='module')
def matrix():
    """The tool that makes docs/swap_matrix.md."""
    folder = str(ROOT / 'tools' / '.dev_scripts')
    sys.path.insert(0, folder)
    try:
        return importlib.import_module('swap_matrix')
    finally:
        sys.path.remove(folder)


# -- It trains and predicts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name',
    [
        PSPNET,
        'mmseg/fastfcn/fastfcn_r50-d32_jpu_enc_4xb4-80k_ade20k-512x512.py',
        'mmseg/sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
        'mmseg/knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py',
        'mmseg/ocrnet/ocrnet_hr18_4xb4-80k_ade20k-512x512.py',
        'mmseg/segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py',
        RESNET,
        'mmpretrain/simsiam/simsiam_resnet50_8xb32-coslr-100e_in1k.py',
        SIMMIM,
    ],
    ids=lambda name: Path(name).stem,
)
def test_swapped_config_trains_every_parameter_and_predicts(matrix, name):
    assert matrix.try_config(config_file(name))[0] == 'works'


def rows_of_matrix(verdict):
    page = ROOT / 'docs' / 'swap_matrix.md'
    library, rows = None, []
    for line in page.read_text().splitlines() if page.exists() else []:
        if line.startswith('## '):
            library = re.match(r'## (\w+)', line)[1]
        cells = [cell.strip() for cell in line.split('|')]
        if len(cells) > 4 and cells[3] == verdict:
            rows.append(f'{library}/{cells[1].strip("`")}')
    return rows


# 15 minutes on one core.
@pytest.mark.slow
@pytest.mark.parametrize('name', rows_of_matrix('works'))
def test_configs_that_work_in_the_swap_matrix_train(matrix, name):
    verdict, remarks = matrix.try_config(config_file(name))
    if verdict == 'untested' or (verdict == 'cannot' and 'not installed' in remarks):
        pytest.skip(f'mmdet or compiled operators of mmcv are missing: {remarks}')
    assert verdict == 'works', remarks


# -- docs/swap_backbone.md -------------------------------------------------------------------------


def child_configs():
    """The configs of the page: {name of the base: text}."""
    page = (ROOT / 'docs' / 'swap_backbone.md').read_text()
    blocks = re.findall(r"```python\n(_base_ = '\./(\S+)\.py'.*?)```", page, re.DOTALL)
    return {base: text for text, base in blocks}


@pytest.mark.parametrize('base, text', child_configs().items(), ids=child_configs())
def test_child_configs_of_the_page_are_short_and_equal_swap_backbone(base, text, tmp_path):
    assert len(text.splitlines()) <= 6
    path = None
    for library in ('mmseg', 'mmpretrain'):
        root = Path(pytest.importorskip(library).__file__).parent / '.mim' / 'configs'
        path = next(root.glob(f'*/{base}.py'), path)
    (tmp_path / 'child.py').write_text(text.replace(f'./{base}.py', str(path)))
    model = Config.fromfile(tmp_path / 'child.py').model
    kept = bool(model.backbone.get('pyramid', {}).get('out_channels'))
    assert same(model, swap_backbone(path, 'small', keep_channels=kept).model)


def same(one, other):
    """Equality of configs; a tuple counts as a list, what is absent as None."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(same(one.get(key), other.get(key)) for key in {*one, *other})
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# -- What is changed, and what is not --------------------------------------------------------------


def test_swap_rewrites_what_heads_read_and_leaves_the_rest():
    old = load(PSPNET)
    untouched = copy.deepcopy(old)
    cfg = swap_backbone(old, 'vil-t', checkpoint='vil.th', drop_path_rate=0.1)
    assert old.to_dict() == untouched.to_dict()

    backbone = cfg.model.backbone
    assert backbone.type == 'mmvil.VisionLSTM' and backbone.arch == 't'
    assert backbone.img_size == 512 and backbone.drop_path_rate == 0.1
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint='vil.th')
    assert backbone.out_indices == (7, 11, 15, 23)
    # Nobody reads the first two of the maps at 4, 8, 8, 8: they stay at 16, without parameters.
    assert backbone.pyramid == dict(strides=(16, 16, 8, 8), norm_cfg=dict(type='SyncBN'))
    assert cfg.model.pretrained is None

    expected = untouched.to_dict()
    for head in ('decode_head', 'auxiliary_head'):
        assert cfg.model[head].in_channels == 192
        expected['model'][head]['in_channels'] = 192
    expected['model'].update(backbone=backbone.to_dict(), pretrained=None)
    assert cfg.to_dict() == expected


def test_swap_trusts_the_config_of_heads_that_do_not_run_on_meta(monkeypatch):
    decode_heads = pytest.importorskip('mmseg.models.decode_heads')
    monkeypatch.setattr(decode_heads.PSPHead, 'forward', lambda *_: torch.ops.aten.no_such_op())
    cfg = swap_backbone(load(PSPNET), TINY)
    assert cfg.model.backbone.pyramid.strides == (16, 16, 8, 8)
    assert cfg.model.backbone.pyramid.out_channels == (None, None, 1024, 2048)
    assert cfg.model.decode_head.in_channels == 2048


def test_swap_builds_no_unused_blocks():
    cfg = load(PSPNET)
    cfg.model.decode_head.update(in_index=1, in_channels=512)
    cfg.model.auxiliary_head = None
    cfg = swap_backbone(cfg, 'tiny')
    assert cfg.model.backbone.out_indices == (11, 23)
    assert cfg.model.backbone.pyramid.strides == (16, 8)


def test_swap_can_keep_the_channels_of_the_old_backbone():
    old = load(UPERNET)
    cfg = swap_backbone(old, TINY, keep_channels=True)
    assert cfg.model.decode_head == old.model.decode_head
    assert cfg.model.backbone.pyramid.strides == (4, 8, 16, 32)
    assert cfg.model.backbone.pyramid.out_channels == (256, 512, 1024, 2048)


def test_swap_keeps_channels_where_a_head_hard_codes_more():
    """This FCN head has no convolution, so its in_channels must equal its channels."""
    old = load('mmseg/segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py')
    cfg = swap_backbone(old, TINY)
    assert cfg.model.decode_head == old.model.decode_head
    assert cfg.model.backbone.pyramid.out_channels == (384,)


def test_swap_leaves_pyramids_to_necks_that_make_them():
    cfg = swap_backbone(load('mmseg/vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py'), TINY)
    assert 'pyramid' not in cfg.model.backbone  # plain maps at stride 16
    assert cfg.model.neck.in_channels == [32] * 4


def test_swap_takes_the_outputs_of_a_backbone_that_cannot_be_built():
    cfg = load(UPERNET)
    cfg.model.backbone = dict(type='NotInstalled')
    with pytest.raises(ValueError, match='NotInstalled.*outputs='):
        swap_backbone(cfg, TINY)
    cfg = swap_backbone(cfg, TINY, outputs=[(256, 4), (512, 8), (1024, 16), (2048, 32)])
    assert cfg.model.decode_head.in_channels == [32] * 4
    assert cfg.model.backbone.pyramid.strides == (4, 8, 16, 32)


@pytest.mark.parametrize('given', [dict(pretrained=False), dict(pretrained=True), {}], ids=str)
def test_swap_downloads_no_weights_of_a_timm_backbone(monkeypatch, given):
    timm = pytest.importorskip('timm')
    create, asked = timm.create_model, []

    def record(*args, pretrained, **kwargs):
        asked.append(pretrained)
        return create(*args, pretrained=False, **kwargs)

    cfg = load(UPERNET)
    monkeypatch.setattr('mmseg.models.backbones.timm_backbone.timm.create_model', record)
    maps = dict(features_only=True, out_indices=(1, 2, 3, 4))
    cfg.model.backbone = dict(type='TIMMBackbone', model_name='resnet50', **maps, **given)
    assert swap_backbone(cfg, TINY).model.decode_head.in_channels == [32] * 4
    assert asked and not any(asked)


@pytest.mark.parametrize('version, out_type, width', [(2, 'concat', 384), (1, 'avg', 192)])
def test_swap_gives_classifiers_the_pooling_of_vil(version, out_type, width):
    cfg = swap_backbone(load(RESNET), 'tiny', version=version)
    assert cfg.model.neck is None
    assert cfg.model.backbone.out_type == f'bilateral_{out_type}'
    assert cfg.model.backbone.img_size == 224
    assert cfg.model.head.in_channels == width


def test_swap_freezes_vil_for_linear_probes():
    cfg = load('mmpretrain/mae/benchmarks/vit-base-p16_8xb2048-linear-coslr-90e_in1k.py')
    cfg = swap_backbone(cfg, 'tiny')
    assert cfg.model.backbone.frozen_stages == 24
    assert cfg.model.neck.input_features == cfg.model.head.in_channels == 384
    network = VisionLSTM(**{k: v for k, v in cfg.model.backbone.items() if k != 'type'})
    trainable = [name for name, p in network.named_parameters() if p.requires_grad]
    assert all('norm' in name and 'layers' not in name for name in trainable)

    old = load('mmpretrain/mae/benchmarks/vit-base-p16_8xb2048-linear-coslr-90e_in1k.py')
    backbone = swap_backbone(old, 'tiny', out_indices=11).model.backbone
    assert (backbone.out_indices, backbone.frozen_stages) == (11, 12)


def test_swap_keeps_a_blanket_init_cfg_from_overwriting_the_gates():
    old = load('mmpretrain/swin_transformer/swin-tiny_16xb64_in1k.py')
    assert old.model.init_cfg[0]['layer'] == 'Linear'
    cfg = swap_backbone(old, TINY)
    assert cfg.model.head.init_cfg == old.model.init_cfg
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    model.init_weights()
    bias = model.backbone.layers[0].fgate.bias
    torch.testing.assert_close(bias, torch.linspace(3, 6, len(bias)))


def test_swap_recognizes_checkpoints_in_lists_and_by_the_class_that_loads_them():
    pretrained = dict(type='mmengine.model.PretrainedInit', checkpoint='old.pth')
    backbone = dict(type='ResNet', init_cfg=[dict(type='Kaiming', layer='Conv2d'), pretrained])
    head = dict(type='Head', init_cfg=None)
    cfg = Config(dict(model=dict(backbone=backbone, head=head, init_cfg=pretrained)))
    assert "checkpoint 'old.pth' of the old backbone is dropped" in ' '.join(drop_old_weights(cfg))
    assert cfg.model.head.init_cfg is None


@pytest.mark.parametrize('patch', [16, 8])
def test_swap_fits_simmim_to_the_patches_of_vil(patch):
    options = {} if patch == 16 else dict(patch_size=patch)
    old = load(SIMMIM)
    cfg = swap_backbone(old, 'vil-t', checkpoint='vil.th', **options)
    assert cfg.model.backbone == dict(
        type='mmvil.MaskedVisionLSTM',
        arch='t',
        img_size=192,
        init_cfg=dict(type='Pretrained', checkpoint='vil.th'),
        **options,
    )
    assert (cfg.model.neck.in_channels, cfg.model.neck.encoder_stride) == (192, patch)
    assert cfg.model.head.patch_size == patch and cfg.model.head.loss == old.model.head.loss
    transforms = cfg.train_dataloader.dataset.pipeline
    (masks,) = [step for step in transforms if step.type == 'SimMIMMaskGenerator']
    assert masks.model_patch_size == patch and masks.mask_patch_size == 32
    assert old.model.neck.encoder_stride == 32
    assert cfg.optim_wrapper == old.optim_wrapper


def test_swap_cannot_keep_the_channels_of_simmim():
    with pytest.raises(ValueError, match='leave keep_channels out'):
        swap_backbone(load(SIMMIM), TINY, keep_channels=True)


@pytest.mark.parametrize(
    'name, reason',
    [
        ('mmseg/dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py', 'neither class tokens'),
        ('mmseg/ddrnet/ddrnet_23_in1k-pre_2xb6-120k_cityscapes-1024x1024.py', 'in testing'),
        ('mmseg/bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py', 'whole network'),
        ('mmseg/san/san-vit-b16_voc12aug-640x640.py', 'no model.backbone'),
        ('mmpretrain/mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py', 'takes mask besides'),
        ('mmpretrain/beit/beit_beit-base-p16_8xb256-amp-coslr-300e_in1k.py', 'a class token'),
        ('mmpretrain/vgg/vgg11_8xb32_in1k.py', 'heads output'),
        ('mmpretrain/deit/deit-base-distilled_16xb64_in1k.py', 'neither class tokens'),
    ],
)
def test_swap_gives_the_reason_for_rejection(name, reason):
    with pytest.raises(ValueError, match=reason):
        swap_backbone(load(name), TINY)


def test_swap_lists_known_archs():
    with pytest.raises(ValueError, match="Unknown arch 'huge'.*'tiny'"):
        swap_backbone(load(RESNET), 'vil-huge')


@pytest.mark.parametrize('depth', [4, 6, 10, 24, 26, 29])
@pytest.mark.parametrize('number', [1, 2, 3, 4])
def test_out_indices_end_with_the_last_block_and_after_pairs(number, depth):
    indices = choose_out_indices(number, depth)
    assert len(indices) == number and indices[-1] == depth - 1
    assert list(indices) == sorted(set(indices)) and indices[0] >= 0
    if depth >= 24:
        assert all(index % 2 == 1 for index in indices[:-1])


# -- Optimizer and schedule ------------------------------------------------------------------------


def test_swap_uses_the_ade20k_recipe_for_the_iterations_of_the_config():
    cfg = swap_backbone(load(UPERNET), TINY, optim=True)
    ours = Config.fromfile(ROOT / 'configs/_base_/schedules/ade20k_160k.py')
    assert cfg.optim_wrapper == ours.optim_wrapper
    assert cfg.train_cfg.max_iters == 80000
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.begin, warm_up.end, cosine.begin, cosine.end) == (0, 1500, 1500, 80000)
    assert cfg.auto_scale_lr.base_batch_size == 16


def test_swap_leaves_the_warm_up_out_of_a_run_of_a_few_iterations():
    cfg = load(UPERNET)
    cfg.train_cfg.max_iters = 9
    (cosine,) = swap_backbone(cfg, TINY, optim=True).param_scheduler
    assert (cosine.type, cosine.begin, cosine.end) == ('CosineAnnealingLR', 0, 9)


def test_swap_scales_the_imagenet_recipe_to_the_batch_size():
    cfg = swap_backbone(load(RESNET), TINY, optim=True)
    assert cfg.auto_scale_lr.base_batch_size == 256
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(1e-3 * 256 / 1024)
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.end, cosine.end, cosine.by_epoch) == (5, 100, True)


def test_swap_has_no_recipe_for_self_supervised_training():
    with pytest.raises(ValueError, match='mmvil has no recipe for training SimSiam'):
        swap_backbone(
            load('mmpretrain/simsiam/simsiam_resnet50_8xb32-coslr-100e_in1k.py'), TINY, optim=True
        )


def test_swap_replaces_a_layer_decay_that_knows_the_old_layers():
    cfg = swap_backbone(load('mmseg/beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py'), TINY)
    wrapper = cfg.optim_wrapper
    assert wrapper.constructor == 'mmvil.LayerDecayOptimWrapperConstructor'
    assert wrapper.paramwise_cfg.layer_decay_rate == 0.9
    model = torch.nn.Module()
    model.backbone = VisionLSTM(**TINY_ARCH)
    groups = build_optim_wrapper(model, wrapper).optimizer.param_groups
    assert min(group['lr'] for group in groups) == pytest.approx(3e-5 * 0.9**6)
    assert LayerDecayOptimWrapperConstructor.__name__ in wrapper.constructor


TINY_ARCH = dict(arch=TINY, img_size=32)
