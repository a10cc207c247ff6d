# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Vision-LSTM in place of the backbone of an existing config.

There is no table of network families here. What a backbone feeds is found out by running it on
shapes alone (the meta device): how many maps it puts out, how wide and at which strides, and which
of them the necks and heads read. The swapped network is run in the same way before it is returned.
"""

import copy
import inspect
import math
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ...backbones import VisionLSTM
from ..models import _root

# Heads that are called with the features and nothing that only their model knows.
HEADS = ('decode_head', 'auxiliary_head', 'head')
# What configs call the width of a module's input.
INPUT_WIDTHS = ('in_channels', 'embed_dim', 'input_features')
# Nothing in ViL is finer than its patches; heads resize to the labels themselves.
FINEST_STRIDE = 4


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
        old = _OldBackbone(model, size, outputs)
        # mmpretrain's necks and heads pool a single map, whatever its size.
        old.to_pool = cfg.get('default_scope') == 'mmpretrain' and len(old.shapes) == 1
        notes = _drop_old_weights(cfg)
        square = size[0] == size[1]
        backbone = dict(type='mmvil.VisionLSTM', arch=arch, img_size=size[0] if square else size)
        backbone.update(old.kept_options(arch))
        if checkpoint is not None:
            backbone['init_cfg'] = dict(type='Pretrained', checkpoint=str(checkpoint))
        model, found = _fit(model, old, {**backbone, **options}, keep_channels)
    cfg.model = model
    notes += found + _replace_constructor(cfg)
    if optim:
        notes += _use_recipe(cfg)
    elif 'optim_wrapper' in cfg:
        optimizer = cfg.optim_wrapper.get('optimizer', {})
        notes.append(
            f'optimizer and schedule are still those made for {old.name} '
            f'({optimizer.get("type")}, lr {optimizer.get("lr")}); optim=True takes ours'
        )
    for note in notes:
        print_log(f'swap_backbone: {note}', logger='current')
    return cfg


# ---------------------------------------------------------------- the old backbone


class _OldBackbone:
    """What a config's backbone puts out, and who reads it.

    Args:
        model (ConfigDict): Config of the whole model.
        size (tuple[int, int]): Image size, height first.
        outputs (Sequence[tuple[int, int]], optional): Channels and strides, instead of measuring.

    Attributes:
        shapes (list[tuple]): Of each output, (2, C, h, w) of maps, (2, C) of vectors.
        pooled (bool): Whether the features are pooled: by itself, or by the neck.
        to_pool (bool): Whether its single map is pooled in the end.
        read (set[int]): Indices of the outputs that are read.
        maps (list[Tensor] | None): What the heads read.
        runs (bool): Whether the heads can be run on shapes alone; ``failure`` says why not.
        results (dict[str, list[int]]): Widths of what they put out.
    """

    def __init__(self, model: ConfigDict, size: Tuple[int, int], outputs=None) -> None:
        cfg = model.backbone
        self.cfg, self.size, self.name = cfg, size, _type_name(cfg)
        self.frozen = self.to_pool = False
        if outputs is None:
            self.shapes = self._measure()
        else:
            self.shapes = [
                (2, width, *(math.ceil(side / stride) for side in size))
                for width, stride in outputs
            ]
        self.neck_pools = _type_name(model.get('neck')) == 'GlobalAveragePooling'
        self.pooled = len(self.shapes) == 1 and (len(self.shapes[0]) == 2 or self.neck_pools)
        self._check_shapes()
        self.widths = [shape[1] for shape in self.shapes]
        features = [torch.empty(shape, device='meta', requires_grad=True) for shape in self.shapes]
        self.maps, results, self.failure = _run_readers(model, features)
        self.runs = self.failure is None
        self.results = {key: _widths(tensors) for key, tensors in results.items()}
        self.has_heads = any('head' in key and model[key] for key in model)
        self.has_neck = bool(model.get('neck'))
        if self.maps is None:  # not even the neck runs here, so nothing is known of its input
            self.read = set(range(len(self.shapes)))
            return
        if results or self.has_neck:
            self.read = _read_by(results or dict(neck=self.maps), features)
        else:  # heads with compiled operators, say, do not run on shapes alone
            heads = [_configured_to_read(model.get(key), len(features)) for key in HEADS]
            self.read = set().union(*heads) or set(range(len(features)))
        main = {key: value for key, value in results.items() if key != 'auxiliary_head'}
        last = max(self.read, default=0)
        if main and not model.get('neck') and last not in _read_by(main, features):
            raise ValueError(
                f'{self.name} is a whole network rather than a backbone: its main head reads '
                f'output {sorted(_read_by(main, features))}, auxiliary heads read later ones up to '
                f'{last}. Choose a config whose main head reads the last map, such as FCN, PSPNet '
                'or UPerNet.'
            )

    def _measure(self) -> List[tuple]:
        try:
            network = _build(_without_weights(self.cfg))
        except Exception as error:
            raise ValueError(
                f'Cannot build {self.name}, the backbone to be replaced, to see what it feeds '
                f'({_one_line(error)}). Say it yourself: outputs=[(channels, stride), ...], one '
                'pair for each map.'
            ) from error
        parameters = inspect.signature(network.forward).parameters.values()
        others = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        if others:
            raise ValueError(
                f'{self.name}.forward takes {", ".join(others)} beside the images, as backbones of '
                'masked image modeling do. VisionLSTM takes images only and cannot replace it.'
            )
        self.frozen = not any(parameter.requires_grad for parameter in network.parameters())
        image = (2, self.cfg.get('in_channels', 3), *self.size)
        try:
            trained, tested = (_shapes(network, image, training) for training in (True, False))
        except Exception as error:
            raise ValueError(
                f'Cannot run {self.name}, the backbone to be replaced, on images of shape {image} '
                f'({_one_line(error)}). Say what it feeds: outputs=[(channels, stride), ...].'
            ) from error
        if trained != tested:
            raise ValueError(
                f'{self.name} puts out {trained} in training and {tested} in testing, and its '
                'heads are made for that: VisionLSTM cannot replace it.'
            )
        return trained

    def _check_shapes(self) -> None:
        plain = all(isinstance(shape[0], int) for shape in self.shapes)
        maps = plain and all(len(shape) == 4 for shape in self.shapes)
        if not maps and not (plain and self.pooled):
            raise ValueError(
                f'{self.name} puts out {self.shapes}, but VisionLSTM has neither class tokens nor '
                'masks: it can replace backbones that put out feature maps (B, C, H, W) or one '
                'feature vector (B, C).'
            )

    @property
    def strides(self) -> List[int]:
        """Stride of each map, a power of two."""
        return [2 ** round(math.log2(max(self.size) / max(shape[2:]))) for shape in self.shapes]

    def kept_options(self, arch) -> dict:
        """What VisionLSTM takes over."""
        options = {}
        if self.cfg.get('in_channels', 3) != 3:
            options['in_channels'] = self.cfg.in_channels
        if self.cfg.get('with_cp'):
            options['with_cp'] = True
        if self.frozen:
            options['frozen_stages'] = VisionLSTM._parse_arch(arch)[1]
        return options


def _shapes(network: nn.Module, image: tuple, training: bool) -> list:
    """Shapes of what a network makes of images."""
    network.train(training)
    with torch.no_grad():
        try:
            features = network(torch.zeros(image, device='meta'))
        except (NotImplementedError, RuntimeError):  # some operators need values
            features = network.to_empty(device='cpu')(torch.zeros(image))
    return _shape_of(features if isinstance(features, (list, tuple)) else [features])


def _shape_of(features) -> Union[list, tuple]:
    if isinstance(features, Tensor):
        return tuple(features.shape)
    if isinstance(features, (list, tuple)):
        return [_shape_of(feature) for feature in features]
    return [type(features).__name__]


# ---------------------------------------------------------------- necks and heads


def _run_readers(model: dict, features: Sequence[Tensor]):
    """Run the neck and the heads of a model on features.

    Returns:
        tuple: What the heads read (list[Tensor], None if the neck cannot be run), what each kind
        of head made of it (dict[str, list[Tensor]]), and why the heads could not be run (str |
        None).
    """
    try:
        maps = list(_build(model['neck'])(tuple(features))) if model.get('neck') else features
    except Exception as error:
        return None, {}, f'neck: {_one_line(error)}'
    results: Dict[str, List[Tensor]] = {}
    for key in HEADS:
        previous = None
        for cfg in _as_list(model.get(key)):
            try:
                head = _build(cfg).eval()
                known = dict(prev_output=previous, batch_data_samples=_samples(features[0]))
                extra = {
                    name: known[name]
                    for name in inspect.signature(head.forward).parameters
                    if name in known
                }
                previous = head(tuple(maps), **extra)
            except Exception as error:
                return maps, {}, f'{key}: {_one_line(error)}'
            results.setdefault(key, []).extend(_tensors(previous))
    return maps, results, None if results else 'it has none of ' + ', '.join(HEADS)


def _samples(feature: Tensor) -> list:
    """Stand-ins for the data samples, of which some heads ask the image size."""
    shape = tuple(4 * side for side in feature.shape[2:])
    meta = dict(img_shape=shape, batch_input_shape=shape, pad_shape=shape)
    return [BaseDataElement(metainfo=meta) for _ in feature]


def _read_by(results: Dict[str, List[Tensor]], features: Sequence[Tensor]) -> set:
    """Indices of the features that some of the results depend on."""
    total = sum(
        tensor.sum()
        for tensors in results.values()
        for tensor in _tensors(tensors)
        if tensor.requires_grad
    )
    grads = torch.autograd.grad(total, features, allow_unused=True, retain_graph=True)
    return {index for index, grad in enumerate(grads) if grad is not None}


def _configured_to_read(node, number: int) -> set:
    """Indices of a number of features that a head reads, as its config says."""
    if isinstance(node, (list, tuple)):
        return set().union(*(_configured_to_read(each, number) for each in node))
    read = set()
    if isinstance(node, dict):
        if 'in_channels' in node:
            last = isinstance(node.in_channels, int)
            index = node.get('in_index', -1 if last else range(number))
            read = {each % number for each in _as_list(index)}
            read |= {0} if node.get('c1_in_channels') else set()
        for child in node.values():
            if isinstance(child, dict) and 'in_index' in child:
                read |= _configured_to_read(child, number)
    return read


# ---------------------------------------------------------------- the new model


class _Misfit(Exception):
    """A way to connect ViL does not work out; the message says why."""


def _fit(model: ConfigDict, old: _OldBackbone, backbone: dict, keep_channels: bool):
    """Connect ViL with the neck and the heads.

    Returns:
        tuple[ConfigDict, list[str]]: The new model and what was done.
    """
    notes = []
    if not keep_channels:
        try:
            return _rewritten(model, old, backbone)
        except _Misfit as misfit:
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
    except _Misfit as misfit:
        raise ValueError(f'VisionLSTM cannot replace {old.name} here: {misfit}.') from misfit
    return new, notes + kept


def _rewritten(model: ConfigDict, old: _OldBackbone, backbone: dict):
    """The model with ``in_channels`` of necks and heads as ViL has them."""
    new, notes = copy.deepcopy(model), []
    if old.pooled:
        concat = backbone.get('version', 2) == 2
        backbone = {'out_type': 'bilateral_concat' if concat else 'bilateral_avg', **backbone}
        if old.neck_pools:
            new.neck = None
            notes.append(
                f'neck {_type_name(model.neck)} is gone: ViL pools itself, '
                f'as its classifiers were trained (out_type={backbone["out_type"]!r})'
            )
    else:
        backbone = {**backbone, **_maps_like(old, backbone, _mentions(model, 'SyncBN'))}
    new.backbone = ConfigDict(backbone)
    features = _run_vil(backbone, old)

    widths = [feature.shape[1] for feature in features]
    if new.get('neck'):
        _rewrite(new.neck, old.widths, widths, 'neck', notes)
    maps, _, failure = _run_readers(dict(neck=new.get('neck')), features)
    if maps is None:
        raise _Misfit(failure)
    if old.maps is None:
        raise _Misfit('the old neck cannot be run here')
    before, after = _widths(old.maps), _widths(maps)
    if before != after and old.has_heads:
        if not old.runs:
            raise _Misfit(
                f'what reads the features cannot be run here on shapes alone, {old.failure}'
            )
        for key in HEADS:
            _rewrite(new.get(key), before, after, key, notes)
    _check_runs(new, old, features)
    return new, [_describe(old, backbone), *notes]


def _kept(model: ConfigDict, old: _OldBackbone, backbone: dict):
    """The model with maps of the old widths, so that necks and heads stay."""
    new = copy.deepcopy(model)
    backbone = {**backbone, **_maps_like(old, backbone, _mentions(model, 'SyncBN'), keep=True)}
    new.backbone = ConfigDict(backbone)
    _check_runs(new, old, _run_vil(backbone, old))
    return new, [_describe(old, backbone)]


def _maps_like(old: _OldBackbone, backbone: dict, synchronized: bool, keep: bool = False) -> dict:
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
        options.update(out_indices=_out_indices(len(strides), depth), final_norm=False)
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


def _out_indices(number: int, depth: int) -> Tuple[int, ...]:
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
            raise _Misfit(f'{where}.{key} is {value}, but it is fed {was}')
        node[key] = becomes
        if was != becomes:
            notes.append(f'{where}.{key}: {was} -> {becomes}')
    for key, child in node.items():  # heads made of heads, such as K-Net's
        if isinstance(child, dict) and 'in_index' in child:
            _rewrite(child, old, new, f'{where}.{key}', notes)


def _run_vil(backbone: dict, old: _OldBackbone) -> List[Tensor]:
    """ViL's features, on shapes alone."""
    options = {key: value for key, value in backbone.items() if key not in ('type', 'init_cfg')}
    with torch.device('meta'):
        network = VisionLSTM(**options)
    image = torch.zeros(2, network.in_channels, *old.size, device='meta')
    with torch.no_grad():
        features = network.eval()(image)
    return [feature.detach().requires_grad_() for feature in features]


def _check_runs(new: dict, old: _OldBackbone, features: Sequence[Tensor]) -> None:
    """Run necks and heads on the new features, if they ran on the old ones."""
    if old.maps is None:
        return
    maps, results, failure = _run_readers(new, features)
    if maps is None or (old.runs and failure is not None):
        raise _Misfit(failure)
    if results and _read_by(results, features) != old.read:
        raise _Misfit(
            f'outputs {sorted(_read_by(results, features))} are read, before it was '
            f'{sorted(old.read)}'
        )
    widths = {key: _widths(tensors) for key, tensors in results.items()}
    if old.runs and widths != old.results:
        raise _Misfit(f'heads put out {widths} channels instead of {old.results}')


def _describe(old: _OldBackbone, backbone: dict) -> str:
    if 'pyramid' in backbone:
        width = backbone['pyramid'].get('out_channels')
        puts_out = f'maps at strides {backbone["pyramid"]["strides"]}'
        puts_out += f' of {width} channels' if width else ''
    elif old.pooled and 'out_type' in backbone:
        puts_out = f'{backbone["out_type"]} features'
    else:
        puts_out = 'maps at the stride of its patches'
    return f'VisionLSTM {backbone["arch"]!r} stands in for {old.name}, with {puts_out}'


# ---------------------------------------------------------------- the rest of the config


def _drop_old_weights(cfg: Config) -> List[str]:
    """Drop what belongs to the old backbone, and say so."""
    notes, model = [], cfg.model
    for node, name in ((cfg, 'load_from'), (model, 'pretrained')):
        if node.get(name):
            notes.append(f'{name}={node[name]!r} is dropped')
            node[name] = None
    old = model.backbone.get('init_cfg')
    if isinstance(old, dict) and old.get('checkpoint'):
        notes.append(f'the checkpoint {old.checkpoint!r} of the old backbone is dropped')
    blanket = model.pop('init_cfg', None)
    if blanket:
        notes.append(
            "model.init_cfg is dropped: it would initialize ViL's layers anew, gates included"
        )
        # A head that relied on it keeps it.
        for key in ('neck', *HEADS):
            for node in _as_list(model.get(key)):
                if 'init_cfg' in node and node.init_cfg is None and not _is_pretrained(blanket):
                    node.init_cfg = copy.deepcopy(blanket)
    frozen = model.backbone.get('frozen_stages', -1)
    if isinstance(frozen, int) and frozen >= 0:
        notes.append(
            f'frozen_stages={frozen} of the old backbone: ViL is frozen if all of it was, '
            'else not at all; frozen_stages=... chooses'
        )
    return notes


def _is_pretrained(init_cfg) -> bool:
    return any(each.get('type') == 'Pretrained' for each in _as_list(init_cfg))


def _replace_constructor(cfg: Config) -> List[str]:
    """Layer decay of mmseg and mmdet knows their own backbones only: use ours, at the same rate."""
    wrapper = cfg.get('optim_wrapper') or {}
    constructor = str(wrapper.get('constructor', ''))
    if 'Decay' not in constructor or cfg.get('default_scope') == 'mmpretrain':
        return []
    options = wrapper.get('paramwise_cfg') or {}
    rate = options.get('layer_decay_rate', options.get('decay_rate', 1.0))
    wrapper.constructor = 'mmvil.LayerDecayOptimWrapperConstructor'
    wrapper.paramwise_cfg = ConfigDict(layer_decay_rate=rate, flat_decay_mult=0.0)
    return [f'{constructor} is replaced by {wrapper.constructor}, layer_decay_rate={rate}']


def _use_recipe(cfg: Config) -> List[str]:
    """Our optimizer and schedule, over as many iterations or epochs as the config has."""
    scope, kind = cfg.get('default_scope'), _type_name(cfg.model)
    if scope == 'mmpretrain' and not kind.endswith('Classifier'):
        raise ValueError(
            f'There is no recipe of ours to train {kind} with: leave optim (--backbone-optim) out.'
        )
    loop = cfg.train_cfg
    by_epoch = 'max_epochs' in loop
    total = loop['max_epochs' if by_epoch else 'max_iters']
    name = 'imagenet_400e' if scope == 'mmpretrain' else 'ade20k_160k'
    recipe = Config.fromfile(_root() / 'configs' / '_base_' / 'schedules' / f'{name}.py')

    warm_up, cosine = recipe.param_scheduler
    share = warm_up.end / cosine.end
    end = warm_up.end if warm_up.by_epoch == by_epoch else round(share * total)
    end = min(end, total // 10)
    if end == 0:  # too short to warm up
        recipe.param_scheduler = [cosine]
    for part, begin, until in ((warm_up, 0, end), (cosine, end, total)):
        part.update(by_epoch=by_epoch, begin=begin, end=until)
        if by_epoch:
            part.convert_to_iter_based = True

    batch, old = recipe.auto_scale_lr.base_batch_size, cfg.get('auto_scale_lr') or {}
    recipe.auto_scale_lr = {**recipe.auto_scale_lr, **old}
    factor = recipe.auto_scale_lr.base_batch_size / batch
    recipe.optim_wrapper.optimizer.lr *= factor
    if 'eta_min' in cosine:
        cosine.eta_min *= factor
    for key in ('optim_wrapper', 'param_scheduler', 'auto_scale_lr'):
        cfg[key] = recipe[key]
    optimizer = recipe.optim_wrapper.optimizer
    return [
        f'optimizer and schedule are those of {name}: {optimizer.type}, lr {optimizer.lr:g} for '
        f'batches of {recipe.auto_scale_lr.base_batch_size}, {total} '
        f'{"epochs" if by_epoch else "iterations"}, {end} of them warm-up'
    ]


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
        if _type_name(node) in ('RandomCrop', 'RandomResizedCrop', 'CenterCrop'):
            size = node.get('crop_size', node.get('scale'))
            if isinstance(size, int) or all(isinstance(side, int) for side in size):
                return size
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        return next(filter(None, map(_crop_size, node)), None)
    return None


# ---------------------------------------------------------------- helpers


def _build(cfg) -> nn.Module:
    """Build a part of a model with shapes but without values."""
    try:
        with torch.device('meta'):
            module = MODELS.build(copy.deepcopy(cfg))
    except Exception:  # constructors that read values, such as rates of stochastic depth
        module = MODELS.build(copy.deepcopy(cfg)).to('meta')
    # torch's SyncBatchNorm refuses other devices than GPUs.
    return revert_sync_batchnorm(module)


def _without_weights(cfg: ConfigDict) -> ConfigDict:
    return ConfigDict({k: v for k, v in cfg.items() if k not in ('init_cfg', 'pretrained')})


def _tensors(node) -> List[Tensor]:
    """Every tensor inside nested tuples, lists and dicts."""
    if isinstance(node, Tensor):
        return [node]
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        return [tensor for each in node for tensor in _tensors(each)]
    return []


def _widths(maps) -> List[Optional[int]]:
    return [each.shape[1] if isinstance(each, Tensor) and each.dim() > 1 else None for each in maps]


def _mentions(node, word: str) -> bool:
    if isinstance(node, dict):
        return any(_mentions(value, word) for value in node.values())
    if isinstance(node, (list, tuple)):
        return any(_mentions(value, word) for value in node)
    return isinstance(node, str) and word in node


def _as_list(node) -> list:
    if node is None:
        return []
    return list(node) if isinstance(node, (list, tuple, range)) else [node]


def _type_name(cfg) -> str:
    """The type of a config without its scope; configs in the new style hold classes."""
    kind = cfg.get('type', '') if isinstance(cfg, dict) else ''
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]


def _one_line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'[:300]
