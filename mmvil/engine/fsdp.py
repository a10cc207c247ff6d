# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""mmengine's FSDP strategy, with resuming and sharded checkpoints.

Configs refer to it as ``mmvil.engine.fsdp.FSDPStrategy``; mmvil does not import it, because
importing FSDP is slow.
"""

import time
from collections.abc import Callable, Sequence

from mmengine._strategy import FSDPStrategy as _FSDPStrategy
from mmengine.dist import barrier, is_main_process
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..checkpoints.atomic import PARTIAL, replace
from ..checkpoints.sharded import is_sharded, load_rest, load_shards, require_shards, save_shards


class FSDPStrategy(_FSDPStrategy):
    """Strategy for fully sharded data parallel training that can be resumed.

    Args:
        state_dict_cfg (str | dict): Format of checkpoints. 'full': process 0 gathers the weights
            and writes one file, as in ordinary training. 'sharded': every process writes its share
            to a folder, from which any number of processes can resume and the tools can load the
            model (PyTorch 2.7 or later). Either setting loads both. Default: 'full'.
        **kwargs: See :class:`mmengine._strategy.FSDPStrategy`.

    Raises:
        ValueError: If the installed PyTorch has no sharded checkpoints.
    """

    def __init__(self, *, state_dict_cfg: str | dict = 'full', **kwargs) -> None:
        self.sharded = state_dict_cfg == 'sharded'
        if self.sharded:
            require_shards()
            state_dict_cfg = 'full'  # for other callers that read the model's state
        super().__init__(state_dict_cfg=state_dict_cfg, **kwargs)

    def save_checkpoint(self, filename: str, **kwargs) -> None:
        """Save a checkpoint atomically, as a file or, if sharded, as a folder."""
        if self.sharded:
            self._save_shards(filename, **kwargs)
        elif '://' in filename:
            super().save_checkpoint(filename, **kwargs)
        else:
            super().save_checkpoint(filename + PARTIAL, **kwargs)
            barrier()
            if is_main_process():
                replace(filename + PARTIAL, filename)

    def _save_shards(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict | None = None,
        callback: Callable | None = None,
    ) -> None:
        states = _sharded_states()
        checkpoint = dict(extra_ckpt or {})
        checkpoint['state_dict'] = states.get_model_state_dict(self.model)
        now = time.strftime('%Y%m%d_%H%M%S')
        checkpoint['meta'] = dict(checkpoint.get('meta', {}), seed=self.seed, time=now)
        if save_param_scheduler and hasattr(self, 'param_schedulers'):
            checkpoint['param_schedulers'] = self.scheduler_state_dict()
        tensors = {}
        if save_optimizer and hasattr(self, 'optim_wrapper'):
            optimizer = states.get_optimizer_state_dict(self.model, self.optim_wrapper.optimizer)
            tensors['optimizer'] = optimizer.pop('state')
            checkpoint['optimizer'] = {**self.optim_wrapper.state_dict(), **optimizer}
            del checkpoint['optimizer']['state']
        if callback is not None:
            callback(checkpoint)
        tensors['state_dict'] = checkpoint.pop('state_dict')
        save_shards(filename, tensors, checkpoint)

    def load_checkpoint(self, filename: str, *, callback: Callable | None = None, **kwargs) -> dict:
        """Load the model's weights, and return the rest of the checkpoint."""
        if not is_sharded(filename):
            return super().load_checkpoint(filename, callback=callback, **kwargs)
        self.logger.info(f'Load shards from {filename}')
        states = _sharded_states()
        checkpoint = load_rest(filename)
        checkpoint['state_dict'] = states.get_model_state_dict(self.model)
        load_shards(filename, dict(state_dict=checkpoint['state_dict']))
        if callback is not None:
            callback(checkpoint)
        states.set_model_state_dict(self.model, checkpoint.pop('state_dict'))
        if 'optimizer' in checkpoint:
            checkpoint['optimizer']['folder'] = filename
        return checkpoint

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Distribute the optimizer state of a checkpoint."""
        optimizer = self.optim_wrapper.optimizer
        folder = state_dict.pop('folder', None)
        if folder is None:
            # mmengine passes the arguments in the order of torch 2.0, which changed in torch 2.1.
            shares = FullyShardedDataParallel.optim_state_dict_to_load(
                model=self.model, optim=optimizer, optim_state_dict=state_dict
            )
            self.optim_wrapper.load_state_dict(shares)
            return
        states = _sharded_states()
        shares = states.get_optimizer_state_dict(self.model, optimizer)
        load_shards(folder, dict(optimizer=shares['state']))
        shares['param_groups'] = state_dict.pop('param_groups')
        states.set_optimizer_state_dict(self.model, optimizer, shares)
        # The wrapper's own state, such as the loss scale; the optimizer is loaded already.
        self.optim_wrapper.load_state_dict({**state_dict, **optimizer.state_dict()})


def _sharded_states():
    """torch's module for the sharded states of models and optimizers."""
    require_shards()
    from torch.distributed.checkpoint import state_dict

    return state_dict


def wrap_classes(
    module: nn.Module, recurse: bool, nonwrapped_numel: int, names: Sequence[str]
) -> bool:
    """FSDP policy that wraps every module whose class has one of the names. Use 'ViLBlock' for ViL:
    a block with wrapped submodules calls them one by one, which is slower.
    """
    return recurse or type(module).__name__ in names
