# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Seed each sample by its position in the training, and check its labels.

A sampler only yields the index of the next image. Here the index carries the position in the
training to the process that loads the image, so that augmentation does not depend on the samples
loaded before, in this or an interrupted run.
"""

import functools
import itertools
import random
from collections.abc import Sequence

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_dist_info
from torch.utils.data import DataLoader, IterableDataset


class SampleError(ValueError):
    """A sample, named in the message, that cannot be loaded or whose annotation does not fit."""


class UnknownLabelsError(ValueError):
    """Annotation with labels that belong to no class.

    Args:
        what (str): What is wrong, in the words of the message.
        labels (Sequence): The labels, sorted. The message ends with the first five, which are also
            the attribute ``labels``, as text.
    """

    def __init__(self, what: str, labels: Sequence) -> None:
        more = ', …' if len(labels) > 5 else ''
        self.what = what
        self.labels = f'[{", ".join(map(str, labels[:5]))}{more}]'
        super().__init__(f'{what}: {self.labels}')


def seed_samples(loader: DataLoader, seed: int, epoch: int = 0, passed: int = 0) -> None:
    """Seed the augmentation of each sample by its position in the training.

    The number of workers or processes makes no difference: positions count the samples of all
    processes. Call this before iterating over the loader.

    Args:
        loader (DataLoader): Modified in place: its sampler's indices carry positions, and its
            dataset fetches batches with ``__getitems__``, which PyTorch prefers.
        seed (int): Seed of the training.
        epoch (int): Number of finished epochs. Default: 0.
        passed (int): Number of batches used before, which an ``InfiniteSampler`` skips. Default: 0.

    Raises:
        TypeError: If the samples have no indices, or the dataset has its own ``__getitems__``.
    """
    batches, dataset = loader.batch_sampler, loader.dataset
    if not hasattr(batches, 'sampler') or isinstance(dataset, IterableDataset):
        raise TypeError(
            f'{type(dataset).__name__} with {type(batches).__name__} has no sample indices'
        )
    if hasattr(type(dataset), '__getitems__'):
        raise TypeError(f'{type(dataset).__name__} has its own __getitems__')
    passed_samples = 0
    if isinstance(batches.sampler, InfiniteSampler):
        passed_samples = passed * batches.batch_size
        indices = batches.sampler._indices_of_rank()
        batches.sampler.indices = itertools.islice(indices, passed_samples, None)
    batches.sampler = _NumberedSampler(batches.sampler, epoch, passed_samples)
    dataset.__getitems__ = functools.partial(_load_samples, dataset, seed)


def seed_generators(*numbers: int) -> int:
    """Seed the random number generators of augmentation from a few numbers, and return the seed."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


class _NumberedSampler:
    """Sampler of pairs of an index and its position: the epoch, and the number of samples that all
    processes drew before in this epoch.
    """

    def __init__(self, sampler, epoch: int, start: int) -> None:
        self.sampler = sampler
        self.epoch = epoch
        self.start = start

    def __iter__(self):
        rank, world_size = get_dist_info()
        epoch, self.epoch = self.epoch, self.epoch + 1
        for i, index in enumerate(self.sampler, self.start):
            yield index, (epoch, i * world_size + rank)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str):  # such as set_epoch
        return getattr(self.sampler, name)


def _load_samples(dataset, seed: int, indices: list[tuple[int, tuple]]) -> list:
    """Load the samples of a batch, each with its own seed, and check their labels."""
    samples = []
    for index, position in indices:
        seed_generators(seed, *position)
        samples.append(_load_sample(dataset, index))
        sample = samples[-1] if isinstance(samples[-1], dict) else {}
        size = getattr(sample.get('inputs'), 'shape', ())[-2:]
        if problem := _label_problem(dataset, sample.get('data_samples'), size):
            raise SampleError(f'{_sample_name(dataset, index)}: {problem}')
    return samples


def _load_sample(dataset, index: int):
    try:
        return dataset[index]
    except Exception as error:
        message = f'cannot load {_sample_name(dataset, index)}: {type(error).__name__}: {error}'
        raise SampleError(' '.join(message.split())) from error


def name_failures(dataset) -> None:
    """Make a dataset of an evaluation raise a SampleError for a sample that cannot be loaded. A
    dataset with its own ``__getitems__`` is left alone.
    """
    if not isinstance(dataset, IterableDataset) and not hasattr(type(dataset), '__getitems__'):
        dataset.__getitems__ = functools.partial(_load_batch, dataset)


def _load_batch(dataset, indices: list[int]) -> list:
    return [_load_sample(dataset, index) for index in indices]


def check_annotations(dataset, batch: dict) -> None:
    """Raise a SampleError if annotations of a batch of an evaluation do not fit images or classes:
    metrics would fail, or ignore unknown labels.
    """
    for target in batch.get('data_samples') or ():
        is_complete = hasattr(target, 'gt_sem_seg') and hasattr(target, 'ori_shape')
        if is_complete and (problem := _label_problem(dataset, target, target.ori_shape)):
            raise SampleError(f'{target.get("seg_map_path")}: {problem}')


def _sample_name(dataset, index: int) -> str:
    try:
        info = dataset.get_data_info(index)
        files = [info.get(key) for key in ('img_path', 'seg_map_path')]
    except Exception:  # this call failed, or the dataset has no such method
        files = []
    return ' with annotation '.join(filter(None, files)) or f'sample {index}'


def _label_problem(dataset, target, size: Sequence[int]) -> str | None:
    """Describe labels that do not fit: they crash the loss, which on a GPU gives no reason."""
    labels = getattr(target, 'gt_label', None)
    annotation = getattr(target, 'gt_sem_seg', None)
    if annotation is not None:
        labels = annotation.data
        ours, images = ('x'.join(map(str, each)) for each in (labels.shape[-2:], size))
        if len(labels) != 1:  # mmseg keeps (H, W, C)
            return (
                'the annotation has colors, not one label per pixel; declare the colors of the '
                'classes (docs/own_data.md)'
            )
        if ours != images:
            return f'the annotation has {ours} pixels but the image has {images}'
        labels = labels[labels != getattr(dataset, 'ignore_index', 255)]
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if classes is not None and torch.is_tensor(labels) and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if not 0 <= low <= high < len(classes):
            return (
                f'its labels run from {low} to {high}, but the dataset has classes 0 to '
                f'{len(classes) - 1} (reduce_zero_label and ignore_index are taken into account)'
            )
    return None
