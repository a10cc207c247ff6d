# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Entry point and arguments that all command lines share."""

import argparse
import gc
import os
import sys

import torch
from mmengine.config import DictAction
from mmengine.dist import is_distributed

from ..checkpoints import register_safe_loaders
from ..engine import SampleError
from .errors import UserError, explain, is_first_process


def run(main) -> None:
    """Call ``main``; report what the user can put right in one line and exit with status 2.

    That is a ``UserError``, or a ``ValueError`` that mmvil itself raises about a value it was
    given; a sample that cannot be used, a loss that is not finite, a disk that is full.
    ``--traceback``, or MMVIL_TRACEBACK=1 in the environment, shows the whole trace.

    Checkpoints are loaded without running code that they contain, unless ``--trust-checkpoint``.
    """
    if '--trust-checkpoint' not in sys.argv:
        register_safe_loaders()
    try:
        main()
    except (UserError, ValueError, FloatingPointError, OSError) as error:
        message = explain(error)
        wants_trace = '--traceback' in sys.argv or os.environ.get('MMVIL_TRACEBACK', '0') != '0'
        if wants_trace or message is None:
            raise
        # Every process knows the same, but each its own samples.
        if is_first_process() or isinstance(error, SampleError):
            print(f'error: {message}', file=sys.stderr)
        sys.exit(2)
    leave_process_group()


def leave_process_group() -> None:
    """End the threads by which CPU processes communicate, while Python still runs.

    Gloo's may still hold a tensor that another process has received already. To free it they need
    Python, and one that finds Python gone aborts the process, after all its work was done.
    """
    if is_distributed():
        gc.collect()  # the model's wrapper holds the group, too
        torch.distributed.destroy_process_group()


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that training and testing have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        'config',
        help='config file, such as configs/upernet_vil_t_ade20k.py; or one that an installed '
        'library brings along, such as mmseg::pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py',
    )
    parser.add_argument(
        '--backbone',
        metavar='VIL',
        help="put ViL in the place of the config's backbone: vil-t, vil-s or vil-b",
    )
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints (default: ./work_dirs/CONFIG_NAME)'
    )
    parser.add_argument('--data-root', help="folder of the data, instead of the config's")
    parser.add_argument(
        '--no-pin-memory', action='store_true', help='turn pin_memory of the dataloaders off'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override settings of the config: model.backbone.arch=base key="[a,b]" key=a,b '
        'key="[(a,b),(c,d)]"; quotes are needed, white space is not allowed',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes were started',
    )
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help='set by launchers'
    )
    parser.add_argument(
        '--check',
        action='store_true',
        help='only check that config, data and checkpoints are in place',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load checkpoints even if they ask for functions that may run code',
    )
    parser.add_argument('--traceback', action='store_true', help='show the whole trace of an error')
    return parser


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and pass the local rank on where mmengine looks for it."""
    try:
        args = parser.parse_args()
    except ValueError:  # from DictAction
        parser.error('--cfg-options wants KEY=VALUE pairs without white space')
    if hasattr(args, 'local_rank'):
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args
