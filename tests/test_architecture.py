"""Which part of the repository imports which."""

import ast
import functools
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

LIBRARIES = {'mmseg', 'mmpretrain', 'mmdet', 'mmpose', 'timm'}
# What each part may import beside itself and the standard library.
ALLOWED = {
    'ops': {'torch'},
    'ops.triton': {'torch', 'triton', 'mmvil.ops'},
    'layers': {'torch', 'mmvil.ops'},
    'checkpoints': {'torch', 'numpy', 'mmengine'},
    'converters': {'mmvil.checkpoints'},
    'backbones': {'torch', 'mmengine', 'mmcv', 'mmvil.layers', 'mmvil.checkpoints'},
    'losses': {'torch', 'mmengine'},
    'metrics': {'torch', 'numpy', 'mmengine'},
    'engine': {
        *('torch', 'numpy', 'mmengine'),
        *('mmvil.checkpoints', 'mmvil.losses', 'mmvil.metrics'),
    },
}
MODULES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
    for path in (ROOT / 'mmvil').rglob('*.py')
    if '.mim' not in path.parts
}
TOOLS = sorted((ROOT / 'tools').rglob('*.py'))
DEV_SCRIPTS = ROOT / 'tools/.dev_scripts'  # for those who work on the kernels
FILES = [*MODULES.values(), *TOOLS]


def name_of(path):
    return str(path.relative_to(ROOT))


def within(module, *packages):
    return any(f'{module}.'.startswith(f'{package}.') for package in packages)


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


@functools.cache
def imports_of(path):
    """Modules and names that a file imports, in functions too: pairs of absolute names and the
    names that they get.
    """
    package, found = path.relative_to(ROOT).parent.parts, []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for name in node.names:
                found.append((name.name, None, name.asname or name.name))
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                alias = name.asname or name.name
                if f'{module}.{name.name}' in MODULES:
                    found.append((f'{module}.{name.name}', None, alias))
                else:
                    found.append((module, name.name, alias))
    return found


def modules_imported(path):
    return {module for module, *_ in imports_of(path)}


# -- The table of CONTRIBUTING.md ------------------------------------------------------------------


def members(part):
    """Modules of a part; those of a part of its own inside it belong to that."""
    inner = [f'mmvil.{other}' for other in ALLOWED if other.startswith(f'{part}.')]
    return [m for m in MODULES if within(m, f'mmvil.{part}') and not within(m, *inner)]


@pytest.mark.parametrize('part', ALLOWED)
def test_part_imports_only_what_it_may(part):
    assert members(part)
    wrong = [
        f'{module} imports {name}'
        for module in members(part)
        for name in sorted(modules_imported(MODULES[module]))
        if name.split('.')[0] not in sys.stdlib_module_names
        and not within(name, f'mmvil.{part}', *ALLOWED[part])
    ]
    assert not wrong


def test_apis_import_no_cli():
    wrong = [
        f'{module} imports {name}'
        for module in members('apis')
        for name in modules_imported(MODULES[module])
        if within(name, 'mmvil.cli')
    ]
    assert not wrong


def test_only_apis_and_cli_name_the_libraries():
    wrong = [
        f'{module} imports {name}'
        for module, path in MODULES.items()
        if not within(module, 'mmvil.apis', 'mmvil.cli')
        for name in modules_imported(path)
        if within(name, *LIBRARIES)
    ]
    assert not wrong


def test_only_ops_triton_imports_triton():
    allowed = (ROOT / 'mmvil/ops/triton', DEV_SCRIPTS)
    wrong = [
        name_of(path)
        for path in FILES
        if path.parent not in allowed and 'triton' in map(top, modules_imported(path))
    ]
    assert not wrong


def top(name):
    return name.split('.')[0]


def test_tools_import_cli_and_apis_and_no_other_tool():
    stems = {path.stem for path in TOOLS}
    wrong = [
        f'{name_of(path)} imports {module}' + (f' ({name})' if name else '')
        for path in TOOLS
        for module, name, _ in imports_of(path)
        if top(module) in stems
        or (module != 'mmvil' and within(module, 'mmvil'))
        and not within(module, 'mmvil.apis', 'mmvil.cli')
        and not (path.parent == DEV_SCRIPTS and within(module, 'mmvil.ops.triton'))
    ]
    assert not wrong


def test_package_imports_no_tool():
    assert not [name_of(p) for p in MODULES.values() if 'tools' in map(top, modules_imported(p))]


# -- Names and circles -----------------------------------------------------------------------------


def test_no_two_modules_share_a_file_name():
    tests = (ROOT / 'tests').rglob('test_*.py')  # pytest cannot import two of the same name
    counts = Counter(path.name for path in (*MODULES.values(), *tests) if path.stem != '__init__')
    assert not [name for name, count in counts.items() if count > 1]


def test_modules_import_each_other_in_no_circle():
    graph = {m: modules_imported(path) & set(MODULES) for m, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


NAMED_TUPLE = ('_asdict', '_fields', '_make', '_replace')  # public all the same


def is_private(name):
    return name.startswith('_') and not name.startswith('__') and name not in NAMED_TUPLE


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_no_private_name_crosses_modules(path):
    imports = imports_of(path)
    private = [
        f'{module}.{name}'
        for module, name, _ in imports
        if name and is_private(name) and top(module) != 'torch'  # no public name leads there
    ]
    ours = {alias for module, _, alias in imports if within(module, 'mmvil')}
    private += [
        ast.unparse(node)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and ast.unparse(node.value) in ours
    ]
    assert not private


def test_no_handler_turns_every_exception_into_none():
    wrong = [
        f'{name_of(path)}:{node.lineno}'
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ('Exception', 'BaseException'))
        and ast.unparse(node.body[-1]) in ('return', 'return None', 'pass')
    ]
    assert not wrong


# -- The import of mmvil ---------------------------------------------------------------------------


def test_import_is_light_and_needs_neither_timm_nor_triton_nor_the_libraries():
    missing = sorted(LIBRARIES | {'triton', 'mmcv'})
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
