# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The self-test of the kernels with faulty kernels, and the failures around it.

No GPU is needed. Faults of compilers are simulated by changed results, and by programs that crash,
hang, or lie in place of the self-test.
"""

import json
import logging
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mmvil.ops.mlstm import choose_form
from mmvil.ops.triton import is_interpreted, triton_problem

if sys.platform == 'win32':
    pytest.skip('Triton is for Unix', allow_module_level=True)

from mmvil.ops.triton import self_test, verdict  # noqa: E402
from mmvil.ops.triton.self_test import Case, check  # noqa: E402
from mmvil.ops.triton.verdict import FAILED, IMPOSSIBLE  # noqa: E402

CPU, GPU = torch.device('cpu'), torch.device('cuda', 0)
KEY = verdict.CacheKey('Fake', 'bfloat16', 96, False, '3.9', '12.9', 'TRITON_PTXAS_PATH', 'x')
needs_triton = pytest.mark.skipif(bool(triton_problem()), reason=str(triton_problem()))


# -- Findings of the test --------------------------------------------------------------------------


@pytest.fixture
def faulty_kernels(monkeypatch):
    """PyTorch instead of the kernels, with faults of a compiler in the results."""

    def install(fault, part='layer'):
        original = getattr(self_test, f'_run_{part}')
        monkeypatch.setattr(self_test, f'_run_{part}', lambda *args: fault(original, *args))

    for part in ('cell', 'layer'):
        original = getattr(self_test, f'_run_{part}')
        monkeypatch.setattr(
            self_test,
            f'_run_{part}',
            lambda *args, run=original: run(*args[:-1], 'chunkwise'),
        )
    return install


def check_small(dtype=torch.float32):
    return check(CPU, dtype, 8, [Case(1, (7, 10), reverse=True, version=2)])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_self_test_passes_right_kernels(faulty_kernels, dtype):
    assert check_small(dtype) is None


@pytest.mark.parametrize('value', [0.0, 2.0, float('nan')])
@pytest.mark.parametrize(
    'part, key', [('cell', 'gradient of k'), ('layer', 'output'), ('layer', 'gradient of q_weight')]
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_self_test_finds_a_wrong_tile(faulty_kernels, dtype, part, key, value):
    def fault(run, *args):
        results = run(*args)
        if args[-1] == 'triton':  # 16 rows of many
            rows = results[key].flatten(0, -2)
            rows[:16] *= value
            results[key] = rows.view(results[key].shape)
        return results

    faulty_kernels(fault, part)
    problem = check_small(dtype)
    assert key in problem and f'of the {part}' in problem
    assert 'wrong numbers' in problem


def test_self_test_finds_results_that_do_not_repeat(faulty_kernels):
    noise = iter(range(100))

    def fault(run, *args):
        results = run(*args)
        if args[-1] == 'triton':
            results['output'][0, 0, 0, 0] += 1e-6 * next(noise)
        return results

    faulty_kernels(fault, 'cell')
    assert check_small().startswith('got different bits in a second run: output of the cell')


# -- Cached verdicts -------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU, on which a program replaces the self-test."""

    class Machine:
        cache, temporary = tmp_path / 'torch' / 'mmvil', tmp_path / 'temporary'

        def play(self, program):
            """Run a program instead, and record that it ran."""
            noting = f'open({str(tmp_path / "runs")!r}, "a").write("x")\n'
            command = [sys.executable, '-S', '-c', noting + program]
            monkeypatch.setattr(verdict, '_command', lambda *_: command)
            return self.ask()

        def ask(self):
            verdict._cached_problem.cache_clear()
            return verdict.self_test_problem(GPU, torch.bfloat16, 96)

        @property
        def runs(self):
            file = tmp_path / 'runs'
            return len(file.read_text()) if file.exists() else 0

        @property
        def verdicts(self):
            return list(self.cache.glob('*.json'))

    Machine.temporary.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(Machine.temporary))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setattr(verdict, '_cache_key', lambda *_: KEY)
    monkeypatch.setattr('mmvil.ops.triton.triton_problem', lambda: None)
    monkeypatch.setattr('mmvil.ops.triton.device_problem', lambda kind, index: None)
    yield Machine()
    verdict._cached_problem.cache_clear()


def test_verdict_is_cached(machine):
    for _ in range(2):
        assert machine.play('print("The kernels are right.")') is None
    assert machine.runs == 1
    content = json.loads(machine.verdicts[0].read_text())
    assert content == dict(subject=KEY._asdict(), problem=None, until=math.inf)


@pytest.mark.parametrize(
    'program, problem',
    [
        (f'print("noise\\ngot wrong numbers"); raise SystemExit({FAILED})', 'got wrong numbers'),
        ('import os; os.kill(os.getpid(), 11)', 'crashed with SIGSEGV'),
        ('import os; os.abort()', 'crashed with SIGABRT'),
    ],
)
def test_verdict_on_a_compiler_fault_is_cached(machine, program, problem):
    message = machine.play(program)
    assert message.startswith(f'their self-test {problem} (Fake, bfloat16, heads 96 wide, Triton')
    assert 'TRITON_PTXAS_PATH=' in message and str(machine.verdicts[0]) in message
    assert machine.ask() == message
    assert machine.runs == 1
    machine.verdicts[0].unlink()
    assert machine.ask() == message
    assert machine.runs == 2


def test_verdict_on_a_hanging_kernel(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(verdict, 'TIMEOUT', 1.5)
    late = tmp_path / 'late'
    compiler = f'import time; time.sleep(3); open({str(late)!r}, "w")'
    start = time.monotonic()
    message = machine.play(
        f'import subprocess, sys; subprocess.run([sys.executable, "-S", "-c", {compiler!r}])'
    )
    assert 'gave no result within 1.5 seconds' in message and machine.verdicts
    time.sleep(max(0, 4 - (time.monotonic() - start)))
    assert not late.exists(), 'what the test had started was left behind'
    day = time.time() + 86400
    monkeypatch.setattr(time, 'time', lambda: day - 60)
    assert machine.ask() == message and machine.runs == 1
    monkeypatch.setattr(time, 'time', lambda: day + 60)
    assert machine.play('pass') is None and machine.runs == 2


@pytest.mark.parametrize(
    'program, problem',
    [
        (f'print("out of memory"); raise SystemExit({IMPOSSIBLE})', 'impossible: out of memory'),
        ('import no_such_module', "could not run: ModuleNotFoundError: No module named 'no_such_"),
        ('import os; os.kill(os.getpid(), 9)', 'crashed with SIGKILL'),
    ],
)
def test_verdict_on_other_failures_is_not_cached(machine, program, problem):
    message = machine.play(program)
    assert problem in message and 'the next process tries again' in message
    assert 'PTXAS' not in message and not machine.verdicts
    assert machine.play('pass') is None and machine.runs == 2


def test_verdict_is_stored_before_a_program_holds_the_gpu(machine, monkeypatch):
    """In exclusive mode the self-test cannot run beside the program that asks for it."""
    for name in ('faulthandler', '_probe', 'check'):
        monkeypatch.setattr(self_test, name, mock.Mock(return_value=None))
    error = 'CUDA error: CUDA-capable device(s) is/are busy or unavailable'
    message = machine.play(f'print({error!r}); raise SystemExit({IMPOSSIBLE})')
    assert f'impossible: {error}' in message and 'exclusive mode' in message
    module, *arguments = re.search('`python -m (.*)`', message).group(1).split()
    assert module == self_test.__name__ and self_test.main(arguments) == 0
    self_test.check.assert_called_once_with(GPU, torch.bfloat16, 96)
    assert machine.ask() is None and machine.runs == 1


def test_verdict_of_a_program_that_does_not_start(machine, monkeypatch):
    monkeypatch.setattr(verdict, '_command', lambda *_: ['/no/such/python'])
    assert 'could not start' in machine.ask() and not machine.verdicts


@pytest.mark.parametrize(
    'content',
    ['', '{"problem": nu', '[]', 'null', '{"problem": null}', '\ufffd' * 9, '{"problem": 3}'],
)
def test_verdict_that_cannot_be_read_is_replaced(machine, content):
    assert 'crashed' in machine.play('import os; os.abort()')
    (file,) = machine.verdicts
    file.write_text(content)
    assert machine.play('pass') is None
    assert json.loads(file.read_text())['problem'] is None


def test_verdict_on_another_compiler_does_not_count(machine, monkeypatch):
    machine.play('import os; os.abort()')
    monkeypatch.setattr(verdict, '_cache_key', lambda *_: KEY._replace(ptxas='13.4'))
    assert machine.play('pass') is None


@pytest.mark.parametrize('where', ['folder', 'write'])
def test_verdict_without_a_writable_cache(machine, monkeypatch, caplog, where):
    if where == 'folder':  # permissions do not stop root
        for folder in (machine.cache.parent, machine.temporary / f'mmvil_{os.getuid()}'):
            folder.write_text('a file where the folder should be')
    else:

        def full(*_):
            raise OSError('No space left on device')

        monkeypatch.setattr(Path, 'replace', full)
    assert 'crashed' in machine.play('import os; os.abort()')
    assert 'nothing can be kept' in caplog.text
    assert machine.play('pass') is None and machine.runs == 2
    assert where == 'folder' or not list(machine.cache.glob('*.tmp'))


@pytest.mark.parametrize('why', ['cannot be written', 'no home'])
def test_verdict_in_a_temporary_folder(machine, monkeypatch, tmp_path, caplog, why):
    monkeypatch.chdir(tmp_path)
    if why == 'no home':  # torch cannot expand it
        monkeypatch.setattr(torch.hub, 'get_dir', lambda: '~/.cache/torch/hub')
    else:
        machine.cache.parent.write_text('a file where the folder should be')
    for _ in range(2):
        assert machine.play('pass') is None
    assert machine.runs == 1 and not caplog.records and not Path('~').exists()
    assert list(machine.temporary.glob(f'mmvil_{os.getuid()}/*.json'))


def test_verdict_in_a_folder_that_cannot_be_written(machine, monkeypatch):
    machine.play('pass')
    monkeypatch.setattr(os, 'access', lambda *_: False)
    assert machine.ask() is None and machine.runs == 1
    assert not list(machine.temporary.iterdir())


def test_verdict_serves_other_users(machine):
    before = os.umask(0o022)
    try:
        machine.play('pass')
    finally:
        os.umask(before)
    assert machine.verdicts[0].stat().st_mode & 0o777 == 0o644


def test_program_that_changes_directory_is_tested(machine, monkeypatch, tmp_path):
    """With mmvil imported from the directory where it started, and a path that is no string."""
    root = Path(verdict.__file__).parents[3]
    elsewhere = [x for x in sys.path if x and Path(x) != root]
    monkeypatch.setattr(sys, 'path', ['', tmp_path, *elsewhere])
    monkeypatch.chdir(tmp_path)
    program = 'import os; path = os.environ["PYTHONPATH"].split(":")\n'
    assert machine.play(program + f'assert {str(root)!r} in path and "" not in path') is None


def in_other_processes(count, function):
    """Start forks, which need not import torch again."""
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=function) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def test_one_process_tests_and_the_others_wait(machine):
    def ask():
        result = machine.play('import time; time.sleep(1)')
        os._exit(0 if result is None else 1)

    processes = in_other_processes(4, ask)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert machine.runs == 1


def test_a_lock_ends_with_its_process(machine, tmp_path, monkeypatch):
    lock, has_it = tmp_path / 'lock', multiprocessing.get_context('fork').Event()

    def hold():
        with lock.open('w') as file:
            verdict._acquire(file.fileno())
            has_it.set()
            time.sleep(100)

    (owner,) = in_other_processes(1, hold)
    has_it.wait()
    with lock.open('w') as file:
        assert not verdict._acquire(file.fileno())
        owner.kill()
        owner.join()
        assert verdict._acquire(file.fileno())


def test_waiting_for_another_process_ends(machine, monkeypatch):
    machine.play('pass')
    machine.verdicts[0].unlink()
    monkeypatch.setattr(verdict, '_acquire', lambda _: False)
    monkeypatch.setattr(verdict, 'TIMEOUT', -60)
    assert 'timed out waiting' in machine.ask()
    assert not machine.verdicts and machine.runs == 1


def test_waiting_ends_with_a_verdict_though_the_lock_is_held(machine, monkeypatch):
    """By a fork of the process that tested."""
    machine.play('pass')
    content = machine.verdicts[0].read_text()
    machine.verdicts[0].unlink()
    monkeypatch.setattr(verdict, '_acquire', lambda _: False)
    path = machine.cache / f'{next(machine.cache.glob("*.lock")).name.split(".")[0]}.json'
    monkeypatch.setattr(time, 'sleep', lambda _: path.write_text(content))
    assert machine.ask() is None and machine.runs == 1


@pytest.mark.parametrize(
    'error, status',
    [
        (RuntimeError('an illegal address\nand a hint'), FAILED),
        (RuntimeError('CUDA out of memory'), IMPOSSIBLE),
        (OSError(28, 'No space left on device'), IMPOSSIBLE),
    ],
)
def test_self_test_tells_faults_of_kernels_from_others(monkeypatch, capsys, error, status):
    monkeypatch.setattr(self_test, 'faulthandler', mock.Mock())
    monkeypatch.setattr(self_test, '_probe', mock.Mock())
    monkeypatch.setattr(self_test, 'check', mock.Mock(side_effect=error))
    assert self_test.main(['--dtype=bfloat16', '--head-width=96', '--device=cpu']) == status
    first = str(error).splitlines()[0]
    assert capsys.readouterr().out == f'raised {type(error).__name__}: {first}\n'


WITHOUT_GPU = 'raised RuntimeError: 0 active drivers'


def command_on_cpu():
    return [x.replace('cuda:0', 'cpu') for x in verdict._command(KEY, 0)]


@pytest.mark.skipif(is_interpreted(), reason='interpreted kernels run without a GPU')
@needs_triton
def test_self_test_takes_the_arguments_of_its_command(monkeypatch, capsys):
    """Without a GPU no kernel runs, which is not the fault of these."""
    _, _, module, *arguments = command_on_cpu()
    monkeypatch.setattr(self_test, 'faulthandler', mock.Mock())
    assert module == self_test.__name__ and self_test.main(arguments) == IMPOSSIBLE
    assert capsys.readouterr().out.splitlines()[-1].startswith(WITHOUT_GPU)


@needs_triton
@pytest.mark.slow  # imports torch and mmengine once more
def test_self_test_runs_as_a_program(machine, monkeypatch):
    command = command_on_cpu()
    monkeypatch.setattr(verdict, '_command', lambda *_: command)
    assert WITHOUT_GPU in machine.ask()


@needs_triton
def test_subject_names_the_assembler_that_triton_takes(monkeypatch):
    import triton

    older, newer = verdict.assembler(80), verdict.assembler(100)
    assert older[1] == 'TRITON_PTXAS_PATH' and older[0].split('.')[0] in ('12', '13')
    if not hasattr(triton, 'knobs'):  # Triton 3.3
        assert newer[1] == 'TRITON_PTXAS-BLACKWELL_PATH'
    elif hasattr(triton.knobs.nvidia, 'ptxas_blackwell'):
        assert newer[1] == 'TRITON_PTXAS_BLACKWELL_PATH'
        monkeypatch.setenv('TRITON_PTXAS_PATH', triton.knobs.nvidia.ptxas_blackwell.path)
        assert verdict.assembler(80)[0] == newer[0]


@pytest.mark.parametrize(
    'module, problem',
    [
        (None, 'Triton is not installed'),
        (SimpleNamespace(__version__='3.2.0+git1'), r'Triton is 3\.2\.0\+git1, but 3\.3 or later'),
    ],
)
def test_triton_is_found_by_its_module(monkeypatch, module, problem):
    """Not by a package's name, of which there are several."""
    monkeypatch.setitem(sys.modules, 'triton', module)
    assert re.match(problem, triton_problem.__wrapped__())
    monkeypatch.setitem(sys.modules, 'triton', SimpleNamespace(__version__='3.10.0+gitx'))
    assert triton_problem.__wrapped__() is None
    monkeypatch.setattr(sys, 'platform', 'win32')
    assert 'Linux' in triton_problem.__wrapped__()


# -- Choice of the form ----------------------------------------------------------------------------


def form(backend='auto', dtype=torch.bfloat16):
    return choose_form(GPU, dtype, 196, 96, backend)


@pytest.mark.skipif(is_interpreted(), reason='interpreted kernels are not tested')
def test_auto_takes_only_kernels_that_passed(machine, caplog):
    machine.play('pass')
    assert form().triton and not caplog.records
    machine.verdicts[0].unlink()
    machine.play('import os; os.abort()')
    with caplog.at_level(logging.WARNING):
        assert not form().triton and not form().triton
    (record,) = caplog.records
    assert 'runs in plain PyTorch' in record.message and 'SIGABRT' in record.message
    assert form('triton').triton, 'who names the kernels gets them'


@pytest.mark.skipif(is_interpreted(), reason='interpreted kernels are not tested')
def test_kernels_are_tested_only_where_they_would_be_taken(machine, monkeypatch):
    assert not form(dtype=torch.float64).triton
    assert form('triton').triton
    assert not form('chunkwise').triton
    assert not choose_form(CPU, torch.bfloat16, 196, 96, 'auto').triton
    monkeypatch.setenv('MMVIL_TRITON', '0')
    assert not form().triton
    with pytest.raises(ValueError, match='MMVIL_TRITON disables the kernels'):
        form('triton')
    assert not machine.runs


@pytest.mark.skipif(is_interpreted(), reason='interpreted kernels are not tested')
def test_self_test_is_not_traced(machine):
    machine.play('pass')
    machine.verdicts[0].unlink()
    verdict._cached_problem.cache_clear()

    @torch.compile(fullgraph=True, backend='eager')
    def function(x):
        return x + choose_form(x.device if x.is_cuda else GPU, x.dtype, 196, 96, 'auto').triton

    assert function(torch.zeros(1, dtype=torch.bfloat16)) == 1
    assert machine.runs == 2
