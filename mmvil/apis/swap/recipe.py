# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Adapt weights, optimizer and schedule of a config whose backbone is replaced."""

import copy

from mmengine.config import Config, ConfigDict

from ...engine.config_nodes import as_list, type_name
from ..models import package_root
from .probe import HEADS


def drop_old_weights(cfg: Config, is_frozen: bool = False) -> list[str]:
    """Remove the old network's weights in place, and return notes on what was removed."""
    notes, model = [], cfg.model
    for node, name in ((cfg, 'load_from'), (model, 'pretrained')):
        if node.get(name):
            notes.append(f'{name}={node[name]!r} is dropped')
            node[name] = None
    for each in as_list(model.backbone.get('init_cfg')):
        if each.get('checkpoint'):
            notes.append(f'the checkpoint {each["checkpoint"]!r} of the old backbone is dropped')
    if blanket := model.pop('init_cfg', None):
        why = "it would reinitialize ViL's layers, including gates"
        notes.append(f'model.init_cfg is dropped: {why}')
        pretrained = any(each.get('checkpoint') for each in as_list(blanket))
        # A head that relied on it keeps it.
        for node in [node for key in ('neck', *HEADS) for node in as_list(model.get(key))]:
            if 'init_cfg' in node and node.init_cfg is None and not pretrained:
                node.init_cfg = copy.deepcopy(blanket)
    frozen = model.backbone.get('frozen_stages', -1)
    if isinstance(frozen, int) and frozen >= 0:
        becomes = 'frozen' if is_frozen else 'trained'
        notes.append(f'frozen_stages={frozen} is dropped: by default, all of ViL is {becomes}')
    return notes


def replace_constructor(cfg: Config) -> list[str]:
    """Replace a layer decay of mmseg or mmdet, which only support their own backbones, by ours at
    the same rate.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    constructor = str(wrapper.get('constructor', ''))
    if 'Decay' not in constructor or cfg.get('default_scope') == 'mmpretrain':
        return []
    options = wrapper.get('paramwise_cfg') or {}
    rate = options.get('layer_decay_rate', options.get('decay_rate', 1.0))
    wrapper.constructor = 'mmvil.LayerDecayOptimWrapperConstructor'
    wrapper.paramwise_cfg = ConfigDict(layer_decay_rate=rate, flat_decay_mult=0.0)
    return [f'{constructor} is replaced by {wrapper.constructor}, layer_decay_rate={rate}']


def use_recipe(cfg: Config) -> list[str]:
    """Set mmvil's optimizer and schedule, with the config's number of iterations or epochs.

    Raises:
        ValueError: If the model is a self-supervised mmpretrain model.
    """
    scope, kind = cfg.get('default_scope'), type_name(cfg.model)
    if scope == 'mmpretrain' and not kind.endswith('Classifier'):
        raise ValueError(
            f'mmvil has no recipe for training {kind}: leave optim (--backbone-optim) out.'
        )
    loop = cfg.train_cfg
    by_epoch = 'max_epochs' in loop
    total = loop['max_epochs' if by_epoch else 'max_iters']
    name = 'imagenet_400e' if scope == 'mmpretrain' else 'ade20k_160k'
    recipe = Config.fromfile(package_root() / 'configs' / '_base_' / 'schedules' / f'{name}.py')

    warm_up, cosine = recipe.param_scheduler
    same_unit = warm_up.by_epoch == by_epoch
    end = warm_up.end if same_unit else round(warm_up.end / cosine.end * total)
    end = min(end, total // 10)
    if end == 0:  # too short to warm up
        recipe.param_scheduler = [cosine]
    for part, begin, until in ((warm_up, 0, end), (cosine, end, total)):
        part.update(by_epoch=by_epoch, begin=begin, end=until)
        if by_epoch:
            part.convert_to_iter_based = True

    batch, optimizer = recipe.auto_scale_lr.base_batch_size, recipe.optim_wrapper.optimizer
    recipe.auto_scale_lr.update(cfg.get('auto_scale_lr') or {})
    factor = recipe.auto_scale_lr.base_batch_size / batch
    optimizer.lr *= factor
    if 'eta_min' in cosine:
        cosine.eta_min *= factor
    for key in ('optim_wrapper', 'param_scheduler', 'auto_scale_lr'):
        cfg[key] = recipe[key]
    return [
        f'optimizer and schedule are those of {name}: {optimizer.type}, lr {optimizer.lr:g} for '
        f'batches of {recipe.auto_scale_lr.base_batch_size}, {total} '
        f'{"epochs" if by_epoch else "iterations"}, {end} of them warm-up'
    ]
