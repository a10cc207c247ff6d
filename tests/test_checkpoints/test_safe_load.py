# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Checkpoints are whole or not there, and loading one runs nothing."""

import errno
import itertools
import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.logging import MessageHub
from mmengine.runner import save_checkpoint
from torch import nn

from mmvil.checkpoints.atomic import ATOMIC
from mmvil.checkpoints.sharded import require_shards
from mmvil.engine import (
    DamagedCheckpointError,
    UntrustedCheckpointError,
    find_good_checkpoint,
    load_safely,
    verify,
)


def checkpoint():
    """What mmengine writes: weights, optimizer, schedulers, log with its history, numbers."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).half()
    optimizer = torch.optim.AdamW(model.parameters())
    hub = MessageHub('of_test_safe_checkpoint')
    hub.update_scalar('train/loss', np.float32(1.5))
    hub.update_info('best', np.float64(2.5))
    return dict(
        meta=dict(iter=np.int64(3), size=torch.Size([2]), dtype=torch.bfloat16),
        state_dict=OrderedDict(model.state_dict()),
        message_hub=hub.state_dict(),
        optimizer=optimizer.state_dict(),
        param_schedulers=[dict(last_step=2, names={'a'}, part=slice(1, 2))],
    )


@pytest.mark.parametrize('zipped', [True, False])
def test_load_safely_takes_what_mmengine_writes(tmp_path, zipped):
    expected = checkpoint()
    torch.save(expected, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    loaded = load_safely(tmp_path / 'a.pth')
    assert loaded['meta'] == expected['meta']
    assert loaded['param_schedulers'] == expected['param_schedulers']
    for name, tensor in expected['state_dict'].items():
        assert torch.equal(loaded['state_dict'][name], tensor)
    history = loaded['message_hub']['log_scalars']['train/loss']
    assert history.mean() == 1.5  # its methods are there, too


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize(
    'function, arguments',
    [
        (os.system, ('touch {}',)),
        (os.makedirs, ('{}',)),
        (eval, ("open('{}', 'w')",)),
        (getattr, (dict, 'update')),
        (np.save, ('{}', 0)),
        (torch.load, ('{}',)),
        (torch.hub.load, ('{}', 'model')),
    ],
    ids=lambda part: getattr(part, '__name__', ''),
)
def test_load_safely_runs_nothing(tmp_path, function, arguments, protocol, zipped):
    trace = tmp_path / 'was_here'
    arguments = [a.format(trace) if isinstance(a, str) else a for a in arguments]
    torch.save(
        dict(state_dict={}, extra=Attack(function, *arguments)),
        *(tmp_path / 'evil.pth',),
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UntrustedCheckpointError, match='evil.pth asks for '):
        load_safely(tmp_path / 'evil.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['evil.pth']


def test_index_of_shards_that_would_run_code_is_refused(tmp_path):
    try:
        require_shards()
    except ValueError as error:
        pytest.skip(str(error))
    torch.save({}, tmp_path / 'rest.pth')
    trace = tmp_path / 'was_here'
    (tmp_path / '.metadata').write_bytes(pickle.dumps(Attack(os.mkdir, str(trace))))
    with pytest.raises(UntrustedCheckpointError, match='mkdir'):
        load_safely(tmp_path)
    assert not trace.exists()
    (tmp_path / '.metadata').write_bytes(b'')
    with pytest.raises(DamagedCheckpointError, match='is damaged'):
        load_safely(tmp_path)


@pytest.mark.parametrize('share', [0, 0.001, 0.5, 0.99])
def test_verify_notices_what_is_cut_off(tmp_path, share):
    path = tmp_path / 'a.pth'
    torch.save(checkpoint(), path)
    verify(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DamagedCheckpointError, match='a.pth is damaged'):
        verify(path)


def test_verify_notices_a_flipped_bit(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save(dict(state_dict=dict(a=torch.zeros(1000))), path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(500)) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match='a.pth is damaged'):
        verify(path)


def test_atomic_backend_leaves_the_old_file_when_the_disk_is_full(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    path = tmp_path / 'iter_1.pth'
    save_checkpoint(dict(state_dict=dict(a=torch.zeros(10))), str(path), backend_args=ATOMIC)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError) as failure:
            large = dict(state_dict=dict(a=torch.zeros(100_000)))
            save_checkpoint(large, str(path), backend_args=ATOMIC)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failure.value.errno == errno.EFBIG and failure.value.filename == str(path)
    assert [each.name for each in tmp_path.iterdir()] == ['iter_1.pth']
    assert len(load_safely(path)['state_dict']['a']) == 10


def test_atomic_backend_shows_a_file_only_when_it_is_complete(tmp_path, monkeypatch):
    """As if the process were killed before the last step: under its name, nothing has appeared."""

    class Killed(BaseException):
        pass

    def killed(source, target):
        assert os.path.getsize(source) == 5 and not os.path.exists(target)
        raise Killed

    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(Killed):
        get_file_backend(backend_args=ATOMIC).put(b'whole', str(tmp_path / 'folder/a.pth'))
    assert not list(tmp_path.rglob('*.pth'))


def save_for_ever(path):
    for step in itertools.count():
        weights = torch.full((500_000,), float(step))
        save_checkpoint(dict(state_dict=dict(a=weights)), path, backend_args=ATOMIC)


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / 'iter_1.pth'
    fork, killed_while_writing = multiprocessing.get_context('fork'), 0
    for delay in np.linspace(0, 0.02, 15):
        process = fork.Process(target=save_for_ever, args=(str(path),))
        process.start()
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        verify(path)
        assert len(load_safely(path)['state_dict']['a'].unique()) == 1
        killed_while_writing += (tmp_path / 'iter_1.pth.partial').exists()
        path.unlink()
    assert killed_while_writing  # else this has shown nothing


def test_find_good_checkpoint_passes_over_damaged_ones(tmp_path):
    assert find_good_checkpoint(tmp_path) == (None, [])
    for age, step in enumerate((30, 20, 10)):  # seconds before now
        path = tmp_path / f'iter_{step}.pth'
        torch.save(dict(state_dict={}), path)
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / 'best_mIoU_iter_40.pth').write_bytes(b'')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_50.pth'))  # is not there
    assert find_good_checkpoint(tmp_path) == (str(tmp_path / 'iter_30.pth'), [])

    for step in (30, 20):
        path = tmp_path / f'iter_{step}.pth'
        path.write_bytes(path.read_bytes()[:-30])
        os.utime(path, (1e9 + step, 1e9 + step))
    found, complaints = find_good_checkpoint(tmp_path)
    assert found == str(tmp_path / 'iter_10.pth')
    assert ['iter_30.pth' in complaints[0], 'iter_20.pth' in complaints[1]] == [True, True]

    (tmp_path / 'iter_10.pth').unlink()
    found, complaints = find_good_checkpoint(tmp_path)
    assert found is None and len(complaints) == 2


def test_find_good_checkpoint_looks_where_last_checkpoint_says(tmp_path):
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    torch.save(dict(state_dict={}), elsewhere / 'epoch_3.pth')
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work/last_checkpoint').write_text(str(elsewhere / 'epoch_3.pth'))
    assert find_good_checkpoint(tmp_path / 'work')[0] == str(elsewhere / 'epoch_3.pth')
    (tmp_path / 'work/last_checkpoint').write_text('')  # killed while writing it
    assert find_good_checkpoint(tmp_path / 'work') == (None, [])
