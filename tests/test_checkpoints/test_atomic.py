# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Checkpoints are written completely or not at all."""

import errno
import itertools
import multiprocessing
import os
import resource
import signal
import time

import numpy as np
import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.runner import save_checkpoint

from mmvil.checkpoints import ATOMIC, load_safely, verify


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
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
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
