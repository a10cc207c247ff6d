# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from mmvil import version

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these distributions are installed."""
    versions = {}

    def fake(distribution):
        if distribution not in versions:
            raise PackageNotFoundError(distribution)
        return versions[distribution]

    monkeypatch.setattr(version, 'version', fake)
    return versions


@pytest.mark.parametrize(
    'versions',
    [
        {},
        {'torch': '2.1.0'},
        {
            'torch': '2.1.2+cu118',
            'mmengine': '0.10.7',
            'mmcv': '2.1.0',
            'mmsegmentation': '1.2.2',
            'mmpretrain': '1.2.0',
        },
        {
            'torch': '2.15.0',
            'onedl-mmengine': '0.10.12',
            'onedl-mmcv': '2.3.6',
            'onedl-mmsegmentation': '1.4.2',
            'onedl-mmpretrain': '1.3.6',
        },
    ],
    ids=['nothing', 'torch_only', 'openmmlab', 'onedl'],
)
def test_check_versions_accepts(installed, recwarn, versions):
    installed.update(versions)
    version.check_versions()
    assert not recwarn


def test_check_versions_reports_all_clashes_in_words(installed):
    installed.update({'torch': '2.0.1', 'mmcv': '1.7.2', 'mmengine': '0.10.7'})
    with pytest.raises(ImportError) as error:
        version.check_versions()
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith('torch 2.0.1 is installed')
    assert "pip install 'torch>=2.1'" in lines[0]
    assert lines[1].startswith('mmcv 1.7.2 is installed')
    assert "pip install 'mmcv>=2.0.0,<3.0'" in lines[1]


def test_check_versions_rejects_the_first_version_that_is_too_new(installed):
    installed['mmengine'] = '1.0.0'
    with pytest.raises(ImportError, match='mmengine>=0.10.0,<1.0'):
        version.check_versions()


def test_check_versions_names_a_missing_mmengine(installed, monkeypatch):
    monkeypatch.setattr(version, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r"needs mmengine: pip install '.*\[onedl\]'"):
        version.check_versions()


def test_check_versions_warns_of_two_distributions_of_one_module(installed):
    installed.update({'mmsegmentation': '1.2.2', 'onedl-mmsegmentation': '1.4.2'})
    with pytest.warns(UserWarning, match="overwrite each other.*'mmseg'|'mmseg'.*overwrite"):
        version.check_versions()


@pytest.mark.parametrize('found', ['2.0.0rc4', '2.0', '2.15.0+cu130'])
def test_check_versions_accepts_release_candidates_and_local_builds(installed, found):
    installed['mmcv'] = found
    version.check_versions()


@pytest.mark.parametrize('found', ['1.7.2', '3.0.0rc1', '3.0'])
def test_check_versions_rejects_unsupported_versions(installed, found):
    installed['mmcv'] = found
    with pytest.raises(ImportError, match='mmcv>=2.0.0,<3.0'):
        version.check_versions()


def test_wheel_ships_configs_tools_and_no_tests(tmp_path):
    pytest.importorskip('setuptools', minversion='77')  # as pyproject.toml demands
    source = tmp_path / 'source'
    ignore = shutil.ignore_patterns('__pycache__', '.mim')
    for name in ('mmvil', 'configs', 'tools'):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in ('.py', '.toml', '.in', '.md', '.yml', ''):
            shutil.copy(path, source)

    build = 'from setuptools import build_meta; build_meta.build_wheel("dist")'
    subprocess.run([sys.executable, '-c', build], cwd=source, check=True, capture_output=True)

    (wheel,) = (source / 'dist').glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(f'mmvil-{version.__version__}-')
    expected = ['mmvil/__init__.py', *(f'mmvil/.mim/{path}' for path in configs_and_tools(source))]
    assert not set(expected) - set(names)
    assert not [name for name in names if 'test_' in name or name.endswith('.pyc')]


def configs_and_tools(source):
    for folder in ('configs', 'tools'):
        for path in (source / folder).rglob('*.*'):
            if path.is_file():
                yield path.relative_to(source).as_posix()


def test_every_requirement_of_the_environment_is_pinned():
    def pins(name):
        lines = (ROOT / 'requirements' / name).read_text().splitlines()
        lines = [line.partition('#')[0].split(';')[0].strip() for line in lines]
        return [line for line in lines if line]

    locked = pins('dev.txt')
    assert all(re.fullmatch(r'[\w.\-]+==[\w.+]+', pin) for pin in locked)
    names = {pin.partition('==')[0] for pin in locked}
    for wish in pins('dev.in'):
        assert wish in locked if '==' in wish else wish in names
