# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Ship configs, tools and the model index inside the package, where `mim` looks: mmvil/.mim.

All other metadata is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_PATHS = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Copy the paths into a wheel; link them for `pip install -e`."""

    def run(self):
        super().run()
        package = ROOT / 'mmvil' if self.editable_mode else Path(self.build_lib) / 'mmvil'
        mim = package / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for source in filter(Path.exists, map(ROOT.joinpath, MIM_PATHS)):
            target = mim / source.name
            if self.editable_mode:
                target.symlink_to(source, target_is_directory=source.is_dir())
            elif source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(source, target)


setup(cmdclass={'build_py': BuildWithMim})
