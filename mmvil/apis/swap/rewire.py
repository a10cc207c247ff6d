# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Fit ViL, necks and heads to each other."""

import copy
from typing import List, Sequence, Tuple

import torch
from mmengine.config import ConfigDict
from torch import Tensor

from ...backbones import VisionLSTM
from .probe import HEADS, BackboneProbe, read_by, run_readers, type_name, widths_of

# What configs call the width of a module's input.
INPUT_WIDTHS = ('in_channels', 'embed_dim', 'input_features')
# Nothing in ViL is finer than its patches; heads resize to the labels themselves.
FINEST_STRIDE = 4


class RewireError(Exception):
    """A way to connect ViL does not work out; the message says why."""


def rewire(model: ConfigDict, old: BackboneProbe, backbone: dict, keep_channels: bool):
    """Connect ViL with the neck and the heads.

    Returns:
        tuple[ConfigDict, list[str]]: The new model and what was done.
    """
    notes = []
    if not keep_channels:
        try:
            return _rewritten(model, old, backbone)
        except RewireError as misfit:
            reason = str(misfit)
            notes = [f'in_channels cannot be rewritten ({reason}), so the old widths are kept']
    else:
        reason = None
    if len(old.shapes[0]) != 4:
        raise ValueError(
            f'{old.name} puts out a feature vector, whose width {old.widths[0]} VisionLSTM can '
            'only take over by a head with other in_channels'
            + (
                f', and these cannot be rewritten: {reason}.'
                if reason
                else ': leave keep_channels out.'
            )
        )
    try:
        new, kept = _kept(model, old, backbone)
    except RewireError as misfit:
        raise ValueError(f'VisionLSTM cannot replace {old.name} here: {misfit}.') from misfit
    return new, notes + kept


def _rewritten(model: ConfigDict, old: BackboneProbe, backbone: dict):
    """The model with ``in_channels`` of necks and heads as ViL has them."""
    new, notes = copy.deepcopy(model), []
    if old.pooled:
        concat = backbone.get('version', 2) == 2
        backbone = {'out_type': 'bilateral_concat' if concat else 'bilateral_avg', **backbone}
        if old.neck_pools:
            new.neck = None
            notes.append(
                f'neck {type_name(model.neck)} is gone: ViL pools itself, '
                f'as its classifiers were trained (out_type={backbone["out_type"]!r})'
            )
    else:
        backbone = {**backbone, **_maps_like(old, backbone, _mentions(model, 'SyncBN'))}
    new.backbone = ConfigDict(backbone)
    features = _run_vil(backbone, old)

    widths = [feature.shape[1] for feature in features]
    if new.get('neck'):
        _rewrite(new.neck, old.widths, widths, 'neck', notes)
    maps, _, failure = run_readers(dict(neck=new.get('neck')), features)
    if maps is None:
        raise RewireError(failure)
    if old.maps is None:
        raise RewireError('the old neck cannot be run here')
    before, after = widths_of(old.maps), widths_of(maps)
    if before != after and old.has_heads:
        if not old.runs:
            raise RewireError(
                f'what reads the features cannot be run here on shapes alone, {old.failure}'
            )
        for key in HEADS:
            _rewrite(new.get(key), before, after, key, notes)
    _check_runs(new, old, features)
    return new, [_describe(old, backbone), *notes]


def _kept(model: ConfigDict, old: BackboneProbe, backbone: dict):
    """The model with maps of the old widths, so that necks and heads stay."""
    new = copy.deepcopy(model)
    backbone = {**backbone, **_maps_like(old, backbone, _mentions(model, 'SyncBN'), keep=True)}
    new.backbone = ConfigDict(backbone)
    _check_runs(new, old, _run_vil(backbone, old))
    return new, [_describe(old, backbone)]


def _maps_like(old: BackboneProbe, backbone: dict, synchronized: bool, keep: bool = False) -> dict:
    """Options of ViL for as many maps as the old backbone has, at the same strides.

    Maps that nobody reads stay at the stride of the patches, without parameters of their own,
    which would never get a gradient. Batch norms are synchronized if the old model has such.
    """
    plain = backbone.get('stride') or backbone.get('patch_size', 16)
    strides = [
        max(stride, FINEST_STRIDE) if index in old.read else plain
        for index, stride in enumerate(old.strides)
    ]
    if old.to_pool:  # averages over all patches lose nothing
        strides = [plain]
    if not old.has_neck:  # blocks behind the last map that is read would be in vain
        strides = strides[: max(old.read, default=0) + 1]
    options = {}
    if len(strides) > 1:
        depth = VisionLSTM._parse_arch(backbone['arch'])[1]
        options.update(out_indices=choose_out_indices(len(strides), depth), final_norm=False)
    if keep or any(stride != plain for stride in strides):
        options['pyramid'] = pyramid = dict(strides=tuple(strides))
        if keep:
            pyramid['out_channels'] = tuple(
                width if index in old.read else None
                for index, width in enumerate(old.widths[: len(strides)])
            )
        if synchronized:
            pyramid['norm_cfg'] = dict(type='SyncBN')
    # What the caller asked for wins.
    return {key: value for key, value in options.items() if key not in backbone}


def choose_out_indices(number: int, depth: int) -> Tuple[int, ...]:
    """Blocks to tap: the published ones for four maps, else evenly spaced; after whole pairs."""
    marks = (2, 3, 4, 6) if number == 4 else range(1, number + 1)
    ends = [depth * mark / marks[-1] for mark in marks]
    pairs = [2 * round(end / 2) for end in ends[:-1]] + [depth]
    ends = pairs if sorted({0, *pairs}) == [0, *pairs] else [round(end) for end in ends]
    return tuple(end - 1 for end in ends)


def _rewrite(node, old: Sequence[int], new: Sequence[int], where: str, notes: List[str]) -> None:
    """Change the widths that a neck or head expects, in place."""
    if isinstance(node, (list, tuple)):
        # Of several necks the first one reads the backbone, of several heads each one does.
        for number, each in enumerate(node[:1] if where == 'neck' else node):
            _rewrite(each, old, new, f'{where}[{number}]', notes)
        return
    if not isinstance(node, dict):
        return
    expected = {key: node.get('in_index') for key in INPUT_WIDTHS if key in node}
    if node.get('c1_in_channels'):  # DeepLabV3+ takes its details from the first map
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
            raise RewireError(f'{where}.{key} is {value}, but it is fed {was}')
        node[key] = becomes
        if was != becomes:
            notes.append(f'{where}.{key}: {was} -> {becomes}')
    for key, child in node.items():  # heads made of heads, such as K-Net's
        if isinstance(child, dict) and 'in_index' in child:
            _rewrite(child, old, new, f'{where}.{key}', notes)


def _run_vil(backbone: dict, old: BackboneProbe) -> List[Tensor]:
    """ViL's features, on shapes alone."""
    options = {key: value for key, value in backbone.items() if key not in ('type', 'init_cfg')}
    with torch.device('meta'):
        network = VisionLSTM(**options)
    image = torch.zeros(2, network.in_channels, *old.size, device='meta')
    with torch.no_grad():
        features = network.eval()(image)
    return [feature.detach().requires_grad_() for feature in features]


def _check_runs(new: dict, old: BackboneProbe, features: Sequence[Tensor]) -> None:
    """Run necks and heads on the new features, if they ran on the old ones."""
    if old.maps is None:
        return
    maps, results, failure = run_readers(new, features)
    if maps is None or (old.runs and failure is not None):
        raise RewireError(failure)
    if results and read_by(results, features) != old.read:
        raise RewireError(
            f'outputs {sorted(read_by(results, features))} are read, before it was '
            f'{sorted(old.read)}'
        )
    widths = {key: widths_of(tensors) for key, tensors in results.items()}
    if old.runs and widths != old.results:
        raise RewireError(f'heads put out {widths} channels instead of {old.results}')


def _describe(old: BackboneProbe, backbone: dict) -> str:
    if 'pyramid' in backbone:
        width = backbone['pyramid'].get('out_channels')
        puts_out = f'maps at strides {backbone["pyramid"]["strides"]}'
        puts_out += f' of {width} channels' if width else ''
    elif old.pooled and 'out_type' in backbone:
        puts_out = f'{backbone["out_type"]} features'
    else:
        puts_out = 'maps at the stride of its patches'
    return f'VisionLSTM {backbone["arch"]!r} stands in for {old.name}, with {puts_out}'


def _mentions(node, word: str) -> bool:
    if isinstance(node, dict):
        return any(_mentions(value, word) for value in node.values())
    if isinstance(node, (list, tuple)):
        return any(_mentions(value, word) for value in node)
    return isinstance(node, str) and word in node
