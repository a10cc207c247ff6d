# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Make one checkpoint file of the shards that FSDP or DeepSpeed training has written.

python tools/model_converters/merge_shards.py work_dirs/vil_b/iter_160000.pth vil_b.pth
"""

import argparse
from pathlib import Path

from mmengine.runner import save_checkpoint

from mmvil.checkpoints.atomic import ATOMIC
from mmvil.checkpoints.sharded import is_sharded, join_shards
from mmvil.cli.errors import UserError
from mmvil.cli.main import run


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', type=Path, help='folder of a checkpoint, such as iter_160000.pth')
    parser.add_argument('dst', type=Path, help='file to write')
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    parser.add_argument('--traceback', action='store_true', help='show the whole trace of an error')
    return parser.parse_args()


def join_deepspeed_shards(folder: Path) -> dict:
    """The float32 weights that DeepSpeed keeps in the state of its optimizer.

    DeepSpeed reads its own files, and trusts them.

    Raises:
        UserError: If DeepSpeed is not installed.
    """
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise UserError(f"{folder} is of DeepSpeed: pip install 'deepspeed<0.17'") from error
    state_dict = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    counts = {  # which DeepSpeed makes floating point
        name: tensor.long()
        for name, tensor in state_dict.items()
        if name.endswith('num_batches_tracked')
    }
    return dict(state_dict={**state_dict, **counts})


def main():
    args = parse_args()
    if args.dst.exists() and not args.force:
        raise UserError(f'{args.dst} exists; --force replaces it')
    if is_sharded(args.src):
        checkpoint = join_shards(args.src)
    elif any(args.src.glob('*_model_states.pt')):
        checkpoint = join_deepspeed_shards(args.src)
    else:
        raise UserError(f'{args.src} is not a folder with shards of FSDP or DeepSpeed training')
    save_checkpoint(checkpoint, str(args.dst), backend_args=ATOMIC)
    print(f'Wrote {args.dst} with {len(checkpoint["state_dict"])} tensors.')


if __name__ == '__main__':
    run(main)
