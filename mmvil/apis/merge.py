# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Merge the shards of a distributed checkpoint into one file."""

from pathlib import Path

from mmengine.runner import save_checkpoint

from ..checkpoints.atomic import ATOMIC
from ..checkpoints.sharded import is_sharded, join_shards


def merge_shards(src: Path, dst: Path) -> int:
    """Merge the weights of a folder of FSDP (mmvil) or DeepSpeed shards into one file, and return
    the number of tensors.

    Raises:
        ValueError: If the folder contains no shards, or DeepSpeed is needed but not installed.
    """
    if is_sharded(src):
        checkpoint = join_shards(src)
    elif any(src.glob('*_model_states.pt')):
        checkpoint = join_deepspeed_shards(src)
    else:
        raise ValueError(f'{src} is not a folder with shards of FSDP or DeepSpeed training')
    save_checkpoint(checkpoint, str(dst), backend_args=ATOMIC)
    return len(checkpoint['state_dict'])


def join_deepspeed_shards(folder: Path) -> dict:
    """Read the float32 weights from DeepSpeed's optimizer state, with DeepSpeed's own reader, which
    trusts its files. Raises ValueError if DeepSpeed is not installed.
    """
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ValueError(f"{folder} needs DeepSpeed: pip install 'deepspeed<0.17'") from error
    state_dict = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    for name in state_dict:
        if name.endswith('num_batches_tracked'):  # which DeepSpeed converts to floating point
            state_dict[name] = state_dict[name].long()
    return dict(state_dict=state_dict)
