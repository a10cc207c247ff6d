# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Traverse configs."""

from collections.abc import Iterator

from mmengine.config import Config


def dicts(node) -> Iterator[dict]:
    """Iterate over all dicts inside a config."""
    if isinstance(node, (dict, Config)):
        if isinstance(node, dict):
            yield node
        for _, value in node.items():
            yield from dicts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from dicts(value)


def loaders(cfg: Config) -> list[dict]:
    """List the configs of the dataloaders."""
    names = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    return [cfg[name] for name in names if cfg.get(name) is not None]


def innermost_datasets(dataset: dict) -> Iterator[dict]:
    """Iterate over the innermost datasets inside wrappers such as RepeatDataset, ConcatDataset."""
    inner = dataset.get('datasets') or ([dataset['dataset']] if 'dataset' in dataset else [])
    if not inner:
        yield dataset
    for each in inner:
        yield from innermost_datasets(each)


def type_name(node) -> str:
    """Name of the class that a config node builds, without module or scope; empty if it has no
    type. Configs in the new style hold classes.
    """
    kind = (node.get('type') if isinstance(node, dict) else None) or ''
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]


def default_hook(cfg: Config, name: str) -> dict:
    """Config of a default hook, or an empty dict."""
    return (cfg.get('default_hooks') or {}).get(name) or {}


def use_float32(optim_wrapper: dict) -> None:
    """Turn mixed precision off in the config of an optimizer wrapper, in place."""
    optim_wrapper.type = 'OptimWrapper'
    for option in ('dtype', 'loss_scale', 'use_fsdp'):
        optim_wrapper.pop(option, None)


def as_list(node) -> list:
    """Convert a sequence to a list, None to an empty list, and any other value to a list of one."""
    if node is None:
        return []
    return list(node) if isinstance(node, (list, tuple, range)) else [node]
