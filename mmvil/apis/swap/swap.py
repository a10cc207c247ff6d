# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Replace the backbone of an existing config with Vision-LSTM."""

import copy
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DefaultScope

from ..read_config import read_config
from .probe import BackboneProbe, training_size
from .recipe import drop_old_weights, replace_constructor, use_recipe
from .rewire import count_blocks, rewire, rewire_simmim


def swap_backbone(
    cfg: str | Path | Config,
    arch: str | dict = 'small',
    checkpoint: str | None = None,
    optim: bool = False,
    keep_channels: bool = False,
    outputs: Sequence[tuple[int, int]] | None = None,
    **options,
) -> Config:
    """Replace the backbone of a config with Vision-LSTM.

    ViL outputs as many feature maps as the old backbone, at the same strides (not finer than 4); a
    classifier that pools its features gets ViL's own pooling, with which its checkpoints were
    trained. ``in_channels`` of the necks and heads that read them is set to ViL's width. If a head
    expects more than its config states, ViL's maps are projected to the old widths instead
    (``pyramid.out_channels``). Either way, necks and heads are run on the new features on the meta
    device. SimMIM gets :class:`mmvil.MaskedVisionLSTM`; its masks, decoder and head are adapted to
    ViL's patches.

    Data, crop size, losses, batch size and schedule are kept. Weights and a global initialization
    of the old network are removed. An optimizer constructor for the old backbone's layers is
    replaced by :class:`mmvil.LayerDecayOptimWrapperConstructor`. Every change is logged.

    Args:
        cfg (str | Path | Config): A config of mmsegmentation, mmpretrain or mmdetection, its
            file, or the name of an installed one, such as ``mmseg::PATH``. Not modified.
        arch (str | dict): As for :class:`mmvil.VisionLSTM`, or a name such as 'vil-s'. Default:
            'small'.
        checkpoint (str, optional): Weights for ViL, from mmvil or the authors. Default: None.
        optim (bool): Use mmvil's optimizer and learning rate schedule: the ADE20K recipe, or the
            ImageNet recipe for classifiers. The number of iterations or epochs is kept, and the
            learning rate is scaled to the batch size in ``auto_scale_lr``. Default: False.
        keep_channels (bool): Always project ViL's maps to the old widths, and keep necks and heads
            unchanged. Default: False.
        outputs (Sequence[tuple[int, int]], optional): Channels and stride of each output map of the
            old backbone. Only needed if it cannot be built. Default: measured.
        **options: Further options of :class:`mmvil.VisionLSTM`, which override those chosen here.

    Returns:
        Config: The new config.

    Raises:
        ValueError: If the model has no backbone that ViL can replace; the message gives the reason.

    Example:
        >>> cfg = mmvil.swap_backbone('pspnet_r50-d8_4xb4-80k_ade20k-512x512.py', 'tiny')
        >>> cfg.model.decode_head.in_channels
        192
    """
    cfg = copy.deepcopy(cfg) if isinstance(cfg, Config) else read_config(cfg)
    model, scope = cfg.get('model') or {}, cfg.get('default_scope')
    if not isinstance(model.get('backbone'), dict):
        raise ValueError(
            f'{Path(cfg.filename or "the config").name} has no model.backbone to replace '
            f'(model.type is {model.get("type")!r}).'
        )
    if isinstance(arch, str):
        arch = arch.lower().replace('-', '_').removeprefix('vil_')
    size = training_size(cfg, default=224)
    with DefaultScope.overwrite_default_scope(scope):
        old = BackboneProbe(model, size, outputs, scope)
        notes = drop_old_weights(cfg, old.frozen)
        backbone = dict(type='mmvil.VisionLSTM', arch=arch)
        backbone['img_size'] = size[0] if size[0] == size[1] else size
        if old.in_channels != 3:
            backbone['in_channels'] = old.in_channels
        if model.backbone.get('with_cp'):
            backbone['with_cp'] = True
        if checkpoint is not None:
            backbone['init_cfg'] = dict(type='Pretrained', checkpoint=str(checkpoint))
        backbone.update(options)
        if old.frozen:
            backbone.setdefault('frozen_stages', count_blocks(backbone))
        if old.masked:
            if keep_channels:
                raise ValueError('SimMIM has to fit the patches of ViL: leave keep_channels out.')
            changes = rewire_simmim(cfg, old, backbone)
        else:
            cfg.model, changes = rewire(model, old, backbone, keep_channels)
    notes += changes + replace_constructor(cfg)
    if optim:
        notes += use_recipe(cfg)
    elif 'optim_wrapper' in cfg:
        optimizer = cfg.optim_wrapper.get('optimizer', {})
        notes.append(
            f'optimizer and schedule are still those for {old.name} '
            f'({optimizer.get("type")}, lr {optimizer.get("lr")}); optim=True (--backbone-optim) '
            'selects ours'
        )
    for note in notes:
        print_log(f'swap_backbone: {note}', logger='current')
    return cfg
