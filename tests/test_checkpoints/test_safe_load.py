# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Loading a checkpoint runs no code."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.optim import LinearLR, MultiStepLR, OneCycleLR, PolyLR
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader
from torch import nn

from mmvil.checkpoints import DamagedCheckpointError, UntrustedCheckpointError, load_safely
from mmvil.checkpoints.loaders import register_safe_loaders
from mmvil.checkpoints.sharded import require_shards


def checkpoint():
    """What mmengine writes: weights, optimizer, schedulers, log with its history, numbers."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).half()
    optimizer = torch.optim.AdamW(model.parameters())
    schedulers = [LinearLR(optimizer), MultiStepLR(optimizer, [8, 11]), PolyLR(optimizer)]
    # Holds a function.
    schedulers.append(OneCycleLR(torch.optim.SGD(model.parameters(), 0.1), 0.1, total_steps=9))
    hub = MessageHub('of_test_safe_checkpoint')
    hub.update_scalar('train/loss', np.float32(1.5))
    hub.update_info('best', np.float64(2.5))
    return dict(
        meta=dict(iter=np.int64(3), size=torch.Size([2]), dtype=torch.bfloat16),
        state_dict=OrderedDict(model.state_dict()),
        message_hub=hub.state_dict(),
        optimizer=optimizer.state_dict(),
        param_schedulers=[each.state_dict() for each in schedulers],
        others=dict(names={'a'}, part=slice(1, 2)),
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
        (getattr, (OneCycleParamScheduler, 'build_iter_from_epoch')),
        (getattr, (dict, 'min')),  # allowed of another class
        (np.memmap, ('{}', 'uint8', 'w+', 0, 1)),
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


def test_index_of_shards_that_would_run_code_is_rejected(tmp_path):
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


@pytest.mark.parametrize('scheme', ['', 'http://a.example/', 'https://a.example/'])
def test_mmengine_runs_nothing(tmp_path, monkeypatch, scheme):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    register_safe_loaders()
    (tmp_path / 'checkpoints').mkdir()  # the cache of files of the web
    path, trace = tmp_path / 'checkpoints/evil.pth', tmp_path / 'was_here'
    torch.save(dict(state_dict={}, extra=Attack(os.mkdir, str(trace))), path)
    with pytest.raises(UntrustedCheckpointError, match='mkdir'):
        CheckpointLoader.load_checkpoint(f'{scheme or "~/checkpoints/"}evil.pth')
    assert not trace.exists()


def test_torchscript_is_rejected(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / 'model.pt')
    with pytest.raises(UntrustedCheckpointError, match='model.pt is TorchScript'):
        load_safely(tmp_path / 'model.pt')
