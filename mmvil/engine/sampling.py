# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Samples whose augmentation depends on their place in the training alone, and that are looked at.

A sampler says which image is next; where in the training that is, it keeps to itself. Here it is
numbered, and the number travels with the index to whichever process loads the image. So the
augmentation is the same whatever came before, in this process or in one that has been killed.
"""

import itertools
import random
from typing import List, Tuple

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_dist_info
from torch.utils.data import DataLoader, IterableDataset


class SampleError(ValueError):
    """A sample that cannot be loaded, or whose annotation does not fit. The message names it."""


def seed_samples(loader: DataLoader, seed: int, epoch: int = 0, passed: int = 0) -> None:
    """Let the place of a sample in the training decide its augmentation.

    The number of workers or processes makes no difference: the place counts the samples of all
    processes. Call it before the loader is iterated.

    Args:
        loader (DataLoader): Changed in place: its sampler's indices carry their places, and its
            data set fetches batches by ``__getitems__``, as PyTorch asks for first.
        seed (int): Seed of the training.
        epoch (int): Epochs that are over. Default: 0.
        passed (int): Batches that were trained on before, and that the loader's
            ``InfiniteSampler``, which knows no epochs, is to leave out. Default: 0.

    Raises:
        TypeError: If the loader's samples are no numbered list, or fetched in a way of their own.
    """
    batches, dataset = loader.batch_sampler, loader.dataset
    if not hasattr(batches, 'sampler') or isinstance(dataset, IterableDataset):
        raise TypeError(
            f'{type(dataset).__name__} with {type(batches).__name__} has no numbered samples'
        )
    if hasattr(type(dataset), '__getitems__'):
        raise TypeError(f'{type(dataset).__name__} fetches its samples by its own __getitems__')
    passed_samples = 0
    if isinstance(batches.sampler, InfiniteSampler):
        passed_samples = passed * batches.batch_size
        indices = batches.sampler._indices_of_rank()
        batches.sampler.indices = itertools.islice(indices, passed_samples, None)
    batches.sampler = _NumberedSampler(batches.sampler, epoch, passed_samples)
    dataset.__getitems__ = _SeededFetch(dataset, seed)


def seed_generators(*numbers: int) -> int:
    """Seed the generators that augmentation uses, from a few numbers; return the seed."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


class _Draw(int):
    """Index of a sample in the data set, with its place in the training: (epoch, number in it)."""

    place: Tuple[int, int]


class _NumberedSampler:
    """A sampler that says with each index how many samples all processes have drawn before."""

    def __init__(self, sampler, epoch: int, start: int) -> None:
        self.sampler = sampler
        self.epoch = epoch
        self.start = start

    def __iter__(self):
        rank, world_size = get_dist_info()
        epoch, self.epoch = self.epoch, self.epoch + 1
        for i, index in enumerate(self.sampler, self.start):
            draw = _Draw(index)
            draw.place = (epoch, i * world_size + rank)
            yield draw

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str):  # such as set_epoch
        return getattr(self.sampler, name)


class _SeededFetch:
    """Load the samples of a batch, each with random numbers of its own, and look at them."""

    def __init__(self, dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __call__(self, draws: List[_Draw]) -> list:
        return [self._load(draw) for draw in draws]

    def _load(self, draw: _Draw):
        seed_generators(self.seed, *draw.place)
        try:
            sample = self.dataset[int(draw)]
        except Exception as error:
            message = f'cannot load {self._name(draw)}: {type(error).__name__}: {error}'
            raise SampleError(' '.join(message.split())) from error
        complaint = self._complaint(sample)
        if complaint:
            raise SampleError(f'{self._name(draw)}: {complaint}')
        return sample

    def _name(self, draw: _Draw) -> str:
        try:
            info = self.dataset.get_data_info(int(draw))
            files = [info.get(key) for key in ('img_path', 'seg_map_path')]
        except Exception:  # it was this that failed, or the data set has no such method
            files = []
        return ' with annotation '.join(filter(None, files)) or f'sample {int(draw)}'

    def _complaint(self, sample) -> str:
        """What is wrong with the labels of a sample: a loss says it badly, or on a GPU fatally."""
        target = sample.get('data_samples') if isinstance(sample, dict) else None
        annotation = getattr(target, 'gt_sem_seg', None)
        if annotation is not None:
            labels, image = annotation.data, sample['inputs']
            if labels.shape[-2:] != image.shape[-2:]:
                return (
                    f'the annotation has {_size(labels)} pixels and the image {_size(image)}, '
                    'after the pipeline'
                )
            labels = labels[labels != getattr(self.dataset, 'ignore_index', 255)]
        else:
            labels = getattr(target, 'gt_label', None)
        classes = (getattr(self.dataset, 'metainfo', None) or {}).get('classes')
        if classes is None or not torch.is_tensor(labels) or not labels.numel():
            return ''
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(classes):
            return (
                f'its labels run from {low} to {high}, but the data set has classes 0 to '
                f'{len(classes) - 1} (reduce_zero_label and ignore_index are taken into account)'
            )
        return ''


def _size(image) -> str:
    return 'x'.join(str(side) for side in image.shape[-2:])
