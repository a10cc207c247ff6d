# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Models by name."""

import functools
from pathlib import Path


@functools.cache
def register_models() -> None:
    """Make ViL's classifiers known to mmpretrain by name.

    Afterwards ``mmpretrain.list_models('vil-*')`` lists them and ``mmpretrain.get_model`` builds
    them, as it does mmpretrain's own. Calling it again does nothing.

    Raises:
        ImportError: If mmpretrain is not installed.
        FileNotFoundError: If this installation of mmvil lacks the list of models.

    Example:
        >>> import mmpretrain
        >>> from mmvil import register_models
        >>> register_models()
        >>> model = mmpretrain.get_model('vil-tiny_in1k')
    """
    try:
        from mmpretrain.apis import ModelHub
    except ImportError as error:
        raise ImportError(
            'register_models() needs mmpretrain, which cannot be imported '
            f'({error}). How to install it: see README.md.'
        ) from error
    root = _root()
    # The other list in model-index.yml is of segmentors, which mmpretrain cannot build.
    ModelHub.register_model_index(root / 'configs' / 'metafile_imagenet.yml', config_prefix=root)


def _root() -> Path:
    """The folder that holds configs/: ``mmvil/.mim`` of an installed package, else the checkout."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / '.mim', package.parent):
        if (root / 'configs' / 'metafile_imagenet.yml').is_file():
            return root
    raise FileNotFoundError(
        f'No configs/metafile_imagenet.yml in {package / ".mim"} or {package.parent}. '
        'Install mmvil from its repository: pip install .'
    )
