# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Merge the shards of an FSDP or DeepSpeed checkpoint into one file.

python tools/model_converters/merge_shards.py work_dirs/vil_b/iter_160000.pth vil_b.pth
"""

import argparse
from pathlib import Path

from mmengine.runner import save_checkpoint

from mmvil.checkpoints.atomic import ATOMIC
from mmvil.checkpoints.sharded import is_sharded, join_shards
from mmvil.cli.errors import UserError
from mmvil.cli.main import parse_args, run


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('src', type=Path, help='folder of a checkpoint, such as iter_160000.pth')
    add('dst', type=Path, help='file to write')
    add('--force', action='store_true', help='replace DST if it exists')
    add('--traceback', action='store_true', help='show the whole trace of an error')
    return parser


def join_deepspeed_shards(folder: Path) -> dict:
    """Read the float32 weights from the optimizer state of DeepSpeed, by DeepSpeed's own reader,
    which trusts its files.

    Raises:
        UserError: If DeepSpeed is not installed.
    """
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise UserError(f"{folder} needs DeepSpeed: pip install 'deepspeed<0.17'") from error
    state_dict = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    for name in state_dict:
        if name.endswith('num_batches_tracked'):  # which DeepSpeed makes floating point
            state_dict[name] = state_dict[name].long()
    return dict(state_dict=state_dict)


def main():
    args = parse_args(make_parser())
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
