# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import argparse
import errno
import os
import re
from pathlib import Path

import pytest

import mmvil
from mmvil.cli import main as cli_main
from mmvil.cli.errors import UserError
from mmvil.cli.main import (
    add_config_arguments,
    add_runner_arguments,
    at_least,
    device,
    figure_path,
    make_parser,
    parse_args,
    run,
)
from mmvil.engine import SampleError
from tests.conftest import ROOT


def test_value_error_of_mmvil_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        run(lambda: mmvil.VisionLSTM(arch='huge'))
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: Unknown arch 'huge'")


def test_value_error_of_others_keeps_its_trace():
    with pytest.raises(ValueError, match='invalid literal'):
        run(lambda: int('x'))


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_line_that_names_the_file(capsys, number):
    def main():
        raise OSError(number, os.strerror(number), 'work/iter_10.pth')

    with pytest.raises(SystemExit) as exit_:
        run(main)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f'error: {os.strerror(number)} while writing work/iter_10.pth.')
    assert said.count('\n') == 1 and '--resume' in said


def test_unusable_path_is_one_line(tmp_path, capsys):
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit):
        run((tmp_path / 'file/folder').mkdir)
    assert capsys.readouterr().err == f'error: Not a directory: {tmp_path}/file/folder\n'


def test_read_only_file_system_is_no_full_disk(capsys):
    def main():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), 'work')

    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err == f'error: {os.strerror(errno.EROFS)}: work\n'


def test_other_errors_of_the_system_keep_their_trace():
    with pytest.raises(FileNotFoundError):
        run(lambda: open('/does/not/exist'))


def test_bad_sample_from_a_worker_process_is_one_line(capsys):
    def main():  # what torch makes of it
        raise SampleError(
            'Caught SampleError in DataLoader worker process 0.\nOriginal Traceback:\n  File …\n'
            'mmvil.engine.sampling.SampleError: cannot load a.jpg: OSError: cut off\n'
        )

    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err == 'error: cannot load a.jpg: OSError: cut off\n'


def fail():
    raise UserError('wrong')


def test_run_shows_the_trace_if_asked_on_the_command_line_or_by_the_environment(monkeypatch):
    with pytest.raises(SystemExit):
        run(fail, argv=[])
    with pytest.raises(UserError):
        run(fail, argv=['--traceback'])
    monkeypatch.setenv('MMVIL_TRACEBACK', '1')
    with pytest.raises(UserError):
        run(fail, argv=[])


def test_run_reports_an_error_of_all_ranks_once(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    with pytest.raises(SystemExit):
        run(fail, argv=[])
    assert not capsys.readouterr().err


@pytest.mark.parametrize('argv, calls', [([], 1), (['--trust-checkpoint'], 0)])
def test_run_loads_safely_unless_checkpoints_are_trusted(monkeypatch, argv, calls):
    registered = []
    monkeypatch.setattr(cli_main, 'register_safe_loaders', lambda: registered.append(1))
    run(lambda: None, argv)
    assert len(registered) == calls


def test_parse_args_reads_argv_and_exports_the_local_rank(monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    parser = make_parser('Train.\n\nmore')
    add_runner_arguments(parser)
    argv = ['a.py', '--local-rank', '3', '--cfg-options', 'model.depth=2', 'x=a,b']
    args = parse_args(parser, argv)
    assert parser.description == 'Train.'
    assert (args.config, args.launcher, args.trust_checkpoint) == ('a.py', 'none', False)
    assert args.cfg_options == {'model.depth': 2, 'x': ['a', 'b']}
    assert os.environ.pop('LOCAL_RANK') == '3'


@pytest.mark.parametrize('option', ['depth', 'a=[1,2', 'a=[dict(b=1,c=2)]', "a={'b':c}"])
def test_parse_args_reports_malformed_cfg_options(option, capsys):
    parser = make_parser('Check.')
    add_config_arguments(parser)
    with pytest.raises(SystemExit):
        parse_args(parser, ['a.py', '--cfg-options', option])
    assert 'KEY=VALUE pairs without white space' in capsys.readouterr().err


@pytest.mark.parametrize(
    'text, value',
    [
        ('my data (1)/été', 'my data (1)/été'),
        ("{'type':'SGD', 'lr': 0.1}", dict(type='SGD', lr=0.1)),
        ("[{'type':'PolyLR','end':10}]", [dict(type='PolyLR', end=10)]),
        ('[(a, 1),(b,2)]', [('a', 1), ('b', 2)]),
        ('"5"', 5),
    ],
)
def test_cfg_options_keep_text_and_accept_dicts(text, value):
    parser = make_parser('Check.')
    add_config_arguments(parser)
    parsed = parse_args(parser, ['a.py', '--cfg-options', f'key={text}']).cfg_options['key']
    assert parsed == value


def test_parse_args_rejects_a_launcher_that_has_not_started_it(monkeypatch, capsys):
    monkeypatch.delenv('RANK', raising=False)
    parser = make_parser('Train.')
    add_runner_arguments(parser)
    with pytest.raises(SystemExit):
        parse_args(parser, ['a.py', '--launcher', 'pytorch'])
    assert 'requires torchrun; use tools/dist_train.sh' in capsys.readouterr().err


@pytest.mark.parametrize(
    'option, text, message',
    [
        ('--num', '0', 'argument --num: must be at least 1, but is 0'),
        ('--num', 'x', "argument --num: invalid int value: 'x'"),
        ('--lr', 'nan', 'argument --lr: must be at least 0.5, but is nan'),
        ('--share', '1.5', 'argument --share: must be 0 to 1, but is 1.5'),
        ('--device', 'gpu', 'argument --device: cannot use gpu: Expected one of cpu, cuda,'),
        ('--out', 'curve.xyz', r'argument --out: must end with one of .*\.png.*, but is curve.xyz'),
        ('--out', 'curve', 'argument --out: must end with one of .*, but is curve'),
    ],
)
def test_types_of_arguments_say_what_they_accept(capsys, option, text, message):
    parser = argparse.ArgumentParser()
    parser.add_argument('--num', type=at_least(1))
    parser.add_argument('--lr', type=at_least(0.5, float))
    parser.add_argument('--share', type=at_least(0, float, 1))
    parser.add_argument('--device', type=device)
    parser.add_argument('--out', type=figure_path)
    good = parser.parse_args(['--num', '1', '--lr', '0.5', '--out', 'a/curve.PDF'])
    assert (good.num, good.lr, good.out) == (1, 0.5, Path('a/curve.PDF'))
    with pytest.raises(SystemExit):
        parser.parse_args([option, text])
    assert re.search(message, capsys.readouterr().err)


def test_numbers_of_the_tools_have_limits():
    for path in (ROOT / 'tools').rglob('*.py'):
        if path.name != 'make_demo_dataset.py':  # checks them itself
            unlimited = re.search(r'^(?!.*choices=).*type=(int|float)\b.*', path.read_text(), re.M)
            assert unlimited is None, f'{path}: {unlimited[0]}'
