# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Vision-LSTM in place of the backbone of an existing config.

There is no table of network families here. What a backbone feeds is found out by running it on
shapes alone (the meta device): how many maps it puts out, how wide and at which strides, and which
of them the necks and heads read. The swapped network is run in the same way before it is returned.
"""

import copy
from pathlib import Path
from typing import Optional, Sequence, Tuple, Union

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DefaultScope

from .probe import BackboneProbe, type_name
from .recipe import drop_old_weights, replace_constructor, use_recipe
from .rewire import rewire


def swap_backbone(
    cfg: Union[str, Path, Config],
    arch: Union[str, dict] = 'small',
    checkpoint: Optional[str] = None,
    optim: bool = False,
    keep_channels: bool = False,
    outputs: Optional[Sequence[Tuple[int, int]]] = None,
    **options,
) -> Config:
    """Put Vision-LSTM in the place of a config's backbone.

    ViL puts out as many feature maps as the old backbone, at the same strides (not finer than 4);
    a classifier that pools its features gets ViL's own pooling, with which its checkpoints were
    trained. ``in_channels`` of the necks and heads that read them becomes ViL's width. Where a head
    expects more than its config says, ViL's maps are projected to the old widths instead
    (``pyramid.out_channels``), and necks and heads stay as they are. Either way necks and heads are
    run on the new features, on shapes alone.

    Data, crop size, losses, batch size and schedule stay. Gone are pre-trained weights of the old
    network (``pretrained``, ``init_cfg``, ``load_from``), a blanket ``model.init_cfg``, which would
    overwrite ViL's initialization, and an optimizer constructor that knows the old backbone's
    layers, which is replaced by :class:`mmvil.LayerDecayOptimWrapperConstructor`. All this is
    logged.

    Args:
        cfg (str | Path | Config): A config of mmsegmentation, mmpretrain or mmdetection, or its
            file. It is not changed.
        arch (str | dict): As for :class:`mmvil.VisionLSTM`; 'vil-s' and the like are understood,
            too. Default: 'small'.
        checkpoint (str, optional): Weights of ViL, ours or the authors'. Default: None.
        optim (bool): Replace optimizer and learning rate schedule by ours: the ADE20K recipe, or
            for classifiers the ImageNet recipe. The number of iterations or epochs stays, and the
            learning rate is scaled to the batch size in ``auto_scale_lr``. Default: False.
        keep_channels (bool): Project ViL's maps to the old widths in any case, and leave necks and
            heads alone. Default: False.
        outputs (Sequence[tuple[int, int]], optional): Channels and stride of each map that the old
            backbone puts out. Only needed where it cannot be built. Default: measured.
        **options: Further options of :class:`mmvil.VisionLSTM`, which win over what is found out:
            ``version``, ``img_size``, ``drop_path_rate``, ``frozen_stages`` ...

    Returns:
        Config: The new config.

    Raises:
        ValueError: If the model has no backbone that ViL can replace, saying why.

    Example:
        >>> from mmengine.config import Config
        >>> from mmvil import swap_backbone
        >>> cfg = swap_backbone(Config.fromfile('pspnet_r50-d8_4xb4-80k_ade20k-512x512.py'), 'tiny')
        >>> cfg.model.decode_head.in_channels
        192
    """
    cfg = copy.deepcopy(cfg) if isinstance(cfg, Config) else Config.fromfile(cfg)
    model = cfg.get('model') or {}
    if not isinstance(model.get('backbone'), dict):
        raise ValueError(
            f'{Path(cfg.filename or "the config").name} has no model.backbone to replace '
            f'(model.type is {model.get("type")!r}).'
        )
    if isinstance(arch, str):
        arch = arch.lower().replace('-', '_').removeprefix('vil_')
    size = _image_size(cfg)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        old = BackboneProbe(model, size, outputs)
        # mmpretrain's necks and heads pool a single map, whatever its size.
        old.to_pool = cfg.get('default_scope') == 'mmpretrain' and len(old.shapes) == 1
        notes = drop_old_weights(cfg)
        square = size[0] == size[1]
        backbone = dict(type='mmvil.VisionLSTM', arch=arch, img_size=size[0] if square else size)
        backbone.update(old.kept_options(arch))
        if checkpoint is not None:
            backbone['init_cfg'] = dict(type='Pretrained', checkpoint=str(checkpoint))
        model, found = rewire(model, old, {**backbone, **options}, keep_channels)
    cfg.model = model
    notes += found + replace_constructor(cfg)
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


def _image_size(cfg: Config) -> Tuple[int, int]:
    """Size of the training images, height first."""
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    size = preprocessor.get('size') or _crop_size(cfg.get('train_dataloader'))
    size = size or cfg.model.backbone.get('img_size') or 224
    size = (size, size) if isinstance(size, int) else tuple(size)
    return size * 2 if len(size) == 1 else size


def _crop_size(node) -> Union[int, tuple, None]:
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
