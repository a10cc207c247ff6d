# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Which checkpoint a training resumes from."""

import os

import numpy as np
import pytest
import torch

from mmvil.checkpoints import (
    DamagedCheckpointError,
    UntrustedCheckpointError,
    find_good_checkpoint,
    load_safely,
    verify,
)
from tests.test_checkpoints.test_safe_load import checkpoint


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


@pytest.mark.parametrize('record', [b'PK\1\2', b'PK\3\4'])
def test_verify_and_loading_notice_damage_outside_of_the_tensors(tmp_path, record):
    path = tmp_path / 'a.pth'
    torch.save(dict(state_dict=dict(a=torch.zeros(10))), path)
    path.write_bytes(path.read_bytes().replace(record, bytes(4)))
    for load in (verify, load_safely):
        with pytest.raises(DamagedCheckpointError, match='a.pth is damaged'):
            load(path)


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


@pytest.mark.parametrize(
    'age, newest', [(-1, 'iter_20.pth'), (0, 'iter_20.pth'), (1, 'iter_3.pth')]
)
def test_find_good_checkpoint_takes_the_newest_file_and_then_the_highest_step(
    tmp_path, age, newest
):
    """After another training in the same work dir, or on file systems with coarse times."""
    for name, time in (('iter_20.pth', 1e9), ('iter_3.pth', 1e9 + age)):
        torch.save(dict(state_dict={}), tmp_path / name)
        os.utime(tmp_path / name, (time, time))
    assert find_good_checkpoint(tmp_path)[0] == str(tmp_path / newest)


def test_find_good_checkpoint_allows_code_in_a_trusted_one(tmp_path):
    torch.save(dict(state_dict={}, extra=np.poly1d([1, 2])), tmp_path / 'iter_1.pth')
    with pytest.raises(UntrustedCheckpointError, match='poly1d'):
        find_good_checkpoint(tmp_path)
    assert find_good_checkpoint(tmp_path, trusted=True)[0] == str(tmp_path / 'iter_1.pth')
