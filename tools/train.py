# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Train a segmentor or a classifier from a config.

python tools/train.py configs/upernet_vil_t_ade20k.py
"""

from _common import (
    CheckFitHook,
    UserError,
    apply_common_args,
    build_runner,
    check_config_checkpoints,
    check_data,
    fit_to_cpu,
    get_device,
    load_config,
    make_parser,
    parse_args,
    run,
)


def add_arguments(parser):
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint, or without a name from the last one in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='train with mixed precision')
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
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.amp:
        if get_device() == 'cpu':
            raise UserError('--amp needs a GPU; leave it out to train in float32')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(
                '--auto-scale-lr needs to know for which batch size lr was written: add '
                '--cfg-options auto_scale_lr.base_batch_size=16, or as the case may be'
            )
        cfg.auto_scale_lr.enable = True


def main():
    args = parse_args(add_arguments(make_parser(__doc__.splitlines()[0])))
    cfg = load_config(args.config, args.cfg_options)
    apply_args(cfg, args)
    check_data(cfg, 'train_dataloader', 'val_dataloader')
    check_config_checkpoints(cfg)
    if args.check:
        print('Config, data and checkpoints are in place.')
        return

    runner = build_runner(cfg, notes=fit_to_cpu(cfg))
    if cfg.get('resume'):
        runner.register_hook(CheckFitHook())
    runner.train()


if __name__ == '__main__':
    run(main)
