# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Layer-wise learning rate decay for any backbone with ``get_layer_depth``."""

import re
from collections.abc import Iterator

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Give each layer of the backbone its own learning rate.

    A parameter of layer ``i`` out of ``n`` trains with ``lr * layer_decay_rate ** (n - 1 - i)``;
    everything outside the backbone (necks, heads) trains with the full ``lr``. The layer is given
    by ``backbone.get_layer_depth(name) -> (i, n)``, a method of mmpretrain's transformers, too.
    Models may be plain or wrapped (DDP, FSDP). Frozen parameters are left out, the others share a
    group where learning rate and weight decay are equal, for a short log and a fast step.

    A config chooses it by ``optim_wrapper.constructor``, see ``configs/_base_/schedules``. Keys of
    ``optim_wrapper.paramwise_cfg``:

    - ``layer_decay_rate`` (float): in (0, 1]. Default: 1, no decay, possible with any backbone.
    - ``flat_decay_mult`` (float): factor on the weight decay of parameters with at most one
      dimension, that is biases, norms and scales. Default: 1.
    - ``custom_keys`` (dict): from a part of a parameter's name to ``dict(lr_mult=…,
      decay_mult=…)``, factors on top of the layer's learning rate and instead of
      ``flat_decay_mult``. The longest key found in the name wins.

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer wrapper. Its ``optimizer`` needs ``lr``.
        paramwise_cfg (dict, optional): The options above. Default: None.

    Raises:
        ValueError: For an unknown option, a rate outside (0, 1], or an optimizer without ``lr``.
        TypeError: If the rate is not 1 and the backbone has no ``get_layer_depth``.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        self.layer_decay_rate = self.paramwise_cfg.get('layer_decay_rate', 1.0)
        self.flat_decay_mult = self.paramwise_cfg.get('flat_decay_mult', 1.0)
        self.custom_keys = self.paramwise_cfg.get('custom_keys', {})

        known = ['layer_decay_rate', 'flat_decay_mult', 'custom_keys']
        _refuse_unknown('paramwise_cfg', self.paramwise_cfg, known)
        for key, options in self.custom_keys.items():
            where = f'paramwise_cfg.custom_keys[{key!r}]'
            _refuse_unknown(where, options, ['lr_mult', 'decay_mult'])
        if not 0 < self.layer_decay_rate <= 1:
            raise ValueError(f'layer_decay_rate must be in (0, 1], got {self.layer_decay_rate}')
        if self.base_lr is None:
            raise ValueError('the learning rate of each layer derives from optimizer.lr: set it')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of a whole model, plain or wrapped.

        FSDP leaves each process flat shards of the parameters. The groups are made while they are
        whole, because weight decay depends on shapes, and gradients are clipped at the norm over
        all shards.
        """
        if not hasattr(model, 'summon_full_params'):
            return super().__call__(model)
        with model.summon_full_params(model, writeback=False):
            optim_wrapper = super().__call__(model)
        own = set(model.parameters())
        groups = optim_wrapper.optimizer.param_groups
        if not all(param in own for group in groups for param in group['params']):
            raise ValueError(
                'FSDP with use_orig_params=False has no parameters that could have learning rates '
                'of their own. Set strategy.model_wrapper.use_orig_params=True.'
            )
        if getattr(optim_wrapper, 'clip_func', None) is torch.nn.utils.clip_grad_norm_:
            optim_wrapper.clip_func = lambda params, **kwargs: model.clip_grad_norm_(**kwargs)
        return optim_wrapper

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Append the parameter groups of a whole model, not wrapped, to ``params``."""
        layers_above = self._layers_above(module)
        groups = {}
        for name, param in _named_parameters(module):
            if not param.requires_grad:
                continue
            above = layers_above.get(param, 0)
            lr_mult, decay_mult = self._multipliers(name, param)
            group = groups.setdefault((above, lr_mult, decay_mult), dict(params=[]))
            group['params'].append(param)
            group['lr'] = self.base_lr * lr_mult * self.layer_decay_rate**above
            if self.base_wd is not None:
                group['weight_decay'] = self.base_wd * decay_mult

        for key in sorted(groups, reverse=True):  # from the first layer to the head
            group = groups[key]
            params.append(group)
            numel = sum(param.numel() for param in group['params'])
            decay = group.get('weight_decay', 0)
            print_log(
                f'parameter group: lr {group["lr"]:.3g}, weight decay {decay:.3g}, '
                f'{len(group["params"])} tensors, {numel:,} values',
                logger='current',
            )

    def _layers_above(self, model: nn.Module) -> dict[nn.Parameter, int]:
        """Number of layers between each parameter of the backbone and the head."""
        if self.layer_decay_rate == 1:
            return {}
        backbone = getattr(model, 'backbone', None)
        backbone = getattr(backbone, 'module', backbone)  # where only the backbone is wrapped
        if not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(
                'layer_decay_rate needs a backbone with the method get_layer_depth(param_name), '
                f'but the backbone of {type(model).__name__} is {type(backbone).__name__}. Use '
                'mmvil.VisionLSTM, or take layer_decay_rate out of optim_wrapper.paramwise_cfg.'
            )
        depths = {param: backbone.get_layer_depth(n) for n, param in _named_parameters(backbone)}
        return {param: layers - 1 - layer for param, (layer, layers) in depths.items()}

    def _multipliers(self, name: str, param: nn.Parameter) -> tuple[float, float]:
        """Factors of a parameter on the learning rate (before layer decay) and weight decay."""
        found = [key for key in self.custom_keys if key in name]
        if found:
            custom = self.custom_keys[max(found, key=len)]
            return custom.get('lr_mult', 1.0), custom.get('decay_mult', 1.0)
        return 1.0, self.flat_decay_mult if param.ndim <= 1 else 1.0


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((plain_name(name), param) for name, param in module.named_parameters())


def plain_name(name: str) -> str:
    """Name of a module or parameter without what DDP, FSDP and activation checkpointing add."""
    return re.sub(r'^module\.|_(fsdp|checkpoint)_wrapped_module\.', '', name)


def _refuse_unknown(where: str, options: dict, known: list[str]) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f'{where} has the unknown option(s) {unknown}, known are {known}. '
            'flat_decay_mult is the one for the weight decay of norms and biases.'
        )
