# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""FSDP as mmengine has it, with what keeps it from resuming put right.

Configs name it by ``mmvil.engine.fsdp.FSDPStrategy``; it is not imported with mmvil, because FSDP
takes its time.
"""

from mmengine._strategy import FSDPStrategy as _FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel


class FSDPStrategy(_FSDPStrategy):
    """Fully sharded data parallel training that can be resumed.

    mmengine gives the optimizer's state to torch in the order of arguments of torch 2.0, which
    torch 2.1 changed.
    """

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Share out the optimizer's state from a checkpoint."""
        optimizer = self.optim_wrapper.optimizer
        shares = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(shares)
