# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""README and docs: commands parse, examples run, paths, links and names exist."""

import functools
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mmvil
from mmvil.checkpoints import find_official
from tests.conftest import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
    for path in (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(ROOT.glob('docs/*.md')))
    if path.name != 'swap_matrix.md'  # generated, and tested with swap_backbone
}
MAKEFILE = (ROOT / 'Makefile').read_text()
every_page = pytest.mark.parametrize('page', PAGES)


def blocks(page, language):
    """Contents of a page's fenced code blocks in one language."""
    return re.findall(rf'^```{language}\n(.*?)^```', PAGES[page], re.DOTALL | re.MULTILINE)


# -- Commands --------------------------------------------------------------------------------------


def commands(page):
    """Command lines of a page as lists of words, with variables replaced."""
    for block in blocks(page, 'bash'):
        variables = {}
        for line in block.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            while words and (assignment := re.fullmatch(r'([A-Z_]+)=(.*)', words[0])):
                variables[assignment[1]] = assignment[2]
                words = words[1:]
            for name, value in variables.items():
                words = [word.replace(f'${name}', value) for word in words]
            while '&&' in words:
                yield words[: words.index('&&')]
                words = words[words.index('&&') + 1 :]
            if words:
                yield words


@functools.cache
def stub_launchers(folder):
    """A folder with an ``srun`` that prints its arguments."""
    folder.mkdir(exist_ok=True)
    srun = folder / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    return folder


def tool_call(words, folder):
    """The script of tools/ that a command runs with its arguments, or None.

    Shell scripts are executed with launchers that print the command they were given.
    """
    if words[0].endswith('.sh'):
        path = f'{stub_launchers(folder)}{os.pathsep}{os.environ["PATH"]}'
        printed = subprocess.run(
            ['bash', *words],
            cwd=ROOT,
            env={**os.environ, 'PATH': path, 'PYTHON': 'echo'},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        words = printed.split()
    script = next((word for word in words if re.fullmatch(r'tools/\S+\.py', word)), None)
    return None if script is None else words[words.index(script) :]


def run_python(code, payload, cwd=ROOT):
    """Run code that reads JSON from stdin and writes JSON to the file named by its argument."""
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, str(cwd / 'results.json')],
        cwd=cwd,
        input=json.dumps(payload),
        env={**os.environ, 'MPLBACKEND': 'Agg'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((cwd / 'results.json').read_text())


PARSE = """
import argparse, contextlib, io, json, os, runpy, sys

class Parsed(BaseException):
    pass

parse_args = argparse.ArgumentParser.parse_args

def parse_only(self, args=None, namespace=None):
    parse_args(self, args, namespace)
    raise Parsed

argparse.ArgumentParser.parse_args = parse_only
results = sys.argv[1]
root, calls = json.load(sys.stdin)
errors = []
for script, *arguments in calls:
    script = os.path.join(root, script)
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            runpy.run_path(script, run_name='__main__')
        errors.append('parses no arguments')
    except Parsed:
        errors.append('')
    except SystemExit:
        errors.append(printed.getvalue())
    sys.path.pop(0)
with open(results, 'w') as file:
    json.dump(errors, file)
"""


def test_commands_are_accepted_by_their_tools(tmp_path):
    pytest.importorskip('mmseg')
    pytest.importorskip('mmpretrain')
    calls = {}
    for page in PAGES:
        for words in commands(page):
            call = tool_call(words, tmp_path / 'bin')
            if call is not None:
                calls[(page, *call)] = call
    assert len(calls) > 40
    errors = run_python(PARSE, [str(ROOT), list(calls.values())], tmp_path)
    rejected = {call: error for call, error in zip(calls, errors) if error}
    assert not rejected


@every_page
def test_commands_name_programs_and_files_that_exist(page):
    for words in commands(page):
        program = words[0]
        assert (
            program in ('python', 'torchrun', 'make', 'pip', 'mim', 'git', 'pre-commit')
            or (ROOT / program).is_file()
        ), f'unknown program in: {shlex.join(words)}'
        if words[:3] == ['python', '-m', 'pytest']:
            assert (ROOT / words[3]).exists()
        for word in words:
            library, scoped, config = word.partition('::')
            if scoped:
                package = Path(pytest.importorskip(library).__file__).parent
                assert (package / '.mim' / 'configs' / config).is_file(), word


@every_page
def test_make_targets_and_variables_exist(page):
    targets = re.search(r'^\.PHONY: (.*)', MAKEFILE, re.MULTILINE)[1].split()
    code = '\n'.join([*blocks(page, 'bash'), *re.findall(r'`(make [^`]+)`', PAGES[page])])
    for target, variable in re.findall(r'^make (\S+)(?: (\w+)=)?', code, re.MULTILINE):
        assert target in targets
        assert not variable or re.search(rf'^{variable} \?=', MAKEFILE, re.MULTILINE), variable


# -- Examples --------------------------------------------------------------------------------------

PYTHON = [
    pytest.param(page, block, id=f'{page}-{number}')
    for page in PAGES
    for number, block in enumerate(blocks(page, 'python'))
]
# Files that exist only after an export; tests/test_tools/test_export.py covers it.
EXPORTED = ('model.onnx', 'model.pt2')

RUN = """
import json, sys, traceback

results = sys.argv[1]
errors = []
for code in json.load(sys.stdin):
    try:
        exec(compile(code, 'example', 'exec'), {})
        errors.append('')
    except Exception:
        errors.append(traceback.format_exc())
with open(results, 'w') as file:
    json.dump(errors, file)
"""


@pytest.mark.parametrize('page, block', PYTHON)
def test_python_examples_compile(page, block):
    compile(block, page, 'exec')


def test_python_examples_run(tmp_path):
    """With random weights, because the test downloads nothing."""
    for library in ('mmseg', 'mmpretrain', 'timm'):
        pytest.importorskip(library)
    import torch

    examples = [param.values[1] for param in PYTHON if 'import' in param.values[1]]
    examples = [code for code in examples if not any(name in code for name in EXPORTED)]
    assert len(examples) >= 5
    torch.save(dict(state_dict={}), tmp_path / 'checkpoint.pth')
    config = next(
        (Path(importlib.import_module('mmseg').__file__).parent / '.mim').glob(
            'configs/pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py'
        )
    )
    (tmp_path / 'my_config.py').write_text(f"_base_ = '{config}'\n")
    examples = [code.replace('pretrained=True', 'pretrained=False') for code in examples]
    errors = run_python(RUN, examples, tmp_path)
    assert not [error for error in errors if error]


# -- Paths, links and names ------------------------------------------------------------------------


@every_page
def test_paths_exist(page):
    paths = re.findall(
        r'(?<![\w/.])(?:configs|tools|tests|docs|requirements)/[\w./-]+\.\w+', PAGES[page]
    )
    assert not [path for path in paths if not (ROOT / path).exists()]


def anchors(text):
    """Anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r'^#+ (.+)', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@every_page
def test_links_have_targets(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', PAGES[page]):
        if link.startswith(('http', '../../actions')):  # the latter is a page of the repository
            continue
        file, _, anchor = link.partition('#')
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding='utf-8')), link


@every_page
def test_names_of_mmvil_exist(page):
    for name in set(re.findall(r'\bmmvil(?:\.\w+)+', PAGES[page])):
        module, *attributes = name.split('.')
        found = importlib.import_module(module)
        for attribute in attributes:
            module = f'{module}.{attribute}'
            if not hasattr(found, attribute):
                importlib.import_module(module)
            found = getattr(found, attribute)
    for name in set(re.findall(r'mmvil://(\w+)', PAGES[page])) - {'NAME'}:
        assert find_official(name).name == name
    options = inspect.signature(mmvil.VisionLSTM).parameters
    assert set(re.findall(r'model\.backbone\.(\w+)', PAGES[page])) <= {*options}


def test_page_of_the_backbone_describes_every_option():
    text = PAGES['docs/backbone.md']
    table = text[text.index('## Options') :].split('\n\n')[1]
    cells = re.findall(r'^\| (`.*?) \|', table, re.MULTILINE)
    described = re.findall(r'`([a-z_]+)`', ' '.join(cells))
    assert sorted(described) == sorted(inspect.signature(mmvil.VisionLSTM).parameters)


def test_index_lists_every_page():
    pages = {path.name for path in ROOT.glob('docs/*.*') if path.suffix in ('.md', '.ipynb')}
    assert set(re.findall(r'^\| \[([\w.]+)\]', PAGES['docs/README.md'], re.MULTILINE)) == pages - {
        'README.md'
    }


def test_versions_agree():
    from mmvil.version import __version__

    assert re.search(r'^version: (.*)', (ROOT / 'CITATION.cff').read_text(), re.M)[1] == __version__
    assert f'## [{__version__}]' in (ROOT / 'CHANGELOG.md').read_text()
    pins = (ROOT / 'requirements' / 'dev.txt').read_text()
    hooks = (ROOT / '.pre-commit-config.yaml').read_text()
    for tool in ('ruff', 'codespell'):
        assert (
            re.search(rf'/{tool}[\w-]*\n\s+rev: v(\S+)', hooks)[1]
            == re.search(rf'^{tool}==(\S+)', pins, re.MULTILINE)[1]
        )


# -- Figure and notebook ---------------------------------------------------------------------------


def test_architecture_figure_is_drawn(tmp_path):
    pytest.importorskip('skimage')
    script = ROOT / 'docs' / 'architecture.py'
    out = tmp_path / 'architecture.svg'
    subprocess.run([sys.executable, script, '--out', out], check=True, timeout=120)
    assert out.stat().st_size > 10_000


@pytest.mark.slow  # half a minute
def test_tutorial_runs_from_top_to_bottom(tmp_path):
    """With less data and fewer iterations than in the notebook."""
    for library in ('mmseg', 'skimage', 'sklearn'):
        pytest.importorskip(library)
    (tmp_path / 'docs').mkdir()
    for folder in ('configs', 'tools'):
        (tmp_path / folder).symlink_to(ROOT / folder)
    notebook = json.loads((ROOT / 'docs' / 'tutorial.ipynb').read_text())
    cells = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    code = '\n\n'.join(cells)
    for full, short in (
        ('ITERATIONS = 150', 'ITERATIONS = 4'),
        ("'--train', '300', '--val', '20'", "'--train', '16', '--val', '5'"),
    ):
        assert full in code
        code = code.replace(full, short)
    (error,) = run_python(RUN, [code], tmp_path / 'docs')
    assert not error
    pictures = {path.name for path in (tmp_path / 'work_dirs' / 'tutorial').glob('*.png')}
    assert pictures == {'gates.png', 'receptive_field.png'}
