# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Replace the backbone of an existing config by Vision-LSTM."""

import copy
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DefaultScope

from .probe import BackboneProbe, type_name
from .recipe import drop_old_weights, replace_constructor, use_recipe
from .rewire import count_blocks, rewire


def swap_backbone(
    cfg: str | Path | Config,
    arch: str | dict = 'small',
    checkpoint: str | None = None,
    optim: bool = False,
    keep_channels: bool = False,
    outputs: Sequence[tuple[int, int]] | None = None,
    **options,
) -> Config:
    """Replace the backbone of a config by Vision-LSTM.

    ViL outputs as many feature maps as the old backbone, at the same strides (not finer than 4); a
    classifier that pools its features gets ViL's own pooling, with which its checkpoints were
    trained. ``in_channels`` of the necks and heads that read them becomes ViL's width. Where a head
    expects more than its config says, ViL's maps are projected to the old widths instead
    (``pyramid.out_channels``), and necks and heads stay as they are. Either way necks and heads are
    run on the new features, on shapes alone.

    Data, crop size, losses, batch size and schedule stay. Dropped are pre-trained weights of the
    old network (``pretrained``, ``init_cfg``, ``load_from``) and a blanket ``model.init_cfg``,
    which would overwrite ViL's initialization. An optimizer constructor that knows the old
    backbone's layers is replaced by :class:`mmvil.LayerDecayOptimWrapperConstructor`. Each change
    is logged.

    Args:
        cfg (str | Path | Config): A config of mmsegmentation, mmpretrain or mmdetection, or its
            file. It is not changed.
        arch (str | dict): As for :class:`mmvil.VisionLSTM`; 'vil-s' and the like are understood,
            too. Default: 'small'.
        checkpoint (str, optional): Weights of ViL, ours or the authors'. Default: None.
        optim (bool): Replace optimizer and learning rate schedule by ours: the ADE20K recipe, or
            for classifiers the ImageNet recipe. The number of iterations or epochs stays, and the
            learning rate is scaled to the batch size in ``auto_scale_lr``. Default: False.
        keep_channels (bool): Always project ViL's maps to the old widths, and leave necks and
            heads alone. Default: False.
        outputs (Sequence[tuple[int, int]], optional): Channels and stride of each map that the old
            backbone outputs. Only needed where it cannot be built. Default: measured.
        **options: Further options of :class:`mmvil.VisionLSTM`, which win over those chosen here:
            ``version``, ``img_size``, ``drop_path_rate``, ``frozen_stages`` ...

    Returns:
        Config: The new config.

    Raises:
        ValueError: If the model has no backbone that ViL can replace, with the reason.

    Example:
        >>> from mmengine.config import Config
        >>> from mmvil import swap_backbone
        >>> cfg = swap_backbone(Config.fromfile('pspnet_r50-d8_4xb4-80k_ade20k-512x512.py'), 'tiny')
        >>> cfg.model.decode_head.in_channels
        192
    """
    cfg = copy.deepcopy(cfg) if isinstance(cfg, Config) else Config.fromfile(cfg)
    model, scope = cfg.get('model') or {}, cfg.get('default_scope')
    if not isinstance(model.get('backbone'), dict):
        raise ValueError(
            f'{Path(cfg.filename or "the config").name} has no model.backbone to replace '
            f'(model.type is {model.get("type")!r}).'
        )
    if isinstance(arch, str):
        arch = arch.lower().replace('-', '_').removeprefix('vil_')
    size = _image_size(cfg)
    with DefaultScope.overwrite_default_scope(scope):
        old = BackboneProbe(model, size, outputs, scope)
        notes = drop_old_weights(cfg)
        backbone = dict(type='mmvil.VisionLSTM', arch=arch)
        backbone['img_size'] = size[0] if size[0] == size[1] else size
        if old.in_channels != 3:
            backbone['in_channels'] = old.in_channels
        if model.backbone.get('with_cp'):
            backbone['with_cp'] = True
        if old.frozen:
            backbone['frozen_stages'] = count_blocks(arch)
        if checkpoint is not None:
            backbone['init_cfg'] = dict(type='Pretrained', checkpoint=str(checkpoint))
        cfg.model, changes = rewire(model, old, {**backbone, **options}, keep_channels)
    notes += changes + replace_constructor(cfg)
    if optim:
        notes += use_recipe(cfg)
    elif 'optim_wrapper' in cfg:
        optimizer = cfg.optim_wrapper.get('optimizer', {})
        notes.append(
            f'optimizer and schedule are still those made for {old.name} '
            f'({optimizer.get("type")}, lr {optimizer.get("lr")}); optim=True takes ours'
        )
    for note in notes:
        print_log(f'swap_backbone: {note}', logger='current')
    return cfg


def _image_size(cfg: Config) -> tuple[int, int]:
    """Size of the training images, height first."""
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    size = preprocessor.get('size') or _crop_size(cfg.get('train_dataloader'))
    size = size or cfg.model.backbone.get('img_size') or 224
    size = (size, size) if isinstance(size, int) else tuple(size)
    return size * 2 if len(size) == 1 else size


def _crop_size(node) -> int | tuple | None:
    """Size of the first crop in a training pipeline."""
    if isinstance(node, dict):
        if type_name(node) in ('RandomCrop', 'RandomResizedCrop', 'CenterCrop'):
            size = node.get('crop_size', node.get('scale'))
            if isinstance(size, int) or all(isinstance(side, int) for side in size):
                return size
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        return next(filter(None, map(_crop_size, node)), None)
    return None
