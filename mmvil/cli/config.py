# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Read configs, merge the command line into them, and build their datasets."""

import argparse
import difflib
import importlib.util
import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import FlexibleRunner, Runner

from ..apis import swap_backbone
from ..apis.read_config import config_dir, read_config
from ..engine.config_nodes import (  # noqa: F401 (tools import all of them from here)
    as_list,
    default_hook,
    dicts,
    innermost_datasets,
    loaders,
    use_float32,
)
from .errors import UserError, as_user_error, one_line
from .own_data import configure_own_data

CONFIGS = config_dir('mmvil')
# Settings that runners read from any config.
_RUNNER_SETTINGS = {
    *inspect.signature(Runner).parameters,
    *inspect.signature(FlexibleRunner).parameters,
    *('auto_scale_lr', 'compile', 'runner_type'),
}


def load_config(path: str, options: dict, backbone: str | None = None, **swap) -> Config:
    """Read a config file and merge the command line's options into it.

    Args:
        path (str): The file, or ``LIBRARY::PATH`` for a config of an installed library.
        options (dict): Settings to merge, by dotted name.
        backbone (str, optional): ViL that first replaces the config's backbone.
        **swap: Options of :func:`mmvil.apis.swap.swap_backbone`.
    """
    file = _find(path)
    with as_user_error(f'cannot read {file}'):  # configs run Python code
        cfg = read_config(path)
    if backbone is not None:
        cfg = swap_backbone(cfg, backbone, **swap)
    for option in options:
        _check_spelling(cfg, option)
    kinds = (AttributeError, IndexError, KeyError, TypeError, ValueError)
    with as_user_error(f'--cfg-options do not fit {file}', kinds):
        cfg.merge_from_dict(options)

    types = [node.get('type') for node in dicts(cfg)]
    scoped = {name.partition('.')[0] for name in types if isinstance(name, str) and '.' in name}
    _require(sorted({cfg.default_scope, *scoped}), file)
    return cfg


def _find(path: str) -> str:
    """File of a config, which may be given as ``LIBRARY::PATH``. Raises UserError if it is missing,
    with the name of a similar one.
    """
    folder, prefix = CONFIGS.resolve(), ''
    if '::' in path:
        library, inner = path.split('::', 1)
        _require([library], path)
        folder, prefix = config_dir(library), f'{library}::'
        path = str(folder / inner)
    if os.path.isfile(path):
        return path
    known = {each.name: each for each in folder.rglob('*.py') if '_base_' not in each.parts}
    close = difflib.get_close_matches(Path(path).stem + '.py', known, n=1)
    start = folder if prefix else os.curdir
    near = [f'Did you mean {prefix}{os.path.relpath(known[each], start)}?' for each in close]
    raise UserError(f'config not found: {path}. {near[0] if near else f"See {folder}."}')


def _check_spelling(cfg: Config, option: str) -> None:
    """Check that a dotted name does not add a setting whose name is close to one beside it:
    mmengine would add it, and nothing would read it.
    """
    node, keys = {**dict.fromkeys(_RUNNER_SETTINGS), **cfg}, option.split('.')
    for depth, key in enumerate(keys, start=1):
        if isinstance(node, (list, tuple)):
            node = dict(zip(map(str, range(len(node))), node))
        # Classes reject unknown options themselves; custom_keys are names of parameters.
        is_option = depth == len(keys) and 'type' in (node or {})
        if not node or is_option or 'custom_keys' in keys[: depth - 1]:
            return
        if key not in node:
            close = difflib.get_close_matches(key, node, n=1, cutoff=0.8)
            if close:
                name, meant = ('.'.join([*keys[: depth - 1], each]) for each in (key, close[0]))
                raise UserError(f'--cfg-options: no setting {name!r}. Did you mean {meant}?')
            return
        node = node[key] if isinstance(node[key], (dict, list, tuple)) else None


def _require(libraries: Iterable[str], path: str) -> None:
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            page = 'docs/detection.md' if library == 'mmdet' else 'README.md'
            raise UserError(f'{path} needs {library}, which is not installed. See {page}.')
        if library == 'mmdet' and importlib.util.find_spec('mmcv._ext') is None:
            needs = f'{path} needs mmdet, which needs mmcv with compiled operators'
            raise UserError(f'{needs}; the installed one has none. See docs/detection.md.')


def read_runner_config(args: argparse.Namespace, **swap) -> Config:
    """Read the config specified by the arguments of ``add_runner_arguments``; see
    :func:`load_config`.
    """
    cfg = load_config(args.config, args.cfg_options, args.backbone, **swap)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = os.path.expanduser(args.work_dir)  # shells leave the ~ in --work-dir=~/a
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    if args.no_pin_memory:
        for loader in loaders(cfg):
            loader.pin_memory = False
    set_data_root(cfg, args.data_root)
    return cfg


def require(cfg: Config, *names: str) -> None:
    """Check that a config has the parts that a run needs."""
    missing = [name for name in names if cfg.get(name) is None]
    if missing:
        raise UserError(f'{cfg.filename} has no {", ".join(missing)}, which this run needs')


def set_data_root(cfg: Config, data_root: str | None) -> None:
    """Set the data root of all datasets of a config and of metrics that read their annotations,
    unless it is None, and describe a user's own dataset: see
    :func:`mmvil.cli.own_data.configure_own_data`.
    """
    if data_root is not None:
        data_root = os.path.expanduser(data_root)
        metrics = list(dicts([cfg.get('val_evaluator'), cfg.get('test_evaluator')]))
        for loader in loaders(cfg):
            for dataset in innermost_datasets(loader.dataset):
                file = dataset.get('ann_file') or ''
                old = os.path.join(dataset.get('data_root') or '', file)
                for metric in metrics:
                    if file and metric.get('ann_file') == old:
                        metric.ann_file = os.path.join(data_root, file)
                dataset.data_root = data_root
    configure_own_data(cfg)


def build_lazily(dataset_cfg: dict, scope: str | None):
    """Build a dataset with ``lazy_init`` and without ``pipeline``: it has its paths, but has not
    read its list of files.

    Returns:
        The dataset, or None if its class does not have these two options.
    """
    with DATASETS.switch_scope_and_registry(scope) as registry:
        try:
            return registry.build({**dataset_cfg, 'lazy_init': True, 'pipeline': []})
        except (AssertionError, KeyError, TypeError, ValueError, OSError) as error:
            if re.search("unexpected keyword argument '(lazy_init|pipeline)'", str(error)):
                return None
            raise UserError(
                f'cannot build the dataset {dataset_cfg.get("type")}: {one_line(error)}'
            ) from error


def list_files(dataset_cfg: dict, scope: str | None):
    """Build a dataset without a pipeline that has read its list of files."""
    with (
        DATASETS.switch_scope_and_registry(scope) as registry,
        as_user_error(f'cannot list the files of {dataset_cfg["type"]}'),
    ):
        dataset = registry.build({**dataset_cfg, 'pipeline': []})
        dataset.full_init()
    return dataset
