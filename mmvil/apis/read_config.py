# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Read configs of both styles of mmengine."""

from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from ..engine.config_nodes import loaders


def read_config(path: str | Path) -> Config:
    """Read a config file.

    Classes, which configs in mmengine's new style import, become names, as in dumped configs.
    Without a default scope, as in these configs, it is the library of the model.
    """
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
        library = (cfg.get('model') or {}).get('type', '').partition('.')[0]
        is_library = library in ('mmseg', 'mmpretrain', 'mmdet')
        cfg.default_scope = library if is_library else 'mmengine'
    return cfg
