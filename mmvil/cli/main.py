# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Entry point and shared arguments of the tools."""

import argparse
import ast
import gc
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.config import DictAction
from mmengine.dist import is_distributed

from ..checkpoints import register_safe_loaders
from ..engine import SampleError
from .errors import UserError, is_first_process, user_message


def run(main: Callable[[], None], argv: Sequence[str] | None = None) -> None:
    """Call ``main``. Errors that the user can fix are reported in one line, with exit status 2, see
    :func:`mmvil.cli.errors.user_message`.

    ``--traceback``, or MMVIL_TRACEBACK=1 in the environment, shows the full traceback. Checkpoints
    are loaded without running code in them, unless ``--trust-checkpoint`` is given.

    Args:
        main (Callable): Parses the command line and does the work.
        argv (Sequence[str], optional): The command line. Default: that of this process.
    """
    argv = sys.argv[1:] if argv is None else argv
    if '--trust-checkpoint' not in argv:
        register_safe_loaders()
    try:
        main()
    except (UserError, ValueError, FloatingPointError, OSError) as error:
        message = user_message(error)
        if message is None or '--traceback' in argv or os.getenv('MMVIL_TRACEBACK', '0') != '0':
            raise
        # All ranks report the same errors, except for those of their own samples.
        if is_first_process() or isinstance(error, SampleError):
            print(f'error: {message}', file=sys.stderr)
        sys.exit(2)
    if is_distributed():
        # A gloo thread may hold a tensor beyond the last collective. Freeing it needs the
        # interpreter; without one, the thread would abort a process that has finished its work.
        gc.collect()  # the model's wrapper holds the group, too
        torch.distributed.destroy_process_group()


# -- Arguments -------------------------------------------------------------------------------------


def make_parser(doc: str, whole: bool = False) -> argparse.ArgumentParser:
    """Create a parser with the arguments common to all tools. The description is the first line of
    the tool's docstring, or all of it, with its examples.
    """
    parser = argparse.ArgumentParser(
        description=doc if whole else doc.partition('\n')[0],
        formatter_class=argparse.RawDescriptionHelpFormatter if whole else argparse.HelpFormatter,
    )
    parser.add_argument('--traceback', action='store_true', help='show full tracebacks')
    return parser


def add_config_arguments(
    parser: argparse.ArgumentParser,
    help: str = 'config file, such as configs/upernet_vil_t_ade20k.py',
    backbone: bool = False,
) -> None:
    """Add ``config``, ``--cfg-options`` and, if wanted, ``--backbone``."""
    parser.add_argument('config', help=help)
    add_cfg_options(parser)
    if backbone:
        vil = "replace the config's backbone: vil-t, vil-s or vil-b"
        parser.add_argument('--backbone', metavar='VIL', help=vil)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``, which overrides settings of a config."""
    help = (
        'override settings of the config: model.backbone.arch=base key="[a,b]" key=a,b '
        'key="[(a,b),(c,d)]" key="{\'a\':1}"; quotes are needed'
    )
    pairs = dict(nargs='+', action=_OptionsAction, default={}, metavar='KEY=VALUE')
    parser.add_argument('--cfg-options', help=help, **pairs)


class _OptionsAction(DictAction):
    """mmengine's action, which also accepts dicts in Python's notation and keeps spaces in text."""

    @staticmethod
    def _parse_iterable(val: str):
        if re.match(r'[\[(]*{', val):
            return ast.literal_eval(val)
        value = DictAction._parse_iterable(val)
        return val.strip('\'"') if isinstance(value, str) else value


def add_trust_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-checkpoint``, which :func:`run` looks for."""
    help = 'load checkpoints even if they may run code'
    parser.add_argument('--trust-checkpoint', action='store_true', help=help)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments shared by training, testing and feature evaluation, config first."""
    add_config_arguments(
        parser,
        'config file, such as configs/upernet_vil_t_ade20k.py, or one of an installed library, '
        'such as mmseg::pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py',
        backbone=True,
    )
    add = parser.add_argument
    add('--data-root', help="data folder, instead of the config's")
    check = 'only check that config, data and checkpoints are in place'
    add('--check', action='store_true', help=check)
    add_trust_checkpoint(parser)


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of :func:`add_run_arguments` and those of mmengine's runner."""
    add_run_arguments(parser)
    add = parser.add_argument
    add('--work-dir', help='folder for logs and checkpoints (default: ./work_dirs/CONFIG_NAME)')
    add('--no-pin-memory', action='store_true', help='disable pin_memory of the dataloaders')
    launchers = ['none', 'pytorch', 'slurm', 'mpi']
    add('--launcher', choices=launchers, default='none', help='how the processes were started')
    add('--local_rank', '--local-rank', type=int, default=0, help='set by launchers')


def at_least(low: float, kind: type = int, high: float = math.inf) -> Callable[[str], float]:
    """Type of an argument: a number from ``low`` to ``high``."""
    limits = f'at least {low:g}' if high == math.inf else f'{low:g} to {high:g}'

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:  # nor NaN
            raise argparse.ArgumentTypeError(f'must be {limits}, but is {text}')
        return value

    parse.__name__ = kind.__name__  # in argparse's message on other text
    return parse


def device(text: str) -> torch.device:
    """Type of an argument: a device of this machine."""
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, RuntimeError) as error:  # no CUDA in this PyTorch; others
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f'cannot use {text}: {reason}') from None


def figure_path(text: str) -> Path:
    """Type of an argument: the file of a figure, with a suffix that matplotlib can write."""
    from matplotlib.backend_bases import FigureCanvasBase  # most tools draw no figure

    known = FigureCanvasBase.get_supported_filetypes()
    if Path(text).suffix[1:].lower() not in known:
        suffixes = ', '.join(f'.{each}' for each in known)
        raise argparse.ArgumentTypeError(f'must end with one of {suffixes}, but is {text}')
    return Path(text)


def parse_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse a command line, and export the local rank as mmengine expects it."""
    try:
        args = parser.parse_args(argv)
    except (AssertionError, RecursionError, SyntaxError, ValueError):  # from _OptionsAction
        parser.error(
            '--cfg-options expects KEY=VALUE pairs without white space around =, with balanced '
            'brackets, and dicts as "{\'key\':value}"'
        )
    if getattr(args, 'launcher', 'none') == 'pytorch' and 'RANK' not in os.environ:
        parser.error('--launcher pytorch requires torchrun; use tools/dist_train.sh')
    if hasattr(args, 'local_rank'):
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args
