# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Parts of a config that several modules look for."""

from mmengine.config import Config


def dicts(node):
    """Every dict inside a config."""
    if isinstance(node, (dict, Config)):
        if isinstance(node, dict):
            yield node
        for _, value in node.items():
            yield from dicts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from dicts(value)


def loaders(cfg: Config) -> list:
    names = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    return [cfg[name] for name in names if cfg.get(name) is not None]


def innermost_datasets(dataset: dict):
    """The innermost datasets: wrappers such as RepeatDataset and ConcatDataset hold others."""
    inner = dataset.get('datasets') or [dataset[key] for key in ('dataset',) if key in dataset]
    if not inner:
        yield dataset
    for each in inner:
        yield from innermost_datasets(each)


def strategy_name(cfg: Config) -> str:
    """Class name of the strategy of a FlexibleRunner; empty for a plain Runner."""
    return (cfg.get('strategy') or {}).get('type', '').rpartition('.')[2]
