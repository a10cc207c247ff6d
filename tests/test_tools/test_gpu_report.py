"""The report about a GPU: stages that fail in every way, and what each of them computes."""

import functools
import importlib
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

from mmvil.cli.errors import UserError
from mmvil.ops.triton import triton_problem
from tests.conftest import ROOT

needs_triton = pytest.mark.skipif(triton_problem() is not None, reason=f'{triton_problem()}')

FAKE = """
import json, os, sys, time
def part(function, limit=20, **arguments):
    return dict(function=function, arguments=arguments, environment=dict(PLACE='here'), limit=limit)
second = os.environ['SECOND']
stages = [
    dict(name='kernels', title='One', workers=2, parts=[part('crash', x=1), part('right', x=2)]),
    dict(name='tests', title='Two', workers=1, parts=[part(second, dict(hang=1).get(second, 20))]),
    dict(name='models', title='Three', workers=1, parts=[part('right', x=3), part('waited', x=4)]),
]
if '--list' in sys.argv:
    print('a line of a library')
    print(json.dumps(dict(environment=['a fake GPU'], stages=stages)))
    sys.exit()
function, _, arguments, _ = sys.argv[sys.argv.index('--quick') + 1:]
started = time.time()
sys.stdin.readline()
print('a line of a library\\n{another}\\n[3]')
print(json.dumps(dict(at='some_kernel')))
print(json.dumps(dict(x=json.loads(arguments).get('x'), place=os.environ['PLACE'])), flush=True)
if function == 'crash':
    os.abort()
if function == 'waited':
    print(json.dumps(dict(waited=time.time() - started)))
if function in ('hang', 'stall'):
    time.sleep(60)
time.sleep(json.loads(arguments).get('x') == 3)
sys.exit(dict(right=0, waited=0, wrong=3)[function])
"""


def load(name, folder):
    pytest.importorskip('mmengine')
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / folder))


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Run the command with fake stages, the second of which behaves as told."""
    module = load('gpu_report', 'tools/analysis_tools')
    fake = tmp_path / 'fake.py'
    fake.write_text(FAKE)
    monkeypatch.setattr(module, 'STAGES', fake)
    out = tmp_path / 'report'

    def run(second, *options):
        monkeypatch.setenv('SECOND', second)
        command = ['gpu_report.py', '--device', 'cpu', '--quick', '--out', str(out), *options]
        monkeypatch.setattr(sys, 'argv', command)
        with pytest.raises(SystemExit) as end:
            module.main()
        results = {file.stem: json.loads(file.read_text()) for file in out.glob('*.json')}
        return end.value.code, results, (out / 'report.md').read_text()

    return run


def test_crashed_part_is_reported_and_other_tables_remain(report):
    status, results, text = report('right')
    assert status == 1
    assert [results[x]['status'] for x in ('kernels', 'tests', 'models')] == [
        *('failed', 'passed', 'passed')
    ]
    assert 'failed: SIGABRT, at some_kernel; see kernels.log' in text
    assert re.search(r'\| One \| failed \| \d+ \|', text) and '| 3 | here |' in text
    # The other part of the stage that crashed.
    assert dict(x=2, place='here') in results['kernels']['rows']
    assert text.index('## One') < text.index('## Two') < text.index('## Three')


def test_next_part_imports_while_one_runs(report):
    _, results, _ = report('right', '--stages', 'models')
    assert results['models']['rows'][-1]['waited'] > 0.5  # a part takes 1 s


def test_hanging_part_ends_at_its_limit(report):
    status, results, text = report('hang', '--stages', 'tests', 'models')
    assert status == 1 and results['tests']['seconds'] < 10
    assert 'failed: no end after 1 s, at some_kernel' in text
    assert results['tests']['rows'][0] == dict(x=None, place='here')  # written as it came
    assert results['models']['status'] == 'passed' and 'kernels' not in results


@pytest.mark.parametrize('ended_by', ['its option', 'a signal'])
def test_report_ends_with_all_that_it_started(report, ended_by):
    options = ['--minutes', '0.1'] if ended_by == 'its option' else []
    timer = threading.Timer(6, os.kill, (os.getpid(), signal.SIGTERM))
    if not options:
        timer.start()
    before, start = signal.getsignal(signal.SIGTERM), time.monotonic()
    try:
        status, results, text = report('stall', '--stages', 'tests', 'models', *options)
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    assert status == 1 and time.monotonic() - start < 50
    assert results['tests']['rows'][0] == dict(x=None, place='here') and 'models' not in results
    assert ('failed: no end after' if options else 'failed: SIGKILL') in text


def test_wrong_number_stops_the_report(report):
    status, results, text = report('wrong')
    assert status == 3 and 'models' not in results
    assert '| Two | wrong |' in text and '| Three | not run |' in text


def test_resumed_report_keeps_what_passed(report):
    report('wrong')
    _, results, _ = report('right', '--stages', 'models')
    assert results['tests']['status'] == 'wrong'  # stays in the report
    results['models']['rows'] = 'untouched'
    status, resumed, text = report('right', '--resume', '--stages', 'tests', 'models')
    assert status == 0 and resumed['tests']['status'] == 'passed'
    assert '| One | failed |' in text


def test_unknown_stage_is_rejected(report):
    with pytest.raises(UserError, match='--stages all is none of kernels, tests, models'):
        report('right', '--stages', 'all')


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_report_without_a_gpu_is_rejected(report):
    with pytest.raises(UserError, match='torch sees no GPU'):
        report('right', '--device', 'cuda')


# -- The stages themselves -------------------------------------------------------------------------


@pytest.fixture
def stages(monkeypatch):
    return load('gpu_stages', 'tools/.dev_scripts')


@pytest.fixture
def context(stages):
    return stages.Context('cpu', quick=True)


def rows_of(capsys):
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == '{']
    return [row for row in rows if 'at' not in row]


@pytest.mark.parametrize('quick', [True, False])
def test_parts_fit_their_functions(stages, quick):
    listed = stages.stages(stages.Context('cpu', quick))
    assert [stage['title'][0] for stage in listed] == list('1234567')
    for part in (part for stage in listed for part in stage['parts']):
        inspect.signature(getattr(stages, part['function'])).bind(None, **part['arguments'])
    assert json.loads(json.dumps(listed)) == listed


@needs_triton
@pytest.mark.triton
def test_kernels_are_timed_in_the_interpreter(stages, context, tmp_path):
    """A part runs as in the report."""
    report = load('gpu_report', 'tools/analysis_tools')
    command = [sys.executable, str(report.STAGES), '--device', 'cpu', '--quick']
    parts = {stage['name']: stage['parts'] for stage in stages.stages(context)}
    rows, log = [], tmp_path / 'log'
    with log.open('w') as file:
        part = parts['profile'][0]
        process = report.start_part(part, command, file)
        verdict = report.run_part(process, part, rows.append, file)
    assert verdict == 'passed', log.read_text()
    limits, *timed = rows
    timed, step, shares = (
        [row for row in timed if key in row] for key in ('GB/s', 'count', '% of time')
    )
    assert limits['card'] == 'limits' and len(timed) == 15
    assert min(row['us'] for row in timed + step) > 0 and len(step) > len(timed)
    assert shares[0]['kernel'] == 'all'
    assert shares[0]['% of time'] >= sum(row['% of time'] for row in shares[1:]) > 0
    # One chunk of 4 tokens in 8 heads: 10 pairs each, two products of width 16.
    flops = {x['kernel']: x['TFLOP/s'] * x['us'] * 1e6 for x in timed if x.get('TFLOP/s')}
    assert flops['query_side_kernel'] == pytest.approx(8 * 10 * 2 * 2 * 16)
    assert flops['gradients_kernel'] == pytest.approx(3 * flops['query_side_kernel'])


@needs_triton
@pytest.mark.parametrize('ptxas, wrong', [('default', True), ('13.4', False)])
def test_kernels_stop_at_a_wrong_number_of_the_usual_ptxas(
    stages, context, capsys, monkeypatch, ptxas, wrong
):
    from triton.runtime.jit import KernelInterface

    class Kernel(KernelInterface):
        __name__ = 'some_kernel'
        run = mock.Mock()

    def check(*_):
        Kernel()[(1,)](GRAD=False, OPERAND=2)
        return 'got wrong numbers: h'

    monkeypatch.setattr('mmvil.ops.triton.self_test.check', check)
    expected = pytest.raises(stages.WrongNumberError, match='wrong numbers: h')
    with expected if wrong else nullcontext():
        stages.kernels(context, 96, ptxas=ptxas)
    Kernel.run.assert_called_once_with(grid=(1,), warmup=False, GRAD=False, OPERAND=2)
    at, row = map(json.loads, capsys.readouterr().out.splitlines())
    assert at == dict(at='some_kernel OPERAND, width 96, bfloat16')
    assert (row['kernels'], row['verdict']) == (1, 'got wrong numbers: h')


@pytest.mark.parametrize('status', [0, 1, 4])
def test_failing_gpu_tests_count_as_wrong(stages, context, monkeypatch, capsys, status):
    lines = ['x.py::test_y FAILED', '', 'FAILED x.py::test_y - E: 1 - 2 < 3', '== 1 failed ==']
    program = f'print(*{lines}, sep="\\n"); raise SystemExit({status})'
    popen = functools.partial(subprocess.Popen, [sys.executable, '-S', '-c', program])
    commands = []

    def play(command, **options):
        commands.append(command)
        return popen(**options)

    monkeypatch.setattr(subprocess, 'Popen', play)
    context.on_gpu = True
    errors = {1: stages.WrongNumberError, 4: subprocess.CalledProcessError}
    with pytest.raises(errors[status]) if status else nullcontext():
        stages.tests(context)
    at, failure, row = map(json.loads, capsys.readouterr().out.splitlines())
    assert at == dict(at='x.py::test_y FAILED') and row['verdict'] == '1 failed'
    assert failure == dict(check='FAILED x.py::test_y', verdict='E: 1 - 2 < 3')
    files = [path.name for path in commands[0] if isinstance(path, Path)]
    assert 'test_triton_layer.py' in files and 'test_vil_block.py' not in files


def test_bits_and_last_samples_are_compared(stages, context, capsys, monkeypatch):
    stages.repeat(context, 'tiny')
    stages.large_layer(context, 32)
    stages.large_cell(context, 16, 4)
    same, *errors = rows_of(capsys)
    assert same['verdict'] is True and len(errors) == 6
    assert all(row['verdict'] < 5e-2 and 'sample' in row['check'] for row in errors)
    # From now on each call computes something else.
    noise = itertools.count(1)
    compute = stages.gradients
    monkeypatch.setattr(
        stages, 'gradients', lambda *args: [x * next(noise) for x in compute(*args)]
    )
    for check in (
        lambda: stages.repeat(context, 'tiny'),
        lambda: stages.large_layer(context, 32),
    ):
        with pytest.raises(stages.WrongNumberError):
            check()


@needs_triton
def test_cell_is_timed_beside_flash_attention(stages, context, capsys):
    stages.cell(context, 'tiny')
    mmvil, flash = rows_of(capsys)
    assert (mmvil['kernel'], flash['kernel']) == ('mmvil', 'flash attention')
    assert min(mmvil['training_ms'], flash['forward_ms']) > 0


@needs_triton
def test_models_run_beside_flash_attention(stages, context, capsys):
    pytest.importorskip('timm')
    stages.models(context, 'tiny', 32)
    rows = rows_of(capsys)
    assert [row['mode'] for row in rows] == ['forward', 'forward', 'training', 'training']
    assert [row['model'] for row in rows[2:]] == ['DeiT-tiny flash attention', 'ViL-tiny']
    assert rows[0]['x DeiT'] == 1


@needs_triton
def test_models_that_need_too_much_memory_have_a_row(stages, context, capsys, monkeypatch):
    pytest.importorskip('timm')
    monkeypatch.setattr(stages, 'compare', lambda *_, **__: [])
    stages.models(context, 'tiny', 32, compiled=True)
    rows = rows_of(capsys)
    assert len(rows) == 4 and {row['problem'] for row in rows} == {'out of memory'}


def test_models_are_judged_by_the_targets(stages):
    def record(model, size, seconds, peak):
        sizes = dict(model=model, size=size, batch=4, mode='training', peak_bytes=peak)
        return dict(sizes, seconds_per_image=[seconds, seconds])

    deit = 'DeiT-base flash attention'
    rows = stages.model_rows(
        [
            record(deit, 1024, 3.0, 10),
            record('ViL-base', 1024, 2.0, 11),
            record(f'{deit} compiled', 1024, 1.0, 10),
            record('ViL-base compiled', 1024, 2.0, 9),
        ],
        'base',
    )
    targets = [(row['x DeiT'], row['target']) for row in rows]
    assert targets == [(1, ''), (1.5, '>= 1.5: met, memory: missed'), (1, ''), (0.5, '')]


@needs_triton
def test_tiles_that_do_not_fit_are_skipped(stages, context, capsys, monkeypatch):
    import triton

    calls = itertools.count()

    def time_tiles(*_):
        if next(calls) == 1:
            raise triton.runtime.errors.OutOfResources(2, 1, 'shared memory')
        return 1.0, 2.0

    monkeypatch.setattr(stages, 'time_tiles', time_tiles)
    stages.tiles(context, 96, 512, 1)
    rows = rows_of(capsys)
    assert len(rows) == next(calls) - 1 > 3
    assert rows[0]['tiles'] == 'current choice' and rows[0]['backward_ms'] == 2
    assert len({row['tiles'] for row in rows}) == len(rows)


def test_training_curves_are_compared(stages, context, capsys, monkeypatch):
    pytest.importorskip('mmseg')
    monkeypatch.setenv('MMVIL_TRITON', '1')
    losses, speed = stages.train(context, **context.plan['upernet'], backend='auto')
    assert len(losses) == 2 and speed > 0
    capsys.readouterr()
    for factor, wrong in ((1.01, False), (1.2, True)):
        curves = [(losses, 1.0), ([factor * x for x in losses], 2.0)]
        monkeypatch.setattr(stages, 'train', mock.Mock(side_effect=curves))
        with pytest.raises(stages.WrongNumberError) if wrong else nullcontext():
            stages.upernet(context)
        assert rows_of(capsys)[-1]['verdict'] == pytest.approx(1 - 1 / factor)


def test_wrong_number_is_an_exit_status(stages, monkeypatch):
    def wrong(context):
        raise stages.WrongNumberError('error 1')

    monkeypatch.setattr(stages, 'tests', wrong)
    monkeypatch.setattr(sys, 'argv', ['gpu_stages.py', 'tests', '--device', 'cpu', '--quick'])
    assert stages.main() == 3


@pytest.mark.parametrize('git', [True, False])
def test_stage_list_includes_versions(stages, capsys, monkeypatch, git):
    if not git:
        monkeypatch.setenv('PATH', '')
    monkeypatch.setattr(sys, 'argv', ['gpu_stages.py', '--list', '--device', 'cpu', '--quick'])
    assert stages.main() == 0
    plan = json.loads(capsys.readouterr().out)
    assert f'torch {torch.__version__}' in plan['environment'][-1] and len(plan['stages']) == 7
