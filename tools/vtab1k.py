# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Run the VTAB-1K benchmark: the published protocol on 19 data sets.

python tools/vtab1k.py data/vtab-1k vil2_tiny16_e800_in1k.th

For each data set, 5 learning rates x 5 seeds train on train800; the learning rate with the best
mean accuracy on val200 then trains on train800val200 with 5 seeds, and the accuracy on test is
reported. Start the same command on as many GPUs and machines as you like, if they share the work
folder. Killed or stopped, start it again. Each run is done once.
"""

import argparse
import csv
import gc
import hashlib
import io
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook

from mmvil.checkpoints import infer_architecture, is_official, vil_to_mmvil
from mmvil.cli.config import CONFIGS, apply_common_args, load_config
from mmvil.cli.errors import UserError
from mmvil.cli.main import parse_args, run
from mmvil.cli.preflight import build_runner, check_checkpoint
from mmvil.cli.run_queue import ClaimLost, Claims, write
from mmvil.engine.cpu import fit_to_cpu


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('data_root', help='folder with one folder per data set')
    parser.add_argument('checkpoint', help="pre-trained classifier: mmvil's or the authors'")
    parser.add_argument(
        '--work-dir', help='folder that all processes share (default: work_dirs/vtab1k/CHECKPOINT)'
    )
    parser.add_argument(
        '--datasets', nargs='+', choices=DATASETS, default=DATASETS, metavar='NAME',
        help=f'only these of {", ".join(DATASETS)}',
    )  # fmt: skip
    parser.add_argument(
        '--lrs', nargs='+', type=float, default=[1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4], metavar='LR',
        help='learning rates to choose from (default: the published five)',
    )  # fmt: skip
    parser.add_argument('--seeds', type=int, default=5, help='number of seeds (default: 5)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE',
        help='override settings of the configs in configs/vtab1k, as tools/train.py does',
    )  # fmt: skip
    parser.add_argument('--check', action='store_true', help='only check that all is in place')
    parser.add_argument('--status', action='store_true', help='only show how far it is')
    parser.add_argument('--retry', action='store_true', help='try runs again that failed too often')
    parser.add_argument(
        '--max-attempts',
        type=int,
        default=3,
        help='a run that failed so often is left (default: 3)',
    )
    parser.add_argument(
        '--stale-after', type=float, default=300, metavar='SECONDS',
        help='without a sign of life for so long, a process counts as killed, and others do its '
        'run (default: 300)',
    )  # fmt: skip
    parser.add_argument(
        '--trust-checkpoint', action='store_true',
        help='load the checkpoint even if it asks for functions that may run code',
    )  # fmt: skip
    parser.add_argument('--traceback', action='store_true', help='show the whole trace of an error')
    return parser


# -- The protocol ----------------------------------------------------------------------------------


# -- One run ---------------------------------------------------------------------------------------


class Watch(Hook):
    """Shows the epochs, keeps the final accuracy, and ends a run that another process does."""

    def __init__(self, job, claim, show):
        self.job = job
        self.claim = claim
        self.show = show
        self.accuracy = None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.claim.lost:
            raise ClaimLost(self.job.name)

    def after_train_epoch(self, runner):
        self.show(f'{self.job}: epoch {runner.epoch + 1} of {runner.max_epochs}')

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.claim.lost:
            raise ClaimLost(self.job.name)

    def after_val_epoch(self, runner, metrics=None):
        self.accuracy = metrics['accuracy/top1']


def make_config(job, args, architecture) -> Config:
    """The config of a run: that of the data set, with what depends on run and checkpoint."""
    cfg = load_config(str(CONFIGS / 'vtab1k' / f'{job.dataset}.py'), {})
    cfg.model.backbone.update(
        arch={key: architecture[key] for key in ('embed_dims', 'depth')},
        version=architecture['version'],
        patch_size=architecture['patch_size'],
        out_type=architecture['out_type'],
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
    cfg.experiment_name = f'{job.name}_{os.getpid()}_{time.time_ns()}'  # mmengine wants it unique
    options = dict(work_dir=os.path.join(args.work_dir, 'logs', job.name), launcher='none')
    options.update(data_root=os.path.join(args.data_root, job.dataset), no_pin_memory=False)
    apply_common_args(cfg, argparse.Namespace(config=job.name, **options))
    return cfg


def train_once(job, claim, args, architecture, show) -> float:
    """Train, evaluate after the last epoch, return the accuracy in percent."""
    watch = Watch(job, claim, show)
    with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        cfg = make_config(job, args, architecture)
        runner = build_runner(cfg, notes=fit_to_cpu(cfg))
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
    return watch.accuracy


# -- Checks ----------------------------------------------------------------------------------------


def read_architecture(path) -> dict:
    """Sizes of the model in a checkpoint."""
    from mmengine.runner.checkpoint import _load_checkpoint

    check_checkpoint(path)
    state = _load_checkpoint(path, map_location='cpu')
    state = state.get('state_dict', state)
    try:
        return infer_architecture(vil_to_mmvil(state) if is_official(state) else state)
    except ValueError as error:
        raise UserError(f'{path} is no Vision-LSTM classifier: {error}') from error


def check_dataset(data_root, dataset):
    """Make sure that lists and images are there and labels are in range. Returns warnings."""
    folder = Path(data_root, dataset)
    classes = load_config(str(CONFIGS / 'vtab1k' / f'{dataset}.py'), {})
    classes = classes.model.head.num_classes
    notes = []
    for split, size in dict(train800=800, val200=200, train800val200=1000, test=None).items():
        path = folder / f'{split}.txt'
        if not path.is_file():
            raise UserError(f'data not found: {path.absolute()}. See docs/transfer.md.')
        lines = path.read_text().split('\n')
        try:
            rows = [line.rsplit(' ', 1) for line in filter(str.strip, lines)]
            labels = {int(label) for _, label in rows}
        except ValueError:
            raise UserError(f'{path}: lines must read "images/… label"') from None
        if not rows or min(labels) < 0 or max(labels) >= classes:
            raise UserError(f'{path}: expected labels from 0 to {classes - 1}')
        for image in {rows[0][0], rows[-1][0]}:
            if not (folder / image).is_file():
                raise UserError(f'{path} names {image}, which is not in {folder}')
        if size not in (None, len(rows)):
            notes.append(f'{path} has {len(rows)} images instead of {size}')
    return notes


def agree_on_settings(folder, settings):
    """All processes that share a folder have to do the same."""
    path = Path(folder, 'settings.json')
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(settings, indent=1) + '\n')
    noted = json.loads(path.read_text())
    for key, value in json.loads(json.dumps(settings)).items():
        if noted.get(key) != value:
            raise UserError(
                f'{folder} was begun with {key} {noted.get(key)}, not {value}. Give the same '
                'options, or another --work-dir.'
            )


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -- Results ---------------------------------------------------------------------------------------


def report(protocol, args) -> bool:
    """Write and show the tables, and name what failed. Returns whether nothing has."""
    rows, details = summarize(protocol, Path(args.checkpoint).stem)
    table = as_markdown(rows, details)
    write(Path(args.work_dir, 'results.md'), table)
    write(Path(args.work_dir, 'results.csv'), as_csv(rows))
    print(f'\n{table}\nalso in {args.work_dir}/results.md and results.csv')
    failed = [job for job, state in protocol.runs().items() if state == 'failed']
    if failed:
        print(f'\nFailed runs: {len(failed)}. --retry tries them again.')
        for job in failed:
            print(f'  {job}: {_short(protocol.claims.last_error(job.name))}')
    return not failed


def show_status(protocol):
    """One line per data set."""
    states = protocol.runs()
    total = len(protocol.seeds) * (len(protocol.lrs) + 1)
    for dataset in protocol.datasets:
        count = Counter(state for job, state in states.items() if job.dataset == dataset)
        rest = ', '.join(f'{count[key]} {key}' for key in ('running', 'failed') if count[key])
        print(f'{dataset:22} {count["done"]:3} of {total} runs' + (f', {rest}' if rest else ''))
    print(progress(protocol))


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:199] + '…'


class Screen:
    """Lines that stay, and on a terminal one that changes."""

    def __init__(self):
        self.stream = sys.stdout
        self.is_terminal = self.stream.isatty()

    def say(self, text):
        start = '\r\033[K' if self.is_terminal else ''
        print(f'{start}{time.strftime("%H:%M:%S")} {text}', file=self.stream, flush=True)

    def show(self, text):
        if self.is_terminal:
            print(f'\r\033[K{text}', end='', file=self.stream, flush=True)


def main():
    args = parse_args(make_parser())
    stem = Path(args.checkpoint.replace('://', '/')).stem
    args.work_dir = args.work_dir or os.path.join('work_dirs', 'vtab1k', stem)
    claims = Claims(Path(args.work_dir, 'runs'), args.stale_after, args.max_attempts)
    protocol = Protocol(claims, args.datasets, args.lrs, args.seeds)
    if args.status:
        show_status(protocol)
        report(protocol, args)
        return

    architecture = read_architecture(args.checkpoint)
    for dataset in args.datasets:
        for note in check_dataset(args.data_root, dataset):
            print(f'note: {note}')
    if args.check:
        print(f'Data and checkpoint are in place: {protocol.size} runs.')
        return
    settings = dict(lrs=protocol.lrs, seeds=args.seeds, cfg_options=args.cfg_options)
    if '://' in args.checkpoint:
        settings.update(checkpoint=args.checkpoint)
    else:
        settings.update(checkpoint_sha256=sha256(args.checkpoint))
    agree_on_settings(args.work_dir, settings)
    if args.retry:
        for job, state in protocol.runs().items():
            if state == 'failed':
                claims.forget_attempts(job.name)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # give the run back
    screen = Screen()
    screen.say(f'{progress(protocol)}; {args.work_dir}')

    def train(job, claim):
        return train_once(job, claim, args, architecture, screen.show)

    try:
        work(protocol, train, screen.say)
    except KeyboardInterrupt:
        screen.say('stopped; the same command goes on from here')
        sys.exit(130)
    if not report(protocol, args):
        sys.exit(1)


if __name__ == '__main__':
    run(main)
