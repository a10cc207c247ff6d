# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import pytest
import torch

from mmvil import VisionLSTM
from mmvil.apis.vtab1k import (
    DATASETS,
    Job,
    Protocol,
    as_csv,
    as_markdown,
    check_data,
    read_architecture,
    summarize,
)
from mmvil.cli.run_queue import Claims


@pytest.fixture
def protocol(tmp_path):
    """One dataset whose search has ended: two learning rates, two seeds, one run failed."""
    claims = Claims(tmp_path, max_attempts=1)
    accuracies = {(0.1, 0): 50.0, (0.1, 1): 60.0, (0.2, 0): 99.0}
    for (lr, seed), accuracy in accuracies.items():
        job = Job('svhn', 'tune', lr, seed)
        claims.claim(job.name).finish(dict(accuracy=accuracy, seconds=10))
    claims.claim(Job('svhn', 'tune', 0.2, 1).name).fail('Error')
    return Protocol(claims, ['svhn'], [0.2, 0.1], 2)


def test_protocol_chooses_among_learning_rates_with_all_seeds(protocol):
    assert protocol.best_lr('svhn') == 0.1
    states = protocol.runs()
    assert states[Job('svhn', 'tune', 0.2, 1)] == 'failed'
    assert [job.seed for job, state in states.items() if state == 'open'] == [0, 1]
    assert Job('svhn', 'final', 0.1, 0) in states


def test_protocol_reports_progress(protocol):
    assert protocol.progress() == '3 of 6 runs, 1 failed, about 0:00:20 left'
    assert protocol.progress_by_dataset() == [f'{"svhn":22}   3 of 6 runs, 1 failed']


def test_final_runs_wait_for_the_search(tmp_path):
    protocol = Protocol(Claims(tmp_path), ['svhn', 'dtd'], [0.1], 1)
    assert list(protocol.runs()) == [Job('svhn', 'tune', 0.1, 0), Job('dtd', 'tune', 0.1, 0)]
    assert protocol.best_lr('svhn') is None


def test_tables_average_over_what_is_complete(protocol):
    for seed, accuracy in enumerate((70.0, 80.0)):
        job = Job('svhn', 'final', 0.1, seed)
        protocol.claims.claim(job.name).finish(dict(accuracy=accuracy, seconds=10))
    rows, details = summarize(protocol, 'mine')
    assert details == {'svhn': (0.1, 55.0, 75.0, pytest.approx(50**0.5))}
    assert rows['mine'] == dict(
        natural=None, specialized=None, structured=None, average=None, svhn=75.0
    )
    assert rows['ViL-T, published']['average'] == 68.3
    assert '| svhn | natural | 0.1 | 55.0 | 75.0 | 7.1 |' in as_markdown(rows, details)
    header, mine, *_ = as_csv(rows).splitlines()
    assert dict(zip(header.split(','), mine.split(',')))['svhn'] == '75.00'
    assert len(DATASETS) == 19


@pytest.mark.parametrize(
    'name, meta, stride',
    [('a', {}, 4), ('a_stride2', {}, 2), ('a', dict(architecture=dict(stride=2)), 2)],
)
def test_read_architecture_finds_the_stride(tmp_path, name, meta, stride):
    backbone = VisionLSTM(
        arch=dict(embed_dims=16, depth=1), img_size=16, patch_size=4, out_type='bilateral_concat'
    )
    state = backbone.state_dict(prefix='backbone.')
    state['head.fc.weight'] = torch.zeros(10, 32)
    torch.save(dict(state_dict=state, meta=meta), tmp_path / f'{name}.pth')
    found = read_architecture(str(tmp_path / f'{name}.pth'))
    assert (found['patch_size'], found['stride']) == (4, stride)


def test_check_data_reports_problems(tmp_path):
    with pytest.raises(FileNotFoundError, match='data not found: .*train800.txt'):
        check_data(tmp_path, 2)
    (tmp_path / 'train800.txt').write_text('a.png')
    with pytest.raises(ValueError, match='lines must read'):
        check_data(tmp_path, 2)
    for split in ('train800', 'val200', 'train800val200', 'test'):
        (tmp_path / f'{split}.txt').write_text('a.png 1\n')
    with pytest.raises(FileNotFoundError, match='names a.png, which is not in'):
        check_data(tmp_path, 2)
    (tmp_path / 'a.png').touch()
    with pytest.raises(ValueError, match='expected labels from 0 to 0'):
        check_data(tmp_path, 1)
    assert len(check_data(tmp_path, 2)) == 3
