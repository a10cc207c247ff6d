# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Layer-wise learning rate decay for any backbone with ``get_layer_depth``."""

import re
from collections.abc import Iterator

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Assign each layer of the backbone its own learning rate.

    A parameter of layer ``i`` out of ``n`` trains with ``lr * layer_decay_rate ** (n - 1 - i)``;
    everything outside the backbone (necks, heads) trains with the full ``lr``. The layer is given
    by ``backbone.get_layer_depth(name) -> (i, n)``, which mmpretrain's transformers also have.
    Models may be plain or wrapped (DDP, FSDP). Frozen parameters are omitted; the others share a
    group if learning rate and weight decay are equal, for a short log and a fast step.

    Select it with ``optim_wrapper.constructor``, see ``configs/_base_/schedules``. Keys of
    ``optim_wrapper.paramwise_cfg``:

    - ``layer_decay_rate`` (float): in (0, 1]. Default: 1, no decay, which works with any backbone.
    - ``flat_decay_mult`` (float): factor for the weight decay of parameters with at most one
      dimension, that is, biases, norms and scales. Default: 1.
    - ``custom_keys`` (dict): maps a part of a parameter's name to ``dict(lr_mult=…,
      decay_mult=…)``, factors on top of the layer's learning rate and instead of
      ``flat_decay_mult``. The longest matching key wins.

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer wrapper. Its ``optimizer`` needs ``lr``.
        paramwise_cfg (dict, optional): The options above. Default: None.

    Raises:
        ValueError: For an unknown option or optimizer, a rate outside (0, 1], or without ``lr``.
        TypeError: If the rate is not 1 and the backbone has no ``get_layer_depth``.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        self.layer_decay_rate = self.paramwise_cfg.get('layer_decay_rate', 1.0)
        self.flat_decay_mult = self.paramwise_cfg.get('flat_decay_mult', 1.0)
        self.custom_keys = self.paramwise_cfg.get('custom_keys', {})

        known = ['layer_decay_rate', 'flat_decay_mult', 'custom_keys']
        _reject_unknown('paramwise_cfg', self.paramwise_cfg, known)
        for key, options in self.custom_keys.items():
            where = f'paramwise_cfg.custom_keys[{key!r}]'
            _reject_unknown(where, options, ['lr_mult', 'decay_mult'])
        if not 0 < self.layer_decay_rate <= 1:
            raise ValueError(f'layer_decay_rate must be in (0, 1], got {self.layer_decay_rate}')
        if not isinstance(self.base_lr, (float, int)):
            raise ValueError('set optimizer.lr to a number, from which those of the layers derive')
        kind = self.optimizer_cfg['type']
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:
            if isinstance(kind, str) and registry.get(kind) is None:
                raise ValueError(f'unknown optimizer {kind!r}; it may need another package')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of a whole model, plain or wrapped.

        FSDP leaves each process flat shards of the parameters. Groups are created before sharding,
        because weight decay depends on shapes, and gradients are clipped by the norm over all
        shards.
        """
        if not hasattr(model, 'summon_full_params'):
            return super().__call__(model)
        with model.summon_full_params(model, writeback=False):
            optim_wrapper = super().__call__(model)
        own = set(model.parameters())
        groups = optim_wrapper.optimizer.param_groups
        if not all(param in own for group in groups for param in group['params']):
            raise ValueError(
                'FSDP with use_orig_params=False has no separate parameters to set learning rates '
                'for. Set strategy.model_wrapper.use_orig_params=True.'
            )
        if getattr(optim_wrapper, 'clip_func', None) is torch.nn.utils.clip_grad_norm_:
            optim_wrapper.clip_func = lambda params, **kwargs: model.clip_grad_norm_(**kwargs)
        return optim_wrapper

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Append the parameter groups of a whole, unwrapped model to ``params``."""
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
        backbone = getattr(backbone, 'module', backbone)  # if only the backbone is wrapped
        if not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(
                'layer_decay_rate needs a backbone with the method get_layer_depth(param_name), '
                f'but the backbone of {type(model).__name__} is {type(backbone).__name__}. Use '
                'mmvil.VisionLSTM, or remove layer_decay_rate from optim_wrapper.paramwise_cfg.'
            )
        depths = {param: backbone.get_layer_depth(n) for n, param in _named_parameters(backbone)}
        return {param: layers - 1 - layer for param, (layer, layers) in depths.items()}

    def _multipliers(self, name: str, param: nn.Parameter) -> tuple[float, float]:
        """Factors of a parameter for learning rate (before layer decay) and weight decay."""
        found = [key for key in self.custom_keys if key in name]
        if found:
            custom = self.custom_keys[max(found, key=len)]
            return custom.get('lr_mult', 1.0), custom.get('decay_mult', 1.0)
        return 1.0, self.flat_decay_mult if param.ndim <= 1 else 1.0


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((plain_name(name), param) for name, param in module.named_parameters())


def plain_name(name: str) -> str:
    """Name of a module or parameter without prefixes of DDP, FSDP and activation checkpointing."""
    return re.sub(r'^module\.|_(fsdp|checkpoint)_wrapped_module\.', '', name)


def _reject_unknown(where: str, options: dict, known: list[str]) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f'{where} has the unknown option(s) {unknown}; choose from {known}. '
            'flat_decay_mult sets the weight decay of norms and biases.'
        )
