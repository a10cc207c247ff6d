# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import multiprocessing
import os

import pytest
import torch
from mmengine.config import Config

from mmvil.cli.errors import UserError
from mmvil.cli.work_dir import choose_checkpoint, lock_work_dir, save_atomically


def test_save_atomically_on_local_disks_only():
    cfg = Config(dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook'))))
    assert not save_atomically(cfg)
    assert cfg.default_hooks.checkpoint.backend_args == dict(backend='mmvil_atomic')
    cfg = Config(dict(default_hooks=dict(checkpoint=dict(out_dir='s3://a', max_keep_ckpts=1))))
    (note,) = save_atomically(cfg)
    assert 'keeping 2 checkpoints' in note
    assert cfg.default_hooks.checkpoint == dict(out_dir='s3://a', max_keep_ckpts=2)


def test_choose_checkpoint_passes_over_what_is_damaged(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), resume=True))
    (note,) = choose_checkpoint(cfg)
    assert not cfg.resume and cfg.load_from is None and 'nothing to resume' in note
    (tmp_path / 'iter_2.pth').write_bytes(b'PK half a file')
    with pytest.raises(UserError, match='no checkpoint in .* is complete: .*iter_2.pth'):
        choose_checkpoint(cfg)
    torch.save({}, tmp_path / 'iter_1.pth')
    os.utime(tmp_path / 'iter_1.pth', (0, 0))
    notes = choose_checkpoint(cfg)
    assert cfg.resume and cfg.load_from == str(tmp_path / 'iter_1.pth')
    assert 'iter_2.pth is damaged' in notes[0] and notes[1] == f'resuming from {cfg.load_from}'


def test_choose_checkpoint_rejects_half_a_file(tmp_path):
    (tmp_path / 'half.pth').write_bytes(b'PK half a file')
    cfg = Config(dict(work_dir=str(tmp_path), resume=True, load_from=str(tmp_path / 'half.pth')))
    with pytest.raises(UserError, match='half.pth is damaged.*--resume without a name'):
        choose_checkpoint(cfg)
    cfg.load_from = 'https://example.org/a.pth'
    assert not choose_checkpoint(cfg) and cfg.resume


def lock(work_dir, said):
    try:
        with lock_work_dir(work_dir):
            said.put('locked')
    except UserError as error:
        said.put(str(error))


def test_lock_work_dir_keeps_another_process_out(tmp_path, monkeypatch):
    fork = multiprocessing.get_context('fork')

    def in_another_process():
        said = fork.SimpleQueue()
        process = fork.Process(target=lock, args=(tmp_path / 'work', said))
        process.start()
        process.join()
        return said.get()

    with lock_work_dir(tmp_path / 'work'):
        (tmp_path / 'work/iter_1.pth.partial').touch()
        assert f'process {os.getpid()} on' in in_another_process()
        monkeypatch.setenv('RANK', '1')  # other ranks of this training
        assert in_another_process() == 'locked'
        monkeypatch.delenv('RANK')
    assert (tmp_path / 'work/iter_1.pth.partial').exists()
    assert in_another_process() == 'locked'
    assert not (tmp_path / 'work/iter_1.pth.partial').exists()
