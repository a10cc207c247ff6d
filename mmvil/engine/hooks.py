# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Training hooks: input channels, reproducible resuming, logging over processes, pictures."""

import itertools
import os

import torch
from mmengine.dist import all_reduce_dict, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from torch import Tensor, nn

from ..checkpoints.keys import part_of, weights_of
from ..checkpoints.pretrained import check_pretrained, has_blocks
from .layer_decay import plain_name
from .sampling import check_annotations, name_failures, seed_generators, seed_samples


@HOOKS.register_module()
class AdaptInputChannelsHook(Hook):
    """Adapt weights in ``load_from`` to the model: convert an official checkpoint, and RGB weights
    to the input channels, see :func:`mmvil.checkpoints.adapt_input_channels`. When resuming or
    testing, other channels are an error.

    Weights that do not fit the backbone are rejected, because mmengine would only warn and train
    from random ones. Sharded models and those of DeepSpeed are not checked.

    Raises:
        ValueError: If the checkpoint has no weights of the model's backbone, or they do not fit.
    """

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if runner._resume or not isinstance(runner._train_loop, BaseLoop):
            return
        weights, backbones = weights_of(checkpoint), {}
        for name, module in runner.model.named_modules():
            if hasattr(module, 'adapt_pretrained'):
                prefix = plain_name(f'{name}.') if name else ''
                weights = module.adapt_pretrained(weights, prefix)
                backbones[prefix] = module
        state = checkpoint.get('state_dict', checkpoint)
        state.clear()
        state.update(weights)
        if not runner.cfg.get('strategy'):
            _check_backbones(backbones, weights, runner._load_from)


def _check_backbones(
    backbones: dict[str, nn.Module], weights: dict[str, Tensor], source: str
) -> None:
    """Raise a ValueError if the weights of a backbone, given by its prefix, do not fit, or no
    backbone has weights, neither here nor by its ``init_cfg``.
    """
    parts = {prefix: part_of(weights, prefix) for prefix in backbones}
    given = [prefix for prefix, part in parts.items() if has_blocks(part)]
    for prefix in given:
        check_pretrained(backbones[prefix], parts[prefix], source, prefix)
    if not given and backbones and all(each.init_cfg is None for each in backbones.values()):
        prefix, backbone = next(iter(backbones.items()))
        check_pretrained(backbone, parts[prefix] or weights, source)


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seed every iteration and every sample, so that a resumed run reproduces an uninterrupted one.

    mmengine does not save the state of random number generators. With this hook, the random numbers
    of the model depend only on the run's seed, the iteration and the rank; those of a sample on the
    seed and its position in the training; and the order of images on the seed in the checkpoint.
    Losses are then bitwise reproducible on the CPU, and on a GPU as far as its kernels are
    deterministic (``randomness.deterministic``).

    Samples used before the resume are not loaded again. A sample that cannot be loaded, or whose
    labels do not fit, stops training, validation or testing with an error that names its files.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner) -> None:
        """Store the seed that the data loaders were built with."""
        self._loader_seed = runner.seed

    def before_train(self, runner) -> None:
        """Seed the samples, from the iteration at which a resumed training continues."""
        loop = runner.train_loop
        loader = loop.dataloader
        sampler = getattr(loader.batch_sampler, 'sampler', loader.sampler)
        if getattr(sampler, 'seed', None) == self._loader_seed:
            sampler.seed = runner.seed  # of the checkpoint
        try:
            seed_samples(loader, runner.seed, epoch=runner.epoch, passed=runner.iter)
        except TypeError as error:
            runner.logger.warning(f'Augmentation is not reproducible after a resume: {error}.')
            return
        # Running workers do not know the seeds. mmengine up to 0.10.7 starts them early, and loads
        # all samples from before the resume again.
        loader._iterator = None  # persistent workers
        if hasattr(loop, 'dataloader_iterator'):  # loops over epochs create it later
            iterator = type(loop.dataloader_iterator)(loader)
            if loader.batch_sampler.sampler.start and not hasattr(iterator, 'skip_iter'):
                iterator = itertools.chain(itertools.repeat(None, runner.iter), iterator)
            loop.dataloader_iterator = iterator

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Seed the random numbers of the model."""
        torch.manual_seed(seed_generators(runner.seed, get_rank(), runner.iter))  # also on GPUs

    def _before_epoch(self, runner, mode: str = 'train') -> None:
        """Name the files of samples of a validation or test that cannot be loaded."""
        if mode != 'train':
            name_failures(getattr(runner, f'{mode}_dataloader').dataset)

    def _before_iter(self, runner, batch_idx: int, data_batch=None, mode: str = 'val') -> None:
        """Check the annotations of a validation or test."""
        check_annotations(getattr(runner, f'{mode}_dataloader').dataset, data_batch)


@HOOKS.register_module()
class AverageLogHook(Hook):
    """Log losses and accuracies as means over all processes.

    mmengine logs those of process 0, which sees only a part of the batch.
    """

    priority = 'HIGHEST'  # before the values are logged

    def after_train_iter(
        self, runner, batch_idx: int, data_batch=None, outputs: dict[str, Tensor] | None = None
    ) -> None:
        if outputs and get_world_size() > 1:
            outputs.update({name: value.detach().float().mean() for name, value in outputs.items()})
            all_reduce_dict(outputs, op='mean')


class NamePicturesHook(Hook):
    """Add folders to the names of pictures, which mmpretrain names after the files alone: those of
    several classes may have the same names.
    """

    priority = 'HIGH'  # before the hook that draws

    def _before_epoch(self, runner, mode: str = 'train') -> None:
        if mode == 'train':
            return
        dataset = getattr(runner, f'{mode}_dataloader').dataset
        infos = (dataset.get_data_info(index) for index in range(len(dataset)))
        folders = {os.path.dirname(info['img_path']) for info in infos if 'img_path' in info}
        self.root = os.path.commonpath(folders) if folders else None

    def _after_iter(
        self, runner, batch_idx: int, data_batch=None, outputs=None, mode: str = 'train'
    ) -> None:
        for sample in () if mode == 'train' or self.root is None else outputs:
            # Their evaluation, which comes before, keeps the path.
            name = os.path.relpath(sample.img_path, self.root).replace(os.sep, '_')
            sample.set_metainfo(dict(img_path=name))
