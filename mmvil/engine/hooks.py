# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Hooks that training with ViL wants."""

import itertools
import re
from typing import Dict, Optional

import torch
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from torch import Tensor

from .sampling import seed_generators, seed_samples

# What DDP, FSDP and activation checkpointing put between the names of modules.
_WRAPPERS = re.compile(r'^module\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.')


@HOOKS.register_module()
class AdaptInputChannelsHook(Hook):
    """Let a training start by ``load_from`` from weights of RGB images, whatever channels its own
    images have, see :func:`mmvil.converters.adapt_input_channels`.

    It does nothing when a training is resumed or a model is tested: the checkpoint is of that model
    then, and other channels are a mistake.
    """

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Adapt the loaded weights in place."""
        if runner._resume or not isinstance(runner._train_loop, BaseLoop):
            return
        state = checkpoint.get('state_dict', checkpoint)
        for name, module in runner.model.named_modules():
            if hasattr(module, 'adapt_pretrained'):
                prefix = _WRAPPERS.sub('', f'{name}.')
                for wrapper in ('', 'module.'):  # as mmengine takes them
                    state.update(module.adapt_pretrained(state, wrapper + prefix))


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Give every iteration and every sample random numbers of their own, so that a resumed training
    repeats the uninterrupted one.

    mmengine does not store the state of the random number generators: after a resume, stochastic
    depth, dropout, mixup and the augmentation of the images draw other numbers than the
    uninterrupted training would have drawn, and where the config names no seed, even the order of
    the images is another one. With this hook the model's numbers depend on the run's seed, the
    iteration and the rank alone, those of a sample on the seed and its place in the training, and
    the order on the seed that the checkpoint holds. So on the CPU losses repeat to the last bit;
    on a GPU as far as its kernels are deterministic (``randomness.deterministic``).

    Nothing that was trained on before is loaded again to get there. A sample that cannot be loaded,
    or whose labels do not fit, stops the training with a message that names its files.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner) -> None:
        """Remember the seed that the data loaders were built with."""
        self._seed_of_loaders = runner.seed

    def before_train(self, runner) -> None:
        """Seed the samples, from where a resumed training goes on."""
        loop = runner.train_loop
        loader = loop.dataloader
        sampler = getattr(loader.batch_sampler, 'sampler', loader.sampler)
        if getattr(sampler, 'seed', None) == self._seed_of_loaders:
            sampler.seed = runner.seed  # of the checkpoint
        try:
            seed_samples(loader, runner.seed, epoch=runner.epoch, passed=runner.iter)
        except TypeError as error:
            runner.logger.warning(f'The augmentation will not repeat after a resume: {error}.')
            return
        _begin_anew(loop, passed=runner.iter)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Seed what the model draws."""
        torch.manual_seed(seed_generators(runner.seed, get_rank(), runner.iter))  # the GPU's, too


def _begin_anew(loop, passed: int) -> None:
    """Let a loop iterate its data loader from now on: workers that run already know no seeds.

    mmengine until 0.10.7 starts them early, and loads all that was trained on before once more.
    """
    loop.dataloader._iterator = None  # persistent workers
    if not hasattr(loop, 'dataloader_iterator'):  # loops over epochs begin later
        return
    iterator = type(loop.dataloader_iterator)(loop.dataloader)
    sampler = loop.dataloader.batch_sampler.sampler
    if sampler.start and not hasattr(iterator, 'skip_iter'):
        iterator = itertools.chain(itertools.repeat(None, passed), iterator)
    loop.dataloader_iterator = iterator


@HOOKS.register_module()
class AverageLogHook(Hook):
    """Log losses and accuracies as means over all processes.

    mmengine logs those of the first process, a part of the batch. With this hook the training log
    of any number of processes shows what one process with the whole batch would show.
    """

    priority = 'HIGHEST'  # before the log takes the numbers

    def after_train_iter(
        self, runner, batch_idx: int, data_batch=None, outputs: Optional[Dict[str, Tensor]] = None
    ) -> None:
        """Replace what the model returned for the log."""
        if not outputs or get_world_size() == 1:
            return
        means = torch.stack([value.detach().float().mean() for value in outputs.values()])
        all_reduce(means, op='mean')
        outputs.update(zip(outputs, means))
