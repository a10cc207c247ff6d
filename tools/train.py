# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Train a segmentor, classifier or detector from a config.

python tools/train.py configs/upernet_vil_t_ade20k.py
"""

from importlib import import_module

from mmengine.device import get_device

from mmvil.cli.config import loaders, read_runner_config, require, use_float32
from mmvil.cli.errors import UserError, as_user_error
from mmvil.cli.main import add_runner_arguments, make_parser, parse_args, run
from mmvil.cli.preflight import CheckFitHook, build_runner, check_training, train
from mmvil.cli.work_dir import choose_checkpoint, lock_work_dir, save_atomically

# For each package, the module that mmengine imports and its backend.
LOGGERS = dict(
    tensorboard=('torch.utils.tensorboard', 'TensorboardVisBackend'),
    wandb=('wandb', 'WandbVisBackend'),
)


def main():
    args = parse_args(make_train_parser())
    cfg = read_config(args)
    check_training(cfg)
    if args.check:
        print('Config, data and checkpoints are in place.')
        return

    with lock_work_dir(cfg.work_dir):
        notes = save_atomically(cfg)
        if cfg.get('resume'):
            notes += choose_checkpoint(cfg, args.resume == 'auto', args.trust_checkpoint)
        runner = build_runner(cfg, notes)
        # A resumed checkpoint has to fit; others are adapted to the model.
        adapt = dict(type='mmvil.engine.AdaptInputChannelsHook')
        runner.register_hook(CheckFitHook() if cfg.get('resume') else adapt)
        train(runner)


def make_train_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_runner_arguments(parser)
    add('--checkpoint', help="with --backbone: weights to start from, ours or the authors'")
    recipe = "with --backbone: replace the config's optimizer and schedule by ViL's recipe"
    add('--backbone-optim', action='store_true', help=recipe)
    resume = 'continue from a checkpoint (default: the newest complete one in the work dir)'
    add('--resume', nargs='?', const='auto', metavar='CHECKPOINT', help=resume)
    amp = 'train in mixed precision, float16 unless optim_wrapper.dtype says bfloat16'
    add('--amp', action='store_true', help=f'{amp}; slow on a CPU')
    types = ['float32', 'float16', 'bfloat16']
    add('--precision', choices=types, help="train in this precision instead of the config's")
    for package in LOGGERS:
        add(f'--{package}', action='store_true', help=f'also log to {package}')
    add('--no-validate', action='store_true', help='do not evaluate during training')
    scale = "scale the learning rate by the batch size over all processes / the config's"
    add('--auto-scale-lr', action='store_true', help=scale)
    restart = 'restart the worker processes of the dataloaders for each epoch'
    add('--no-persistent-workers', action='store_true', help=restart)
    return parser


def read_config(args):
    """Read the config and apply the command line."""
    if args.backbone is None and (args.checkpoint or args.backbone_optim):
        raise UserError('--checkpoint and --backbone-optim need --backbone')
    cfg = read_runner_config(args, checkpoint=args.checkpoint, optim=args.backbone_optim)
    require(cfg, 'train_dataloader', 'train_cfg', 'optim_wrapper')
    for package in filter(vars(args).get, LOGGERS):
        log_to(cfg, package)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.no_persistent_workers:
        for loader in loaders(cfg):
            loader.persistent_workers = False
    if args.resume is not None:
        cfg.resume = True
        if args.resume != 'auto':
            cfg.load_from = args.resume
    if args.precision == 'float32':
        use_float32(cfg.optim_wrapper)
    elif args.amp or args.precision:
        on_cpu = get_device() == 'cpu'
        cfg.optim_wrapper.type = 'mmvil.engine.CPUAmpOptimWrapper' if on_cpu else 'AmpOptimWrapper'
        if args.precision:
            cfg.optim_wrapper.dtype = args.precision
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise UserError(
                '--auto-scale-lr needs the batch size of the learning rate: add, for example, '
                '--cfg-options auto_scale_lr.base_batch_size=16'
            )
        cfg.auto_scale_lr.enable = True
    return cfg


def log_to(cfg, package):
    """Make the visualizer of a config also log to a package."""
    module, backend = LOGGERS[package]
    with as_user_error(f'--{package} needs pip install {package}', ImportError):
        import_module(module)
    if cfg.get('visualizer') is None:
        cfg.visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
    known = cfg.visualizer.get('vis_backends') or []
    if not any(each.type.endswith(backend) for each in known):
        cfg.visualizer.vis_backends = [*known, dict(type=backend)]


if __name__ == '__main__':
    run(main)
