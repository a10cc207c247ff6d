# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Train a segmentor or a classifier from a config.

python tools/train.py configs/upernet_vil_t_ade20k.py
"""

from mmengine.device import get_device

from mmvil.cli.config import apply_common_args, load_config
from mmvil.cli.errors import UserError, is_first_process
from mmvil.cli.main import make_parser, parse_args, run
from mmvil.cli.preflight import (
    CheckFitHook,
    build_runner,
    check_backbone,
    check_config_checkpoints,
    check_data,
    check_work_dir,
)
from mmvil.cli.work_dir import (
    choose_checkpoint,
    lock_work_dir,
    refuse_shards_of_others,
    save_safely,
)
from mmvil.engine import (
    AdaptInputChannelsHook,
)
from mmvil.engine.cpu import fit_to_cpu


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
