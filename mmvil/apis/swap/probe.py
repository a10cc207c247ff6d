# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Run the networks of a config on the meta device: number, widths and strides of a backbone's
outputs, and which of them necks and heads read, are measured, not looked up by type.
"""

import copy
import inspect
import math
import textwrap
from collections.abc import Iterator, Sequence

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ...engine.config_nodes import as_list, dicts, type_name

# Heads that can be called with the features alone.
HEADS = ('decode_head', 'auxiliary_head', 'head')
# The masked image modeling algorithm that reads maps of all patches from its backbone.
MASKED_ALGORITHM = 'SimMIM'


class BackboneProbe:
    """Measure the outputs of the backbone in a config, for images of a given size, and which of
    them are read. ``outputs`` gives channels and strides instead of measuring them.

    Attributes:
        shapes (list[tuple]): Shape of each output: (2, C, h, w) for a map, (2, C) for a vector.
        widths (list[int]): Channels of each output.
        in_channels (int): Input channels.
        frozen (bool): Whether no parameter is trainable.
        masked (bool): Whether it takes a mask in addition to the images.
        pooled (bool): Whether the features are pooled, by the backbone or by the neck.
        pooled_later (bool): Whether its single map is pooled later.
        used_outputs (set[int]): Indices of the outputs that are read.
        head_inputs (list[Tensor] | None): Input of the heads; None if the neck cannot be run.
        failure (str | None): Why the heads cannot be run on the meta device, if so.
        head_channels (dict[str, list[int]]): Channels of the heads' outputs.

    Raises:
        ValueError: If VisionLSTM cannot replace the backbone, or its outputs are unknown.
    """

    def __init__(
        self,
        model: ConfigDict,
        size: tuple[int, int],
        outputs: Sequence[tuple[int, int]] | None,
        scope: str | None,
    ) -> None:
        cfg = model.backbone
        self.size, self.name, self.in_channels = size, type_name(cfg), cfg.get('in_channels', 3)
        self.frozen, self.masked = False, type_name(model) == MASKED_ALGORITHM
        if outputs is None:
            self.shapes = self._measure(cfg)
        else:
            grids = [[math.ceil(side / stride) for side in size] for _, stride in outputs]
            self.shapes = [(2, width, *grid) for (width, _), grid in zip(outputs, grids)]
        self.neck_pools = type_name(model.get('neck')) == 'GlobalAveragePooling'
        self.pooled = len(self.shapes) == 1 and (len(self.shapes[0]) == 2 or self.neck_pools)
        self._check_shapes()
        # mmpretrain's necks and heads pool a single map of any size.
        self.pooled_later = scope == 'mmpretrain' and len(self.shapes) == 1
        self.widths = [shape[1] for shape in self.shapes]
        self.has_neck = bool(model.get('neck'))
        self.has_heads = any('head' in key and model[key] for key in model)
        features = [torch.empty(shape, device='meta', requires_grad=True) for shape in self.shapes]
        self.head_inputs, results, self.failure = run_neck_and_heads(model, features)
        self.head_channels = {key: channels(tensors) for key, tensors in results.items()}
        if self.head_inputs is None:  # not even the neck runs here, so its input is unknown
            self.used_outputs = set(range(len(features)))
        elif results or self.has_neck:
            self.used_outputs = find_used_outputs(results or self.head_inputs, features)
        else:  # for instance, heads with compiled operators do not run on the meta device
            self.used_outputs = _configured_outputs(model, len(features))
        main = {key: tensors for key, tensors in results.items() if key != 'auxiliary_head'}
        if main and not self.has_neck:
            used, last = find_used_outputs(main, features), max(self.used_outputs, default=0)
            if last not in used:
                raise ValueError(
                    f'{self.name} is a whole network rather than a backbone: its main head reads '
                    f'output {sorted(used)}, auxiliary heads read later ones up to {last}. Choose '
                    'a config whose main head reads the last map, such as FCN, PSPNet or UPerNet.'
                )

    def _measure(self, cfg: dict) -> list[tuple]:
        plain = {key: cfg[key] for key in cfg if key not in ('init_cfg', 'pretrained')}
        if self.name == 'TIMMBackbone':  # mmseg's loads weights unless told otherwise
            plain['pretrained'] = False
        try:
            network = _build(plain)
        except Exception as error:
            raise ValueError(
                f'Cannot build {self.name}, the backbone to be replaced, to measure its outputs '
                f'({_one_line(error)}). Give them: outputs=[(channels, stride), ...], one pair for '
                'each map.'
            ) from error
        parameters = inspect.signature(network.forward).parameters.values()
        others = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        if others and not self.masked:
            raise ValueError(
                f'{self.name}.forward takes {", ".join(others)} besides images, as backbones of '
                f'masked image modeling do. VisionLSTM only fits {MASKED_ALGORITHM}, which reads '
                'maps of all patches; other algorithms read a class token, or drop or mix patches.'
            )
        self.frozen = not any(parameter.requires_grad for parameter in network.parameters())
        image = (2, self.in_channels, *self.size)
        try:
            trained, tested = (
                _shapes(network, image, training, *[None] * len(others))
                for training in (True, False)
            )
        except Exception as error:
            raise ValueError(
                f'Cannot run {self.name}, the backbone to be replaced, on images of shape {image} '
                f'({_one_line(error)}). Give its outputs: outputs=[(channels, stride), ...].'
            ) from error
        if trained != tested:
            raise ValueError(
                f'{self.name} outputs {trained} in training and {tested} in testing, and its '
                'heads are made for that: VisionLSTM cannot replace it.'
            )
        return trained

    def _check_shapes(self) -> None:
        plain = all(isinstance(shape[0], int) for shape in self.shapes)
        maps = plain and all(len(shape) == 4 for shape in self.shapes)
        if not maps and not (plain and self.pooled):
            raise ValueError(
                f'{self.name} outputs {self.shapes}, but VisionLSTM has neither class tokens nor '
                'masks: it can replace backbones that output feature maps (B, C, H, W) or one '
                'feature vector (B, C).'
            )

    @property
    def strides(self) -> list[int]:
        """Stride of each map, a power of two."""
        return [2 ** round(math.log2(max(self.size) / max(shape[2:]))) for shape in self.shapes]


def run_neck_and_heads(model: dict, features: Sequence[Tensor]):
    """Run the neck and the heads of a model on features. Returns the heads' input (list[Tensor], or
    None if the neck cannot be run), the outputs of each kind of head (dict[str, list[Tensor]]), and
    the reason why the heads cannot be run (str | None).
    """
    try:
        maps = list(_build(model['neck'])(tuple(features))) if model.get('neck') else features
    except Exception as error:
        return None, {}, f'neck: {_one_line(error)}'
    results = {}
    for key in HEADS:
        previous = None
        for cfg in as_list(model.get(key)):
            try:
                head = _build(cfg).eval()
                known = dict(prev_output=previous, batch_data_samples=_samples(features[0]))
                parameters = inspect.signature(head.forward).parameters
                previous = head(tuple(maps), **{k: known[k] for k in parameters if k in known})
            except Exception as error:
                return maps, {}, f'{key}: {_one_line(error)}'
            results.setdefault(key, []).extend(_tensors(previous))
    return maps, results, None if results else 'it has none of ' + ', '.join(HEADS)


def find_used_outputs(results, features: Sequence[Tensor]) -> set:
    """Indices of the features that arbitrarily nested tensors depend on."""
    total = sum(tensor.sum() for tensor in _tensors(results) if tensor.requires_grad)
    grads = torch.autograd.grad(total, features, allow_unused=True, retain_graph=True)
    return {index for index, grad in enumerate(grads) if grad is not None}


def consumers(node, name: str) -> Iterator[tuple[str, dict]]:
    """Iterate over the configs inside a neck or head that read its input, with their names."""
    if isinstance(node, (list, tuple)):
        # The first of several necks reads the backbone; all of several heads do.
        for number, each in enumerate(node[:1] if name == 'neck' else node):
            yield from consumers(each, f'{name}[{number}]')
    elif isinstance(node, dict):
        yield name, node
        for key, child in node.items():  # heads that contain heads, such as K-Net's
            if isinstance(child, dict) and 'in_index' in child:
                yield from consumers(child, f'{name}.{key}')


def _configured_outputs(model: dict, number: int) -> set:
    """Indices of the features that the heads read according to their configs."""
    used = set()
    for _, node in (each for key in HEADS for each in consumers(model.get(key), key)):
        if 'in_channels' in node:
            default = -1 if isinstance(node.in_channels, int) else range(number)
            used |= {each % number for each in as_list(node.get('in_index', default))}
            used |= {0} if node.get('c1_in_channels') else set()
    return used or set(range(number))


def _build(cfg) -> nn.Module:
    """Build a part of a model on the meta device."""
    try:
        with torch.device('meta'):
            module = MODELS.build(copy.deepcopy(cfg))
    except Exception:  # constructors that read values, such as stochastic depth rates
        module = MODELS.build(copy.deepcopy(cfg)).to('meta')
    # torch's SyncBatchNorm runs on GPUs only.
    return revert_sync_batchnorm(module)


def _samples(feature: Tensor) -> list:
    """Dummy data samples, from which some heads read the image size."""
    shape = tuple(4 * side for side in feature.shape[2:])
    meta = dict(img_shape=shape, batch_input_shape=shape, pad_shape=shape)
    return [BaseDataElement(metainfo=meta) for _ in feature]


def _shapes(network: nn.Module, image: tuple, training: bool, *others) -> list:
    """Shapes of a network's outputs for images of a shape, and its other inputs."""
    network.train(training)
    with torch.no_grad():
        try:
            features = network(torch.zeros(image, device='meta'), *others)
        except (NotImplementedError, RuntimeError):  # some operators need values
            features = network.to_empty(device='cpu')(torch.zeros(image), *others)
    return _shape_of(features if isinstance(features, (list, tuple)) else [features])


def _shape_of(features) -> list | tuple:
    if isinstance(features, Tensor):
        return tuple(features.shape)
    if isinstance(features, (list, tuple)):
        return [_shape_of(feature) for feature in features]
    return [type(features).__name__]


def _tensors(node) -> list[Tensor]:
    """Tensors inside nested tuples, lists and dicts."""
    return [each for each in tree_flatten(node)[0] if isinstance(each, Tensor)]


def training_size(cfg: Config, default: int | None = None) -> tuple[int, int]:
    """Height and width of the training images of a config. Raises ValueError if neither the config
    nor ``default`` specifies them.
    """
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    crops = [
        step.get('crop_size') or step.get('scale')
        for step in dicts(cfg.get('train_dataloader'))
        if type_name(step) in ('RandomCrop', 'RandomResizedCrop', 'CenterCrop')
    ]
    for size in (preprocessor.get('size'), *crops, cfg.model.backbone.get('img_size'), default):
        sides = as_list(size)
        if sides and all(type(side) is int for side in sides):  # not fractions
            return sides[0], sides[-1]
    raise ValueError('the config has no training image size; add --shape HEIGHT WIDTH')


def channels(tensors) -> list[int | None]:
    """Channels of each tensor (B, C, ...); None for anything else."""
    return [x.shape[1] if isinstance(x, Tensor) and x.dim() > 1 else None for x in tensors]


def _one_line(error: Exception) -> str:
    return textwrap.shorten(f'{type(error).__name__}: {error}', 300)
