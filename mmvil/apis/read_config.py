# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Read configs of both styles of mmengine."""

import importlib.util
from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from ..engine.config_nodes import loaders


def config_dir(library: str) -> Path:
    """Folder with the configs of an installed library.

    ``mmengine.hub.get_config`` requires the distribution mmsegmentation even if the maintained
    onedl-mmsegmentation is installed, and would install it on top.
    """
    spec = importlib.util.find_spec(library)
    if spec is None:
        raise ModuleNotFoundError(f'No module named {library!r}, whose configs are asked for')
    return Path(spec.origin).parent / '.mim' / 'configs'


def read_config(path: str | Path) -> Config:
    """Read a config file, or ``LIBRARY::PATH``, one of an installed library.

    Classes, which configs in mmengine's new style import, become names, as in dumped configs.
    Without a default scope, as in these configs and in mmpretrain's ``*_headless.py``, it is the
    library of the model, or that of the config.
    """
    library, is_named, inner = str(path).partition('::')
    path = config_dir(library) / inner if is_named else path
    # To inherit from ``mmseg::...``, mmengine requires the distribution of this name, although
    # onedl-mmsegmentation provides the module.
    distribution, MODULE2PACKAGE['mmseg'] = MODULE2PACKAGE['mmseg'], 'mmseg'
    try:
        cfg = Config.fromfile(path)
    finally:
        MODULE2PACKAGE['mmseg'] = distribution
    cfg = Config(cfg.to_dict(), cfg.text, cfg.filename, cfg.env_variables)
    for loader in loaders(cfg):
        if isinstance(loader.get('collate_fn'), dict):
            # mmengine would pass it to the function, if the dict is inherited from a library.
            loader.collate_fn.pop('_scope_', None)
    if cfg.get('default_scope') is None:
        of_model = (cfg.get('model') or {}).get('type', '').partition('.')[0]
        known = [each for each in (of_model, library) if each in ('mmseg', 'mmpretrain', 'mmdet')]
        cfg.default_scope = known[0] if known else 'mmengine'
    return cfg
