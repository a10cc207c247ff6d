# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The version of mmvil, and which versions of its neighbours it is made for."""

import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__version__ = '0.1.0'

# module: {distribution that provides it: (minimum, first version that is too new)}.
# OpenMMLab's packages live on in two lines: the classic one and the maintained one ('onedl-').
SUPPORTED = {
    'torch': {'torch': ('2.1', None)},
    'mmengine': {'mmengine': ('0.10.0', '1.0'), 'onedl-mmengine': ('0.10.8', '1.0')},
    'mmcv': {
        'mmcv': ('2.0.0', '3.0'),
        'mmcv-lite': ('2.0.0', '3.0'),
        'onedl-mmcv': ('2.3.0', '3.0'),
    },
    'mmseg': {'mmsegmentation': ('1.2.0', '2.0'), 'onedl-mmsegmentation': ('1.4.0', '2.0')},
    'mmpretrain': {'mmpretrain': ('1.2.0', '2.0'), 'onedl-mmpretrain': ('1.3.0', '2.0')},
}


def check_versions() -> None:
    """Report clashes between mmvil and the installed torch and OpenMMLab packages.

    Reads the metadata of the installed distributions and imports none of them. Other packages than
    mmengine may be absent: mmvil needs mmseg only to segment and mmpretrain only to classify.

    Raises:
        ImportError: If a package is older or newer than mmvil supports, or mmengine is missing.
            The message names every such package, the supported range and the command that installs
            it.

    Warns:
        UserWarning: If two distributions of one module are installed, which overwrite each other.
    """
    clashes = []
    if find_spec('mmengine') is None:
        clashes.append(
            f"mmvil {__version__} needs mmengine: pip install '.[onedl]', or see README.md"
        )
    for module, distributions in SUPPORTED.items():
        installed = {name: found for name in distributions if (found := _installed_version(name))}
        if len(installed) > 1:
            both = ' and '.join(f'{name} {found}' for name, found in installed.items())
            warnings.warn(
                f'{both} are both installed and provide the same module {module!r}, so their files '
                f'overwrite each other. Uninstall both, then install the one you want.',
                stacklevel=3,
            )
        for name, found in installed.items():
            minimum, too_new = distributions[name]
            if _is_between(found, minimum, too_new):
                continue
            wanted = f'{name}>={minimum}' + (f',<{too_new}' if too_new else '')
            clashes.append(
                f'{name} {found} is installed, but mmvil {__version__} needs {wanted}: '
                f"pip install '{wanted}'"
            )
    if clashes:
        raise ImportError('\n'.join(clashes))


def _installed_version(distribution):
    """The version as pip knows it, or None where the distribution is absent."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _is_between(found, minimum, too_new):
    return _numbers(minimum) <= _numbers(found) and (
        too_new is None or _numbers(found) < _numbers(too_new)
    )


def _numbers(text):
    """'2.1.0rc4+cu118' -> (2, 1, 0): release numbers, padded so that '2.1' equals '2.1.0'."""
    release = re.match(r'\d+(\.\d+)*', text).group()
    numbers = [int(number) for number in release.split('.')]
    return tuple(numbers + [0] * (4 - len(numbers)))
