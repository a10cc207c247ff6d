# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Connect ViL with necks and heads."""

import copy
from collections.abc import Sequence

import torch
from mmengine.config import Config, ConfigDict
from torch import Tensor

from ...backbones import MaskedVisionLSTM, VisionLSTM
from ...engine.config_nodes import dicts, type_name
from .probe import HEADS, BackboneProbe, channels, consumers, find_used_outputs, run_neck_and_heads

# Config keys for the width of a module's input.
INPUT_WIDTHS = ('in_channels', 'embed_dim', 'input_features')
# ViL has no details finer than its patches; heads resize to the labels themselves.
FINEST_STRIDE = 4


class RewireError(Exception):
    """ViL cannot be connected in one of the ways; the message says why."""


def rewire(
    model: ConfigDict, old: BackboneProbe, backbone: dict, keep_channels: bool
) -> tuple[ConfigDict, list[str]]:
    """Connect ViL with the neck and the heads of a model whose backbone was ``old``: by rewriting
    ``in_channels`` or, with ``keep_channels`` or if that fails, by keeping the old widths. Options
    in ``backbone``, ViL's config, take precedence over those derived from the old backbone.

    Returns the new model and the changes. Raises ValueError if neither way works.
    """
    notes, reason = [], 'leave keep_channels out'
    if not keep_channels:
        try:
            return _rewrite_model(model, old, backbone)
        except RewireError as error:
            reason = f'in_channels cannot be rewritten ({error})'
            notes.append(f'{reason}, so the old widths are kept')
    if len(old.shapes[0]) != 4:
        raise ValueError(
            f'{old.name} outputs a feature vector, whose width {old.widths[0]} VisionLSTM can '
            f'replace only with a head of other in_channels: {reason}.'
        )
    new = copy.deepcopy(model)
    new.backbone = ConfigDict({**backbone, **_map_options(model, old, backbone, keep=True)})
    try:
        _check_runs(new, old, _run_vil(new.backbone, old.size))
    except RewireError as error:
        raise ValueError(f'VisionLSTM cannot replace {old.name} here: {error}.') from error
    return new, [*notes, _describe(old, new.backbone)]


def rewire_simmim(cfg: Config, old: BackboneProbe, backbone: dict) -> list[str]:
    """Connect ViL with mmpretrain's SimMIM in place: adapt decoder, head and masks to its patches,
    and return the changes.
    """
    model, network = cfg.model, _build_vil(backbone, MaskedVisionLSTM)
    model.backbone = ConfigDict({**backbone, 'type': 'mmvil.MaskedVisionLSTM'})
    settings = [
        (model.neck, 'in_channels', network.embed_dims),
        (model.neck, 'encoder_stride', network.patch_size),
        (model.head, 'patch_size', network.patch_size),
    ]
    for step in dicts(cfg.get('train_dataloader')):
        if type_name(step) == 'SimMIMMaskGenerator':
            settings.append((step, 'model_patch_size', network.patch_size))
    notes = [_describe(old, backbone)]
    for node, key, value in settings:
        notes.append(f'{type_name(node)}.{key}: {node[key]} -> {value}')
        node[key] = value
    return notes


def _rewrite_model(model: ConfigDict, old: BackboneProbe, backbone: dict):
    """Set ``in_channels`` of necks and heads to ViL's widths, and return the model."""
    new, notes = copy.deepcopy(model), []
    if old.pooled:
        concat = backbone.get('version', 2) == 2
        backbone = {'out_type': 'bilateral_concat' if concat else 'bilateral_avg', **backbone}
        if old.neck_pools:
            new.neck = None
            notes.append(
                f'neck {type_name(model.neck)} is removed: ViL pools itself, '
                f'as its classifiers were trained (out_type={backbone["out_type"]!r})'
            )
    else:
        backbone = {**backbone, **_map_options(model, old, backbone)}
    new.backbone = ConfigDict(backbone)
    features = _run_vil(backbone, old.size)

    if new.get('neck'):
        notes += _rewrite(new.neck, 'neck', old.widths, channels(features))
    maps, _, failure = run_neck_and_heads(dict(neck=new.get('neck')), features)
    if maps is None:
        raise RewireError(failure)
    if old.head_inputs is None:
        raise RewireError('the old neck cannot be run here')
    before, after = channels(old.head_inputs), channels(maps)
    if before != after and old.has_heads:
        if old.failure:
            raise RewireError(f'the heads cannot be run here on shapes alone, {old.failure}')
        for key in HEADS:
            notes += _rewrite(new.get(key), key, before, after)
    _check_runs(new, old, features)
    return new, [_describe(old, backbone), *notes]


def _rewrite(neck_or_head, name: str, old: Sequence[int], new: Sequence[int]) -> list[str]:
    """Rewrite the input widths of a neck or head in place, and return the changes."""
    notes = []
    for where, node in consumers(neck_or_head, name):
        expected = {key: node.get('in_index') for key in INPUT_WIDTHS if key in node}
        if node.get('c1_in_channels'):  # DeepLabV3+ reads details from the first map
            expected['c1_in_channels'] = 0
        for key, index in expected.items():
            value = node[key]
            if isinstance(value, (list, tuple)):
                index = range(len(value)) if index is None else index
                was, becomes = (type(value)(widths[i] for i in index) for widths in (old, new))
            else:
                index = -1 if index is None else index
                was, becomes = old[index], new[index]
            if value != was:
                raise RewireError(f'{where}.{key} is {value}, but its input has {was} channels')
            node[key] = becomes
            if was != becomes:
                notes.append(f'{where}.{key}: {was} -> {becomes}')
    return notes


def count_blocks(backbone: dict) -> int:
    """Number of blocks of the ViL in a config. Raises ValueError if it cannot be built."""
    return len(_build_vil(backbone).layers)


def _map_options(model: dict, old: BackboneProbe, backbone: dict, keep: bool = False) -> dict:
    """Options of ViL for the same number of maps as the old backbone, at the same strides.

    Unread maps stay at the patch stride, without their own parameters, which would never get a
    gradient. Batch norms are synchronized if those of the old model are.
    """
    plain = backbone.get('stride') or backbone.get('patch_size', 16)
    strides = [
        max(stride, FINEST_STRIDE) if index in old.used_outputs else plain
        for index, stride in enumerate(old.strides)
    ]
    if old.pooled_later:  # pooling over all patches loses nothing
        strides = [plain]
    if not old.has_neck:  # blocks after the last map that is read would be unused
        strides = strides[: max(old.used_outputs, default=0) + 1]
    options = {}
    if len(strides) > 1:
        indices = choose_out_indices(len(strides), count_blocks(backbone))
        options.update(out_indices=indices, final_norm=False)
    if keep or any(stride != plain for stride in strides):
        options['pyramid'] = pyramid = dict(strides=tuple(strides))
        if keep:
            widths = enumerate(old.widths[: len(strides)])
            pyramid['out_channels'] = tuple(w if i in old.used_outputs else None for i, w in widths)
        if 'SyncBN' in str(model):
            pyramid['norm_cfg'] = dict(type='SyncBN')
    return {key: value for key, value in options.items() if key not in backbone}


def choose_out_indices(number: int, depth: int) -> tuple[int, ...]:
    """Choose output blocks: published ones for four maps, else evenly spaced after whole pairs."""
    marks = (2, 3, 4, 6) if number == 4 else range(1, number + 1)
    ends = [depth * mark / marks[-1] for mark in marks]
    pairs = [2 * round(end / 2) for end in ends[:-1]] + [depth]
    ends = pairs if sorted({0, *pairs}) == [0, *pairs] else [round(end) for end in ends]
    return tuple(end - 1 for end in ends)


def _describe(old: BackboneProbe, backbone: dict) -> str:
    if 'pyramid' in backbone:
        width = backbone['pyramid'].get('out_channels')
        outputs = f'maps at strides {backbone["pyramid"]["strides"]}'
        outputs += f' of {width} channels' if width else ''
    elif old.pooled and 'out_type' in backbone:
        outputs = f'{backbone["out_type"]} features'
    else:
        outputs = 'maps at the stride of its patches'
    return f'VisionLSTM {backbone["arch"]!r} replaces {old.name}, with {outputs}'


def _run_vil(backbone: dict, size: tuple[int, int]) -> list[Tensor]:
    """Compute ViL's features on the meta device."""
    network = _build_vil(backbone).eval()
    with torch.device('meta'), torch.no_grad():
        features = network(torch.zeros(2, network.in_channels, *size))
    return [feature.detach().requires_grad_() for feature in features]


def _build_vil(backbone: dict, cls: type[VisionLSTM] = VisionLSTM) -> VisionLSTM:
    """Build the ViL of a config on the meta device."""
    options = {key: value for key, value in backbone.items() if key not in ('type', 'init_cfg')}
    with torch.device('meta'):
        return cls(**options)


def _check_runs(new: dict, old: BackboneProbe, features: Sequence[Tensor]) -> None:
    """Raise if necks and heads do not run on the new features like on the old ones."""
    if old.head_inputs is None:
        return
    maps, results, failure = run_neck_and_heads(new, features)
    if maps is None or (failure and not old.failure):
        raise RewireError(failure)
    used = find_used_outputs(results, features) if results else old.used_outputs
    if used != old.used_outputs:
        raise RewireError(f'outputs {sorted(used)} are read instead of {sorted(old.used_outputs)}')
    widths = {key: channels(tensors) for key, tensors in results.items()}
    if not old.failure and widths != old.head_channels:
        raise RewireError(f'heads output {widths} channels instead of {old.head_channels}')
