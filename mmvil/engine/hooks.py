# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Hooks that training with ViL wants."""

import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Give every training iteration random numbers of its own, so that resuming repeats them.

    mmengine does not store the state of the random number generators: after a resume, stochastic
    depth, dropout and mixup draw other numbers than the uninterrupted training would have drawn.
    With this hook they depend on the run's seed, the iteration and the rank alone, so the model's
    part of a resumed run is that of the uninterrupted one. The data pipeline keeps its generators:
    the order of the images repeats, but mmengine does not repeat random augmentation.
    """

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Put the data pipeline's generators aside and seed what the model draws."""
        self._of_data = random.getstate(), np.random.get_state(), torch.get_rng_state()
        _seed(runner.seed, get_rank(), runner.iter)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Take the data pipeline's generators up again."""
        of_random, of_numpy, of_torch = self._of_data
        random.setstate(of_random)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)


def _seed(*numbers: int) -> None:
    """Seed all generators, of the GPU too, from a few numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
