# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Run the VTAB-1K benchmark with the published protocol on 19 datasets.

python tools/vtab1k.py data/vtab-1k vil2_tiny16_e800_in1k.th

For each dataset, 5 learning rates x 5 seeds train on train800; the learning rate with the best
mean accuracy on val200 then trains on train800val200 with 5 seeds, and the accuracy on test is
reported. The same command can run on any number of GPUs and machines that share the work folder. If
it is interrupted, start it again: each run is done only once.
"""

import gc
import json
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from mmvil.apis import vtab1k
from mmvil.cli.config import CONFIGS, load_config, set_data_root
from mmvil.cli.errors import UserError
from mmvil.cli.main import (
    add_cfg_options,
    add_trust_checkpoint,
    at_least,
    make_parser,
    parse_args,
    run,
)
from mmvil.cli.preflight import build_runner, check_backbone, check_checkpoint
from mmvil.cli.run_queue import ClaimLost, Claims, work, write


def main():
    args = parse_args(make_vtab_parser())
    stem = Path(args.checkpoint.replace('://', '/')).stem
    args.work_dir = args.work_dir or os.path.join('work_dirs', 'vtab1k', stem)
    if args.status and not os.path.isdir(args.work_dir):
        raise UserError(f'no runs in {args.work_dir}; name their folder with --work-dir')
    claims = Claims(Path(args.work_dir, 'runs'), args.stale_after, args.max_attempts)
    datasets, lrs = ([*dict.fromkeys(each)] for each in (args.datasets, args.lrs))
    protocol = vtab1k.Protocol(claims, datasets, lrs, args.seeds)
    if args.status:
        print('\n'.join([*protocol.progress_by_dataset(), protocol.progress()]))
        report(protocol, args)
        return

    check_checkpoint(args.checkpoint)
    architecture = vtab1k.read_architecture(args.checkpoint)
    if 'model.backbone.stride' not in args.cfg_options:
        print(f'stride {architecture["stride"]} ({architecture["stride_from"]})')
    for dataset in datasets:
        cfg = config_of(dataset, args.cfg_options)
        check_backbone(cfg)
        classes = cfg.model.head.num_classes
        for note in vtab1k.check_data(Path(args.data_root, dataset), classes):
            print(f'note: {note}')
    if args.check:
        print(f'Data and checkpoint are in place: {protocol.size} runs.')
        return
    settings = dict(lrs=protocol.lrs, seeds=args.seeds, cfg_options=args.cfg_options)
    agree_on_settings(args.work_dir, settings | vtab1k.identify(args.checkpoint))
    for job in failed_runs(protocol) if args.retry else ():
        claims.forget_attempts(job.name)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # release the run
    screen = Screen()
    screen.log(f'{protocol.progress()}; {args.work_dir}')

    def describe(job, result):
        time_taken = timedelta(seconds=round(result['seconds']))
        return f'{job}: {result["accuracy"]:.2f} % in {time_taken}; {protocol.progress()}'

    execute = partial(train, args=args, architecture=architecture, show=screen.show)
    try:
        work(claims, protocol.runs, execute, describe, screen.log)
    except KeyboardInterrupt:
        screen.log('stopped; run the same command to continue')
        sys.exit(130)
    if not report(protocol, args):
        sys.exit(1)


def make_vtab_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('data_root', help='folder with one folder per dataset')
    add('checkpoint', help="pre-trained classifier: mmvil's or the authors'")
    add('--work-dir', help='folder of all processes (default: work_dirs/vtab1k/CHECKPOINT)')
    names = dict(nargs='+', choices=vtab1k.DATASETS, default=vtab1k.DATASETS, metavar='NAME')
    add('--datasets', help=f'only these of {", ".join(vtab1k.DATASETS)}', **names)
    published = [1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4]
    lrs = dict(nargs='+', type=at_least(0, float), default=published, metavar='LR')
    add('--lrs', help='learning rates to choose from (default: the published five)', **lrs)
    add('--seeds', type=at_least(1), default=5, help='number of seeds (default: 5)')
    add_cfg_options(parser)
    add('--check', action='store_true', help='only check data and checkpoint')
    add('--status', action='store_true', help='only show the progress')
    add('--retry', action='store_true', help='try failed runs again')
    add('--max-attempts', type=at_least(1), default=3, help='attempts at a run (default: 3)')
    stale = dict(type=at_least(1, float), default=300, metavar='SECONDS')
    add('--stale-after', help='take over runs silent for this long (default: 300)', **stale)
    add_trust_checkpoint(parser)
    return parser


# -- One run ---------------------------------------------------------------------------------------


def config_of(dataset, options) -> Config:
    return load_config(str(CONFIGS / 'vtab1k' / f'{dataset}.py'), options)


class Watch(Hook):
    """Show progress, store the final accuracy, and stop if another process took over the run."""

    def __init__(self, job, claim, show):
        self.job, self.claim, self.show = job, claim, show
        self.accuracy = None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.claim.lost:
            raise ClaimLost(self.job.name)

    after_val_iter = after_train_iter

    def after_train_epoch(self, runner):
        self.show(f'{self.job}: epoch {runner.epoch + 1} of {runner.max_epochs}')

    def after_val_epoch(self, runner, metrics=None):
        self.accuracy = metrics['accuracy/top1']


def make_config(job, args, architecture) -> Config:
    """Build the config of a run: that of its dataset, adapted to run and checkpoint."""
    cfg = config_of(job.dataset, {})
    cfg.model.backbone.update(
        arch={key: architecture[key] for key in ('embed_dims', 'depth')},
        **{key: architecture[key] for key in ('version', 'patch_size', 'stride', 'out_type')},
        init_cfg=dict(type='Pretrained', checkpoint=args.checkpoint),
    )
    concat = architecture['out_type'] == 'bilateral_concat'
    cfg.model.head.in_channels = architecture['embed_dims'] * (2 if concat else 1)
    cfg.merge_from_dict(args.cfg_options)

    if job.phase == 'final':
        cfg.train_dataloader.dataset.ann_file = 'train800val200.txt'
        cfg.val_dataloader.dataset.ann_file = 'test.txt'
    cfg.optim_wrapper.optimizer.lr = job.lr
    cfg.randomness = dict(seed=job.seed)
    cfg.train_cfg.val_interval = cfg.train_cfg.max_epochs
    cfg.default_hooks.checkpoint = None
    # mmengine accepts each name only once.
    cfg.experiment_name = f'{job.name}_{os.getpid()}_{time.time_ns()}'
    cfg.launcher = 'none'
    cfg.work_dir = os.path.join(args.work_dir, 'logs', job.name)
    set_data_root(cfg, os.path.join(args.data_root, job.dataset))
    return cfg


def train(job, claim, args, architecture, show) -> dict:
    """Train, and evaluate after the last epoch."""
    start = time.monotonic()
    watch = Watch(job, claim, show)
    with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        runner = build_runner(make_config(job, args, architecture))
        try:
            runner.register_hook(watch)
            runner.train()
        finally:
            for handler in list(runner.logger.handlers):
                runner.logger.removeHandler(handler)
                handler.close()
            del runner
            gc.collect()
            torch.cuda.empty_cache()
    return dict(accuracy=watch.accuracy, seconds=round(time.monotonic() - start, 1))


# -- Before and after the runs ---------------------------------------------------------------------


def agree_on_settings(folder, settings):
    """Raise unless all processes that share a folder have the same settings."""
    path, text = Path(folder, 'settings.json'), json.dumps(settings, indent=1)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, text + '\n')
    noted = json.loads(path.read_text())
    for key, value in json.loads(text).items():
        if noted.get(key) != value:
            raise UserError(
                f'{folder} was started with {key} {noted.get(key)}, not {value}. Use the same '
                'options, or another --work-dir.'
            )


def failed_runs(protocol):
    return [job for job, state in protocol.runs().items() if state == 'failed']


def report(protocol, args) -> bool:
    """Write and print the tables, and list failed runs. Returns whether there are none."""
    rows, details = vtab1k.summarize(protocol, Path(args.checkpoint).stem)
    table = vtab1k.as_markdown(rows, details)
    write(Path(args.work_dir, 'results.md'), table)
    write(Path(args.work_dir, 'results.csv'), vtab1k.as_csv(rows))
    print(f'\n{table}\nalso in {args.work_dir}/results.md and results.csv')
    failed = failed_runs(protocol)
    if failed:
        print(f'\nFailed runs: {len(failed)}. --retry tries them again.')
        for job in failed:
            print(f'  {job}: {protocol.claims.last_error(job.name):.200}')
    return not failed


class Screen:
    """Print log lines and, on a terminal, a status line below that is overwritten."""

    def __init__(self):
        self.print = partial(print, file=sys.stdout, flush=True)  # in runs, stdout is discarded
        self.start = '\r\033[K' if sys.stdout.isatty() else ''

    def log(self, text):
        self.print(f'{self.start}{time.strftime("%H:%M:%S")} {text}')

    def show(self, text):
        if self.start:
            self.print(f'{self.start}{text}', end='')


if __name__ == '__main__':
    run(main)
