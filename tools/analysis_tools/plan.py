# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Plan a training run: memory, largest batch, and options that keep the recipe's batch size.

python tools/analysis_tools/plan.py configs/upernet_vil_b_ade20k.py --gpu-memory 24 --gpus 4
python tools/analysis_tools/plan.py configs/vil_b_imagenet.py --measure    # on a GPU

A training step runs on the meta device while its allocations are counted, which takes seconds, no
GPU and no memory. With --measure, steps also run on this machine's GPU.
"""

import json

import torch
from mmengine.fileio import put_text
from torch._subclasses import fake_tensor

from mmvil.apis import training_memory
from mmvil.apis.training_memory import GIB, TrainingMemory
from mmvil.cli.config import default_hook, load_config
from mmvil.cli.errors import UserError
from mmvil.cli.main import add_config_arguments, at_least, make_parser, parse_args, run


def make_plan_parser():
    parser = make_parser(__doc__, whole=True)
    add = parser.add_argument
    add_config_arguments(parser, backbone=True)
    memory = dict(type=at_least(0, float), metavar='GIB')
    add('--gpu-memory', help="of one GPU (default: this machine's)", **memory)
    add('--gpus', type=at_least(1), default=1, help='number of GPUs (%(default)s)')
    headroom = "fraction of memory for CUDA, cuDNN's workspaces and fragmentation (%(default)s)"
    add('--headroom', type=at_least(0, float, 1), default=0.1, help=headroom)
    batch = "images per update, in total (default: the recipe's)"
    add('--batch-size', type=at_least(1), help=batch)
    pixels = dict(type=at_least(1), nargs='+', metavar='PIXELS')
    add('--shape', help='size of training images', **pixels)
    add('--measure', action='store_true', help="compare with training steps on this machine's GPU")
    speed = 'throughput of one GPU, from --measure or a training log, to estimate the duration'
    add('--images-per-second', type=at_least(1e-3, float), metavar='X', help=speed)
    add('--json', metavar='FILE', help='also write the numbers to a file')
    return parser


def check(args):
    """Complete the arguments, and raise if they are invalid."""
    if args.gpu_memory is None and torch.cuda.is_available():
        args.gpu_memory = torch.cuda.get_device_properties(0).total_memory / GIB
    if args.gpu_memory is None:
        raise UserError('there is no GPU here; add the memory of one in GiB, --gpu-memory 24')
    if args.measure and not torch.cuda.is_available():
        raise UserError('--measure needs a GPU')
    if args.shape and len(args.shape) > 2:
        raise UserError(f'--shape takes height and width, not {len(args.shape)} numbers')


def recipe_batch(cfg):
    """Batch size that the learning rate of a config is set for."""
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise UserError(
            'the config does not state the batch size of its learning rate; add --batch-size '
            'or, for example, --cfg-options auto_scale_lr.base_batch_size=16'
        )
    return cfg.auto_scale_lr.base_batch_size


def share(total, gpus, largest):
    """Split a batch into images per GPU and step, and accumulated steps; None if impossible."""
    for steps in range(1, total // gpus + 1):
        if total % (gpus * steps) == 0 and total // (gpus * steps) <= largest:
            return total // (gpus * steps), steps
    return None


def options_for(cfg, batch, steps):
    """List the --cfg-options for ``batch`` images per GPU and ``steps`` accumulated steps.

    mmengine counts every forward pass as an iteration, so everything in iterations is multiplied by
    ``steps``.
    """
    options = {'train_dataloader.batch_size': batch}
    if steps == 1:
        return options
    options['optim_wrapper.accumulative_counts'] = steps
    if not cfg.train_cfg.get('max_iters'):
        return options
    nodes = {'default_hooks.checkpoint': default_hook(cfg, 'checkpoint')}
    schedulers = cfg.get('param_scheduler') or []
    if isinstance(schedulers, dict):
        nodes['param_scheduler'] = schedulers
    else:
        nodes |= {f'param_scheduler.{i}': each for i, each in enumerate(schedulers)}
    by_iter = {name: node for name, node in nodes.items() if not node.get('by_epoch', True)}
    for name, node in {'train_cfg': cfg.train_cfg, **by_iter}.items():
        for key in ('max_iters', 'val_interval', 'begin', 'end', 'interval'):
            if node.get(key, 0) > 0:
                options[f'{name}.{key}'] = steps * node[key]
    return options


def print_memory(args, cfg, memory, largest):
    height, width = memory.size
    precision = str(training_memory.amp_dtype(cfg) or torch.float32).removeprefix('torch.')
    print(f'{args.config}: {height} x {width} pixels, {precision}')
    for name, size in {**memory.fixed_bytes, 'each image of a step': memory.per_image()}.items():
        print(f'  {name:32}{size / GIB:8.2f} GiB')
    print(
        f'Of {args.gpu_memory:g} GiB, {100 * args.headroom:.0f}% are reserved for CUDA. '
        f'At most {largest} images fit on one GPU.'
    )


def print_duration(args, cfg, total, speed):
    text = f'{args.gpus} such GPUs: at best {args.gpus * speed:.1f} images/s'
    if cfg.train_cfg.get('max_iters'):
        hours = total * cfg.train_cfg.max_iters / (args.gpus * speed) / 3600
        text += f', {hours:.1f} hours for the training'
    print(text + '.')


def main():
    args = parse_args(make_plan_parser())
    cfg = load_config(args.config, args.cfg_options, args.backbone)
    check(args)
    total = args.batch_size or recipe_batch(cfg)
    size = (args.shape[0], args.shape[-1]) if args.shape else None
    memory = TrainingMemory(cfg, args.gpus, size)
    limit = args.gpu_memory * GIB * (1 - args.headroom)
    try:
        largest = memory.largest_batch(limit)
        if total > args.gpus * largest:  # accumulated
            memory.accumulates = True
            largest = memory.largest_batch(limit)
    except (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
    ) as error:
        raise UserError(
            f'the memory of this model depends on data ({error.func}), not on shapes alone; try '
            'batches on the GPU instead'
        ) from error
    print_memory(args, cfg, memory, largest)
    shared = share(total, args.gpus, largest)
    if shared is None:
        raise UserError(
            f'a batch of {total} does not divide into equal parts for {args.gpus} GPUs of at most '
            f'{largest} images; try other --gpus or --batch-size, model.backbone.with_cp=True, or '
            'configs/_base_/strategies/fsdp.py'
        )
    batch, steps = shared
    report = dict(
        largest_batch=largest,
        batch=total,
        gpus=args.gpus,
        always=memory.fixed_bytes,
        per_image=memory.per_image(),
        batch_per_gpu=batch,
        accumulated=steps,
        options=options_for(cfg, batch, steps),
        bytes=memory.total(max(batch, 2)),
    )
    print(
        f'Batch {total} = {args.gpus} GPU(s) x {batch} images x {steps} accumulated step(s), '
        f'{report["bytes"] / GIB:.2f} GiB per GPU:\n'
    )
    options = [f'{key}={value}' for key, value in report['options'].items()]
    print('  --cfg-options ' + ' \\\n    '.join(options))
    if steps > 1 and cfg.default_scope == 'mmseg':
        print('\nBatch norm and the mean over labelled pixels apply to a single step.')

    speed = args.images_per_second
    if args.measure:
        peak, speed = training_memory.measure_training(cfg, batch, memory.size)
        predicted = TrainingMemory(cfg, size=memory.size).total(batch)
        report.update(measured_bytes=peak, images_per_second=speed)
        print(
            f'\nMeasured with {batch} images on one {torch.cuda.get_device_name()}: '
            f'{peak / GIB:.2f} GiB (predicted {predicted / GIB:.2f}), {speed:.1f} images/s.'
        )
    if speed:
        print_duration(args, cfg, total, speed)
    if args.json:
        put_text(json.dumps(report, indent=2) + '\n', args.json)


if __name__ == '__main__':
    run(main)
