# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Read a config, merge the command line into it, walk through it."""

import argparse
import difflib
import importlib.util
import os
from pathlib import Path
from typing import Optional

from mmengine.config import Config
from mmengine.registry import DATASETS

import mmvil

from ..apis import swap_backbone
from ..engine.config_nodes import dicts, innermost_datasets, loaders
from .errors import UserError, one_line

CONFIGS = Path(mmvil.__file__).resolve().parent / '.mim' / 'configs'


def load_config(path: str, options: dict, backbone: Optional[str] = None, **swap) -> Config:
    """Read a config file and merge the command line's options into it.

    Args:
        path (str): The file, or ``LIBRARY::PATH`` for a config of an installed library.
        options (dict): To be merged.
        backbone (str, optional): A ViL to put in the place of the config's backbone first.
        **swap: Options of :func:`mmvil.apis.swap.swap_backbone`.

    Raises:
        UserError: If the file is missing or broken, or needs a library that is not installed.
    """
    library, scoped, inside = path.partition('::')
    if scoped and (spec := importlib.util.find_spec(library)):
        path = str(Path(spec.origin).parent / '.mim' / 'configs' / inside)
    if not os.path.isfile(path):
        known = {config.name: config for config in CONFIGS.glob('*.py')}
        close = difflib.get_close_matches(Path(path).stem + '.py', known, n=1)
        hint = f'Did you mean {os.path.relpath(known[close[0]])}?' if close else 'See configs/.'
        raise UserError(f'config not found: {path}. {hint}')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise UserError(f'cannot read {path}: {one_line(error)}') from error
    if backbone is not None:
        cfg = swap_backbone(cfg, backbone, **swap)
    try:
        cfg.merge_from_dict(options)
    except Exception as error:
        raise UserError(f'--cfg-options do not fit {path}: {one_line(error)}') from error

    libraries = {cfg.get('default_scope', 'mmengine')}
    libraries.update(node['type'].partition('.')[0] for node in dicts(cfg) if has_scope(node))
    for library in sorted(libraries):
        if importlib.util.find_spec(library) is None:
            raise UserError(f'{path} needs {library}, which is not installed. See README.md.')
    return cfg


def apply_common_args(cfg: Config, args: argparse.Namespace) -> None:
    """Merge the arguments of ``make_parser`` into a config."""
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)

    for loader in loaders(cfg):
        if args.no_pin_memory:
            loader.pin_memory = False
        if loader.get('num_workers', 0) == 0:  # else torch refuses persistent workers
            loader.persistent_workers = False
    set_data_root(cfg, args.data_root)


def set_data_root(cfg: Config, data_root) -> None:
    """Let all data sets of a config read from a folder, unless it is None."""
    if data_root is not None:
        for loader in loaders(cfg):
            for dataset in innermost_datasets(loader.dataset):
                dataset.data_root = data_root


def has_scope(node: dict) -> bool:
    return isinstance(node.get('type'), str) and '.' in node['type']


def build_lazily(dataset_cfg: dict, scope: str):
    """The dataset object, which knows its paths, without reading its list of files."""
    with DATASETS.switch_scope_and_registry(scope) as registry:
        try:
            return registry.build({**dataset_cfg, 'lazy_init': True, 'pipeline': []})
        except Exception:  # it will be built again in earnest, and complain then
            return None
