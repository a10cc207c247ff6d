# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Read a config, merge the command line into it, build its datasets."""

import argparse
import difflib
import importlib.util
import os
import re
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS

import mmvil

from ..apis import swap_backbone
from ..engine.config_nodes import dicts, innermost_datasets, loaders
from .errors import UserError, one_line

CONFIGS = Path(mmvil.__file__).resolve().parent / '.mim' / 'configs'


def load_config(path: str, options: dict, backbone: str | None = None, **swap) -> Config:
    """Read a config file and merge the command line's options into it.

    Args:
        path (str): The file, or ``LIBRARY::PATH`` for a config of an installed library.
        options (dict): Settings to merge, by dotted name.
        backbone (str, optional): ViL that replaces the config's backbone first.
        **swap: Options of :func:`mmvil.apis.swap.swap_backbone`.

    Raises:
        UserError: If the file is missing or broken, or needs a library that is not installed.
    """
    if '::' in path:
        path = _config_of_library(*path.split('::', 1))
    if not os.path.isfile(path):
        known = {config.name: config for config in CONFIGS.glob('*.py')}
        close = difflib.get_close_matches(Path(path).stem + '.py', known, n=1)
        hint = f'Did you mean {os.path.relpath(known[close[0]])}?' if close else 'See configs/.'
        raise UserError(f'config not found: {path}. {hint}')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is Python
        raise UserError(f'cannot read {path}: {one_line(error)}') from error
    if backbone is not None:
        cfg = swap_backbone(cfg, backbone, **swap)
    try:
        cfg.merge_from_dict(options)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'--cfg-options do not fit {path}: {one_line(error)}') from error

    types = [node.get('type') for node in dicts(cfg)]
    scoped = {name.partition('.')[0] for name in types if isinstance(name, str) and '.' in name}
    for library in sorted({cfg.get('default_scope', 'mmengine'), *scoped}):
        _require(library, path)
    return cfg


def _config_of_library(library: str, path: str) -> str:
    """Path of a config inside an installed library.

    ``mmengine.hub.get_config`` looks for the distribution mmsegmentation where the maintained
    onedl-mmsegmentation is installed, and would install it over that one.
    """
    package = _require(library, f'{library}::{path}')
    return str(Path(package.origin).parent / '.mim' / 'configs' / path)


def _require(library: str, path: str):
    package = importlib.util.find_spec(library)
    if package is None:
        raise UserError(f'{path} needs {library}, which is not installed. See README.md.')
    return package


def read_runner_config(args: argparse.Namespace, **swap) -> Config:
    """Read the config that the arguments of ``add_runner_arguments`` describe.

    Args:
        args (Namespace): The arguments.
        **swap: Options of :func:`mmvil.apis.swap.swap_backbone`.

    Raises:
        UserError: See :func:`load_config`.
    """
    cfg = load_config(args.config, args.cfg_options, args.backbone, **swap)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    if args.no_pin_memory:
        for loader in loaders(cfg):
            loader.pin_memory = False
    set_data_root(cfg, args.data_root)
    return cfg


def set_data_root(cfg: Config, data_root: str | None) -> None:
    """Let all datasets of a config read from a folder, unless it is None."""
    if data_root is not None:
        for loader in loaders(cfg):
            for dataset in innermost_datasets(loader.dataset):
                dataset.data_root = data_root


def build_lazily(dataset_cfg: dict, scope: str | None):
    """Dataset object with ``lazy_init`` and no ``pipeline``: it knows its paths, but has not read
    its list of files.

    Returns:
        The dataset, or None where its class does not have these two options.

    Raises:
        UserError: If the class refuses its arguments.
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
