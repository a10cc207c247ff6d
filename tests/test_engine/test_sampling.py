# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The augmentation of a sample depends on its place in the training alone."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mmvil.engine import SampleError
from mmvil.engine import sampling as module
from mmvil.engine.sampling import check_annotations, name_failures, seed_samples


class Noise(Dataset):
    """Each sample is its index and one number of each generator."""

    metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(1).item()


def draw(batches, sampler=InfiniteSampler, workers=0, seed=3, **options):
    """The samples of some batches, in one list of numbers."""
    dataset = Noise()
    loader = DataLoader(
        dataset,
        batch_size=2,
        sampler=sampler(dataset, shuffle=True, seed=0),
        num_workers=workers,
        collate_fn=list,
    )
    seed_samples(loader, seed, **options)
    drawn = [sample for _, batch in zip(range(batches), loader) for sample in batch]
    return drawn


def test_samples_are_the_same_with_and_without_workers():
    alone = draw(5)
    assert len(set(alone)) == 10
    assert draw(5, workers=2) == alone
    assert draw(5, seed=4) != alone


def test_samples_continue_after_a_resume():
    assert draw(3, passed=4) == draw(7)[8:]


def test_repeated_images_are_augmented_differently():
    drawn = draw(6)
    first, second = sorted(drawn[:6]), sorted(drawn[6:])
    assert [sample[0] for sample in first] == [sample[0] for sample in second]
    assert not {sample[1:] for sample in first} & {sample[1:] for sample in second}


def test_epochs_differ_and_repeat():
    def epochs(first, number):
        dataset = Noise()
        sampler = DefaultSampler(dataset, shuffle=False, seed=0)
        loader = DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=list)
        seed_samples(loader, 0, epoch=first)
        return [[sample for batch in loader for sample in batch] for _ in range(number)]

    straight = epochs(0, 3)
    assert straight[0] != straight[1] != straight[2]
    assert epochs(1, 2) == straight[1:]


def test_two_processes_draw_what_one_draws(monkeypatch):
    whole = draw(6)
    for rank in (0, 1):
        monkeypatch.setattr(module, 'get_dist_info', lambda rank=rank: (rank, 2))
        monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda rank=rank: (rank, 2))
        assert draw(3) == whole[rank::2]


def test_datasets_without_indices_are_rejected():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(TypeError, match='Stream .* no sample indices'):
        seed_samples(DataLoader(Stream()), 0)


class Broken(Noise):
    """Samples of a segmentor: the first is fine, each other one is bad in its own way."""

    ignore_index = 255

    def get_data_info(self, index):
        return dict(img_path=f'{index}.jpg', seg_map_path=f'{index}.png')

    def __getitem__(self, index):
        labels = torch.zeros(1, 4, 4, dtype=torch.long)
        if index == 1:
            raise OSError('failed to load\nthe image')
        if index == 2:
            labels = labels[..., :2]
        if index == 6:
            labels = torch.zeros(4, 4, 3, dtype=torch.long)
        labels[0, 0, 0] = {3: 255, 4: 2, 5: -1}.get(index, 1)
        target = SimpleNamespace(gt_sem_seg=SimpleNamespace(data=labels))
        return dict(inputs=torch.zeros(3, 4, 4), data_samples=target)


@pytest.mark.parametrize(
    'index, workers, message',
    [
        (0, 0, None),
        (1, 0, 'cannot load 1.jpg with annotation 1.png: OSError: failed to load the image'),
        (1, 1, 'cannot load 1.jpg with annotation 1.png: OSError: failed to load the image'),
        (2, 0, '2.jpg with annotation 2.png: the annotation has 4x2 pixels but the image has 4x4'),
        (3, 0, None),
        (4, 0, '4.jpg with annotation 4.png: its labels run from 0 to 2, but .* classes 0 to 1'),
        (5, 0, '5.jpg .*: its labels run from -1 to 0'),
        (6, 0, '6.jpg .*: the annotation has colors, not one label per pixel; declare'),
    ],
)
def test_bad_sample_is_named(index, workers, message):
    loader = DataLoader(Broken(), sampler=[index], num_workers=workers, collate_fn=list)
    seed_samples(loader, 0)
    if message is None:
        assert len(next(iter(loader))) == 1
    else:
        with pytest.raises(SampleError, match=message):
            next(iter(loader))


@pytest.mark.parametrize('workers', [0, 1])
def test_bad_sample_of_an_evaluation_is_named(workers):
    loader = DataLoader(Broken(), sampler=[2, 1], num_workers=workers, collate_fn=list)
    name_failures(loader.dataset)
    batches = iter(loader)
    next(batches)  # its labels are the matter of check_annotations
    with pytest.raises(SampleError, match='cannot load 1.jpg with annotation 1.png: OSError'):
        next(batches)


def test_annotations_of_an_evaluation_have_the_size_of_the_file():
    for width, message in ((4, None), (2, 'a.png: the annotation has 4x2 pixels')):
        target = BaseDataElement(metainfo=dict(ori_shape=(4, 4), seg_map_path='a.png'))
        target.gt_sem_seg = SimpleNamespace(data=torch.zeros(1, 4, width, dtype=torch.long))
        with pytest.raises(SampleError, match=message) if message else nullcontext():
            check_annotations(Broken(), dict(data_samples=[target]))
