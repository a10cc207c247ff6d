# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The version of mmvil and the supported versions of its dependencies."""

import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.specifiers import SpecifierSet
from packaging.version import Version

__version__ = '0.1.0'

# module: {distribution that provides it: supported versions}.
# OpenMMLab's packages exist in two lines: the classic and the maintained one ('onedl-').
SUPPORTED = {
    'torch': {'torch': '>=2.1'},
    'mmengine': {'mmengine': '>=0.10.0,<1.0', 'onedl-mmengine': '>=0.10.8,<1.0'},
    'mmcv': {'mmcv': '>=2.0.0,<3.0', 'mmcv-lite': '>=2.0.0,<3.0', 'onedl-mmcv': '>=2.3.0,<3.0'},
    'mmseg': {'mmsegmentation': '>=1.2.0,<2.0', 'onedl-mmsegmentation': '>=1.4.0,<2.0'},
    'mmpretrain': {'mmpretrain': '>=1.2.0,<2.0', 'onedl-mmpretrain': '>=1.3.0,<2.0'},
}


def check_versions() -> None:
    """Report clashes between mmvil and the installed torch and OpenMMLab packages.

    Reads the metadata of the installed distributions and imports none of them. Packages other than
    mmengine may be absent: mmvil needs mmseg only for segmentation, mmpretrain for classification.

    Raises:
        ImportError: If a package is older or newer than mmvil supports, or mmengine is missing,
            with the command that installs it.

    Warns:
        UserWarning: If two distributions of one module are installed, which overwrite each other.
    """
    clashes = []
    if find_spec('mmengine') is None:
        clashes.append(
            f"mmvil {__version__} needs mmengine: pip install '.[onedl]', or see README.md"
        )
    for module, distributions in SUPPORTED.items():
        installed = {}
        for name in distributions:
            with suppress(PackageNotFoundError):
                installed[name] = version(name)
        if len(installed) > 1:
            both = ' and '.join(f'{name} {found}' for name, found in installed.items())
            warnings.warn(
                f'{both} are both installed and provide the same module {module!r}, so their files '
                f'overwrite each other. Uninstall both, then install the one you want.',
                stacklevel=3,
            )
        for name, found in installed.items():
            wanted = distributions[name]
            # Release candidates and local builds ('2.1.0rc4+cu118') count as the release.
            if Version(found).base_version not in SpecifierSet(wanted):
                clashes.append(
                    f'{name} {found} is installed, but mmvil {__version__} needs {name}{wanted}: '
                    f"pip install '{name}{wanted}'"
                )
    if clashes:
        raise ImportError('\n'.join(clashes))
