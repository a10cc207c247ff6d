# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Train a segmentor or a classifier from a config.

python tools/train.py configs/upernet_vil_t_ade20k.py
"""

import os
import shutil
import time
from pathlib import Path

from _common import (
    CheckFitHook,
    UserError,
    apply_common_args,
    build_runner,
    check_backbone,
    check_config_checkpoints,
    check_data,
    check_work_dir,
    fit_to_cpu,
    get_device,
    is_first_process,
    load_config,
    make_parser,
    parse_args,
    run,
)

from mmvil.engine import (
    AdaptInputChannelsHook,
    DamagedCheckpointError,
    find_good_checkpoint,
    verify,
)
from mmvil.engine.safe_checkpoint import ATOMIC, PARTIAL
from mmvil.engine.shards import is_sharded


def add_arguments(parser):
    parser.add_argument(
        '--checkpoint', help="with --backbone: weights of ViL to start from, ours or the authors'"
    )
    parser.add_argument(
        '--backbone-optim',
        action='store_true',
        help="with --backbone: replace the config's optimizer and schedule by ViL's recipe",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint, or without a name from the newest good one in the work dir',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='train with mixed precision, float16 unless optim_wrapper.dtype says bfloat16; on a '
        'CPU this is slow, and only shows whether the numbers overflow',
    )
    parser.add_argument(
        '--precision',
        choices=['float32', 'float16', 'bfloat16'],
        help="train in this precision instead of the config's",
    )
    parser.add_argument(
        '--no-validate', action='store_true', help='do not evaluate during training'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the batch size over all processes / the config's",
    )
    parser.add_argument(
        '--no-persistent-workers',
        action='store_true',
        help='start the worker processes of the dataloaders anew for each epoch',
    )
    return parser


def apply_args(cfg, args):
    apply_common_args(cfg, args)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.no_persistent_workers:
        for loader in (cfg.train_dataloader, cfg.get('val_dataloader')):
            if loader is not None:
                loader.persistent_workers = False

    if args.resume is not None:
        cfg.resume = True
        if args.resume != 'auto':
            cfg.load_from = args.resume
    if args.precision == 'float32':
        cfg.optim_wrapper.type = 'OptimWrapper'
        for option in ('dtype', 'loss_scale'):
            cfg.optim_wrapper.pop(option, None)
    elif args.amp or args.precision:
        on_cpu = get_device() == 'cpu'
        cfg.optim_wrapper.type = 'mmvil.engine.CPUAmpOptimWrapper' if on_cpu else 'AmpOptimWrapper'
        if args.precision:
            cfg.optim_wrapper.dtype = args.precision
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(
                '--auto-scale-lr needs to know for which batch size lr was written: add '
                '--cfg-options auto_scale_lr.base_batch_size=16, or as the case may be'
            )
        cfg.auto_scale_lr.enable = True


def save_safely(cfg):
    """Let checkpoints on local disks appear when they are complete, whatever config they are of.

    Returns:
        list[str]: What was changed, for the log.
    """
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    if hook and '://' not in str(hook.get('out_dir')) and 'file_client_args' not in hook:
        hook.setdefault('backend_args', ATOMIC)
    if hook and hook.get('max_keep_ckpts') == 1:
        hook.max_keep_ckpts = 2
        return ['keeping 2 checkpoints: of 1, mmengine removes it before it writes the next']
    return []


def choose_checkpoint(cfg, resume, trusted):
    """For --resume without a name: the newest checkpoint in the work dir that is complete.

    Returns:
        list[str]: What to say about it.
    """
    if not cfg.get('resume'):
        return []
    if resume != 'auto' and cfg.get('load_from') is not None:
        try:
            if os.path.isfile(cfg.load_from):
                verify(cfg.load_from, trusted)
        except DamagedCheckpointError as error:
            raise UserError(f'{error}; --resume without a name takes the newest good one') from None
        return []
    newest, complaints = find_good_checkpoint(cfg.work_dir, trusted)
    if newest is not None:
        cfg.load_from = newest
        return [*complaints, f'resuming from {newest}']
    if complaints:
        raise UserError(
            f'no checkpoint in {cfg.work_dir} is complete: {"; ".join(complaints)}. To begin anew, '
            'leave --resume out.'
        )
    cfg.resume = False
    return [f'nothing to resume in {cfg.work_dir}: training begins']


def refuse_shards_of_others(cfg):
    """Only FSDP can share out the optimizer's state again.

    Raises:
        UserError: If a plain training is to go on from a sharded one.
    """
    if is_sharded(cfg.load_from) and cfg.get('strategy') is None:
        raise UserError(
            f'{cfg.load_from} is of a sharded training: resume it with its own config. To start '
            f'from its weights: --cfg-options load_from={cfg.load_from}, without --resume.'
        )


def lock_work_dir(work_dir):
    """Keep other trainings out of a work dir.

    Returns:
        The lock, or None where there are no locks. The operating system releases it when the
        process ends, in whatever way.

    Raises:
        UserError: If a training is there already, or files cannot be made.
    """
    path = Path(work_dir, '.lock')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open('a+')
    except OSError as error:
        raise UserError(
            f'cannot write to the work dir {os.path.abspath(work_dir)}: {error.strerror}. Choose '
            'another by --work-dir.'
        ) from error
    try:
        import fcntl

        # Of this process alone: worker processes do not inherit it, and may outlive a killed one.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise UserError(
            f'another training is running in {work_dir}: {lock.read().strip()}. Wait for it, or '
            'choose another folder by --work-dir.'
        ) from None
    except (ImportError, OSError):  # not a POSIX system, or a file system without locks
        return None
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {os.uname().nodename}, since {time.ctime()}')
    lock.flush()
    for leftover in path.parent.glob('*' + PARTIAL):  # of a training that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return lock


def main():
    args = parse_args(add_arguments(make_parser(__doc__.splitlines()[0])))
    if args.backbone is None and (args.checkpoint or args.backbone_optim):
        raise UserError('--checkpoint and --backbone-optim need --backbone')
    swap = dict(checkpoint=args.checkpoint, optim=args.backbone_optim) if args.backbone else {}
    cfg = load_config(args.config, args.cfg_options, args.backbone, **swap)
    apply_args(cfg, args)
    check_backbone(cfg)
    check_work_dir(cfg)
    check_data(cfg, 'train_dataloader', 'val_dataloader')
    check_config_checkpoints(cfg)
    if args.check:
        print('Config, data and checkpoints are in place.')
        return

    lock = lock_work_dir(cfg.work_dir) if is_first_process() else None
    notes = save_safely(cfg)
    notes += choose_checkpoint(cfg, args.resume, args.trust_checkpoint)
    if cfg.get('resume'):
        refuse_shards_of_others(cfg)
    notes += fit_to_cpu(cfg)
    runner = build_runner(cfg, notes=notes)
    runner.register_hook(CheckFitHook() if cfg.get('resume') else AdaptInputChannelsHook())
    runner.train()
    if lock is not None:
        lock.close()


if __name__ == '__main__':
    run(main)
