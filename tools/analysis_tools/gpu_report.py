# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Run everything that needs a GPU in one command: tests, benchmarks, and a report in Markdown.

python tools/analysis_tools/gpu_report.py --out gpu_report

Tests of the operators and the backbone; benchmark.py in bfloat16 for ViL-T, -S and -B against the
plain PyTorch form and timm's DeiT; UperNet ViL-B, whole training steps. The report says which
targets are met. It is written again after each part, so an interruption costs little.
"""

import json
import platform
import statistics
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import mmvil
from mmvil.apis.training_memory import measure_training
from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError
from mmvil.cli.main import make_parser, parse_args, run

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ('torch', 'triton', 'timm', 'mmengine', 'onedl-mmengine', 'mmsegmentation', 'numpy')
THROUGHPUT = {224: 0.8, 512: 1.0, 1024: 2.0}
"""Target of the training throughput relative to DeiT, by image size."""
OVER_PARALLEL = {224: 3.0, 512: 6.0}
"""The same relative to the parallel form in PyTorch."""

FULL = dict(
    tests=('tests/test_ops', 'tests/test_layers', 'tests/test_backbones'),
    archs=('tiny', 'small', 'base'),
    sizes=(224, 512, 1024),
    batches=(128, 24, 6),
    rounds=7,
    upernet_width=None,  # as in the config
    upernet_batches=(2, 16),
    upernet_size=512,
    warmup=5,
    steps=20,
)
QUICK = dict(
    tests=('tests/test_ops/test_projections.py',),
    archs=('tiny',),
    sizes=(32,),
    batches=(1,),
    rounds=1,
    upernet_width=16,
    upernet_batches=(2,),
    upernet_size=64,
    warmup=0,
    steps=1,
)


def make_report_parser():
    parser = make_parser(__doc__, whole=True)
    add = parser.add_argument
    add('--out', type=Path, default=Path('gpu_report'), metavar='FOLDER', help='(%(default)s)')
    add('--device', choices=['cuda', 'cpu'], default='cuda', help='(%(default)s)')
    add('--quick', action='store_true', help='tiny sizes, to try the command itself')
    return parser


# -- Parts of the report, in Markdown --------------------------------------------------------------


def environment(device):
    """List hardware and versions."""
    if device == 'cuda':
        gpu = torch.cuda.get_device_properties(device)
        hardware = (
            f'**GPU: {gpu.name}**, compute capability {gpu.major}.{gpu.minor}, '
            f'{gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}'
        )
    else:
        hardware = f'**No GPU**: {platform.machine()}. These numbers say nothing.'
    git = ['git', 'describe', '--always', '--dirty']
    result = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    commit = 'no git checkout' if result.returncode else f'commit {result.stdout.strip()}'
    lines = [hardware, f'mmvil: {mmvil.__version__}, {commit}', f'Python: {sys.version.split()[0]}']
    for name in PACKAGES:
        try:
            lines.append(f'{name}: {version(name)}')
        except PackageNotFoundError:
            continue
    return '\n'.join(f'- {line}' for line in lines)


def run_tests(targets, folder):
    """Run pytest with its output in tests.log, and summarize it."""
    if not (ROOT / 'tests').is_dir():
        return 'Not run: this is no checkout with tests.'
    log = folder / 'tests.log'
    command = [sys.executable, '-m', 'pytest', '-q', '-m', 'not slow', *targets]
    with log.open('w') as file:
        status = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file).returncode
    lines = log.read_text().strip().splitlines() or ['(no output)']
    failed = [f'    {line}' for line in lines if line.startswith(('FAILED', 'ERROR'))]
    verdict = 'Passed' if status == 0 else f'**Failed** (status {status})'
    return '\n'.join([f'{verdict}: `{lines[-1].strip("= ")}`. Log: {log.name}.', '', *failed])


def run_benchmark(arch, folder, plan, device):
    """Run benchmark.py for one architecture, and return its records."""
    file = folder / f'benchmark_{arch}.json'
    command = [sys.executable, str(Path(__file__).with_name('benchmark.py')), '--arch', arch]
    command += ['--backends', 'auto', 'parallel', '--amp', 'bfloat16', '--device', device]
    command += ['--sizes', *map(str, plan['sizes']), '--batch', *map(str, plan['batches'])]
    command += ['--rounds', str(plan['rounds']), '--json', str(file)]
    subprocess.run(command, check=True)
    return json.loads(file.read_text())['results']


def benchmark_table(records):
    rows = [
        '| image | batch | mode | model | images/s | relative to DeiT | peak MB | kept MB/image |',
        '| --: | --: | -- | -- | --: | --: | --: | --: |',
    ]
    for record in records:
        rate = 1 / statistics.median(record['seconds_per_image'])
        rows.append(
            f'| {record["size"]}² | {record["batch"]} | {record["mode"]} | {record["model"]} '
            f'| {rate:.1f} | {1 / record["time_ratio"]:.2f} | {megabytes(record["peak_bytes"])} '
            f'| {megabytes(record["saved_bytes_per_image"])} |'
        )
    return '\n'.join(rows)


def megabytes(count):
    return f'{count / 1e6:.0f}' if count else '-'


def targets(records, arch):
    """List the targets of one architecture, and whether its records meet them."""
    training = {(r['size'], r['model']): r for r in records if r['mode'] == 'training'}
    lines = []

    def line(size, name, value, sign, bound):
        if value is None:
            verdict, value = 'not measured', '-'
        else:
            met = value <= bound if sign == '≤' else value >= bound
            verdict, value = 'met' if met else '**missed**', f'{value:.2f} ({sign} {bound})'
        lines.append(f'| ViL-{arch} | {size}² | {name} | {value} | {verdict} |')

    for size in sorted({size for size, _ in training}):
        own, deit, parallel = (
            training.get((size, name))
            for name in (f'ViL-{arch}', f'DeiT-{arch}', f'ViL-{arch} parallel')
        )
        if size in THROUGHPUT:
            value = 1 / own['time_ratio'] if own and deit else None
            line(size, 'training throughput / DeiT', value, '≥', THROUGHPUT[size])
        measured = own and deit and own['peak_bytes'] is not None
        value = own['peak_bytes'] / deit['peak_bytes'] if measured else None
        line(size, 'peak memory / DeiT', value, '≤', 1.0)
        if size in OVER_PARALLEL:
            value = None
            if own and parallel:
                pairs = zip(parallel['seconds_per_image'], own['seconds_per_image'])
                value = statistics.median(other / mine for other, mine in pairs)
            line(size, 'training throughput / PyTorch parallel', value, '≥', OVER_PARALLEL[size])
    return lines


def upernet(plan, device):
    """Measure whole training steps of UperNet ViL-B: loss, backward pass, AdamW."""
    try:
        cfg = load_config(str(ROOT / 'configs/upernet_vil_b_ade20k.py'), {})
    except UserError as error:  # without mmseg
        return f'Not measured: {error}.'
    cfg.optim_wrapper.dtype = 'bfloat16'
    cfg.model.backbone.init_cfg = None
    if width := plan['upernet_width']:
        cfg.model.backbone.arch = dict(embed_dims=width, depth=24)
        cfg.model.decode_head.update(in_channels=[width] * 4, channels=width)
        cfg.model.auxiliary_head.update(in_channels=width, channels=width)
    size = (plan['upernet_size'],) * 2
    rows = ['| backend | batch | ms/step | images/s | peak MB |', '| -- | --: | --: | --: | --: |']
    for batch in plan['upernet_batches']:
        for backend in ('auto', 'parallel'):
            cfg.model.backbone.backend = backend
            try:
                peak, speed = measure_training(
                    cfg, batch, size, device, plan['warmup'], plan['steps']
                )
            except torch.cuda.OutOfMemoryError:
                rows.append(f'| {backend} | {batch} | out of memory | | |')
                continue
            rows.append(
                f'| {backend} | {batch} | {1e3 * batch / speed:.1f} | {speed:.1f} '
                f'| {megabytes(peak)} |'
            )
    return '\n'.join(rows)


def main():
    args = parse_args(make_report_parser())
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError(
            'torch sees no GPU here, and this report is about one; --device cpu --quick tries the '
            'command itself'
        )
    if args.device == 'cpu' and not args.quick:
        raise UserError('--device cpu needs --quick: the full report takes days on a CPU')
    plan = QUICK if args.quick else FULL
    args.out.mkdir(parents=True, exist_ok=True)
    file, parts, goals = args.out / 'report.md', [], []

    def add(title, text):
        parts.append(f'## {title}\n\n{text}\n')
        table = ['| model | image | target | measured | |', '| -- | --: | -- | --: | -- |', *goals]
        time = f'{datetime.now():%Y-%m-%d %H:%M}'
        head = f'# mmvil on a GPU, {time}\n\n{environment(args.device)}\n'
        summary = '## Targets\n\n' + '\n'.join(table) + '\n'
        file.write_text('\n'.join([head, summary, *parts]), encoding='utf-8')
        print(f'\n## {title}\n\n{text}\n', flush=True)

    add('Tests', run_tests(plan['tests'], args.out))
    for arch in plan['archs']:
        records = run_benchmark(arch, args.out, plan, args.device)
        goals += targets(records, arch)
        add(f'ViL-{arch}, bfloat16', benchmark_table(records))
    size = f'{plan["upernet_size"]} x {plan["upernet_size"]}'
    add(f'UperNet ViL-B, {size}, training steps in bfloat16', upernet(plan, args.device))
    print(f'Report: {file}')


if __name__ == '__main__':
    run(main)
