"""Who may import whom: what keeps the rooms of the house apart."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

OPENMMLAB = {'mmseg', 'mmpretrain', 'mmdet', 'mmpose'}
ALLOWED = {
    'ops': {'torch'},
    'layers': {'torch', 'mmvil.ops'},
    'checkpoints': {'torch', 'numpy', 'mmengine'},
    'converters': {'mmvil.checkpoints'},
    'backbones': {'torch', 'mmengine', 'mmcv', 'mmvil.layers', 'mmvil.checkpoints'},
    'engine': {
        *('torch', 'numpy', 'mmengine'),
        *('mmvil.checkpoints', 'mmvil.losses', 'mmvil.metrics'),
    },
}


def imports_of(path):
    """Absolute names of what a file imports, in functions too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield '.'.join([*above, *([node.module] if node.module else [])])


@pytest.mark.parametrize('room', ALLOWED)
def test_rooms_import_only_what_they_may(room):
    for path in (ROOT / 'mmvil' / room).rglob('*.py'):
        for name in imports_of(path):
            top = name.split('.')[0]
            if top in sys.stdlib_module_names or name.startswith(f'mmvil.{room}'):
                continue
            if path.parent.name == 'triton' and top == 'triton':
                continue
            allowed = {top, '.'.join(name.split('.')[:2])} & ALLOWED[room]
            assert allowed, f'{path.relative_to(ROOT)} imports {name}'


def test_nothing_imports_tools_and_only_apis_name_the_libraries():
    for path in (ROOT / 'mmvil').rglob('*.py'):
        tops = {name.split('.')[0] for name in imports_of(path)}
        assert 'tools' not in tops, path
        assert path.parent.name == 'apis' or not tops & (OPENMMLAB | {'timm'}), path


def test_import_is_light_and_needs_neither_timm_nor_triton_nor_the_libraries():
    missing = sorted(OPENMMLAB | {'timm', 'triton', 'mmcv'})
    code = (
        'import sys\n'
        f'for name in {missing!r}: sys.modules[name] = None\n'
        'import mmvil\n'
        'from mmengine.registry import MODELS\n'
        'assert MODELS.get("mmvil.VisionLSTM") is mmvil.VisionLSTM\n'
        'import mmvil\n'
        'mmvil.VisionLSTM(arch=dict(embed_dims=16, depth=2))\n'
        'assert "mmvil.ops.triton.verdict" not in sys.modules\n'
    )
    result = subprocess.run(
        [sys.executable, '-W', 'error::UserWarning:mmvil', '-c', code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stdout
