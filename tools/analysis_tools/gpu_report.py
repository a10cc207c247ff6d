# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Everything that wants a GPU, in one command: tests, benchmarks, and a report in Markdown.

python tools/analysis_tools/gpu_report.py --out gpu_report

Tests of the operators and the backbone; benchmark.py in bfloat16 for ViL-T, -S and -B against the
plain PyTorch form and timm's DeiT; UperNet ViL-B, whole training steps. The report says which
targets are met. It is written again after each part, so an interruption costs little.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

import mmvil
from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError
from mmvil.cli.main import parse_args, run

THROUGHPUT = {224: 0.8, 512: 1.0, 1024: 2.0}
"""Training throughput relative to DeiT that is aimed at, by image size."""
OVER_PARALLEL = {224: 3.0, 512: 6.0}
"""The same relative to the plain parallel form of PyTorch."""
PACKAGES = ('torch', 'triton', 'timm', 'mmengine', 'onedl-mmengine', 'mmsegmentation', 'numpy')

ROOT = Path(__file__).resolve().parents[2]


# -- Parts of the report: each returns Markdown ---------------------------------------------------


def environment(device):
    """What the numbers depend on."""
    lines = [f'- mmvil: {mmvil.__version__}, {_commit()}', f'- Python: {platform.python_version()}']
    if device.type == 'cuda':
        gpu = torch.cuda.get_device_properties(device)
        lines.insert(
            0,
            f'- **GPU: {gpu.name}**, compute capability {gpu.major}.{gpu.minor}, '
            f'{gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}',
        )
    else:
        lines.insert(0, f'- **No GPU**: {platform.machine()}. These numbers say nothing.')
    for name in PACKAGES:
        try:
            lines.append(f'- {name}: {version(name)}')
        except PackageNotFoundError:
            continue
    return '\n'.join(lines)


def _commit():
    result = subprocess.run(
        ['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True
    )
    return f'commit {result.stdout.strip()}' if result.returncode == 0 else 'no git checkout'


def run_tests(targets, folder):
    """Run pytest; its whole output goes to tests.log."""
    if not (ROOT / 'tests').is_dir():
        return 'Not run: this is no checkout with tests.'
    log = folder / 'tests.log'
    with log.open('w') as file:
        status = subprocess.run(
            [sys.executable, '-m', 'pytest', '-q', '-m', 'not slow', *targets],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    lines = log.read_text().strip().splitlines() or ['(no output)']
    failed = [f'    {line}' for line in lines if line.startswith(('FAILED', 'ERROR'))]
    verdict = 'Passed' if status == 0 else f'**Failed** (status {status})'
    return '\n'.join([f'{verdict}: `{lines[-1].strip("= ")}`. Log: {log.name}.', '', *failed])


def run_benchmark(arch, folder, plan, device):
    """Run benchmark.py for one architecture; return its records."""
    file = folder / f'benchmark_{arch}.json'
    command = [sys.executable, str(Path(__file__).with_name('benchmark.py')), '--arch', arch]
    command += ['--backends', 'auto', 'parallel', '--amp', 'bfloat16', '--device', device.type]
    command += ['--sizes', *map(str, plan['sizes']), '--batch', *map(str, plan['batches'])]
    command += ['--rounds', str(plan['rounds']), '--json', str(file)]
    status = subprocess.run(command).returncode
    if status or not file.exists():
        raise RuntimeError(f'{" ".join(command)} ended with status {status}')
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
            f'| {rate:.1f} | {1 / record["time_ratio"]:.2f} | {_megabytes(record["peak_bytes"])} '
            f'| {_megabytes(record["saved_bytes_per_image"])} |'
        )
    return '\n'.join(rows)


def _megabytes(count):
    return '-' if count is None else f'{count / 1e6:.0f}'


def targets(records, arch):
    """Lines of the table of targets, and whether each is met."""
    training = {(r['size'], r['model']): r for r in records if r['mode'] == 'training'}
    lines = []

    def line(size, name, value, bound, at_most=False):
        if value is None:
            return lines.append(f'| ViL-{arch} | {size}² | {name} | - | not measured |')
        met = value <= bound if at_most else value >= bound
        sign = '≤' if at_most else '≥'
        lines.append(
            f'| ViL-{arch} | {size}² | {name} | {value:.2f} ({sign} {bound}) '
            f'| {"met" if met else "**missed**"} |'
        )

    for size in sorted({size for size, _ in training}):
        own, deit, parallel = (
            training.get((size, name))
            for name in (f'ViL-{arch}', f'DeiT-{arch}', f'ViL-{arch} parallel')
        )
        if size in THROUGHPUT:
            value = 1 / own['time_ratio'] if own and deit else None
            line(size, 'training throughput / DeiT', value, THROUGHPUT[size])
        value = None
        if own and deit and own['peak_bytes'] is not None:
            value = own['peak_bytes'] / deit['peak_bytes']
        line(size, 'peak memory / DeiT', value, 1.0, at_most=True)
        if size in OVER_PARALLEL:
            value = None
            if own and parallel:
                pairs = zip(parallel['seconds_per_image'], own['seconds_per_image'])
                value = statistics.median(other / mine for other, mine in pairs)
            line(size, 'training throughput / PyTorch parallel', value, OVER_PARALLEL[size])
    return lines


def upernet(plan, device):
    """Whole training steps of a segmentor: loss, backward pass, AdamW."""
    try:
        import mmseg  # noqa: F401
    except ImportError as error:
        return f'Not measured: {error}.'
    rows = ['| backend | batch | ms/step | images/s | peak MB |', '| -- | --: | --: | --: | --: |']
    for batch in plan['upernet_batches']:
        for backend in ('auto', 'parallel'):
            try:
                seconds, peak = _segmentor_step(plan, backend, batch, device)
            except torch.cuda.OutOfMemoryError:
                rows.append(f'| {backend} | {batch} | out of memory | | |')
                continue
            rows.append(
                f'| {backend} | {batch} | {1e3 * seconds:.1f} | {batch / seconds:.1f} '
                f'| {_megabytes(peak)} |'
            )
    return '\n'.join(rows)


def _segmentor_step(plan, backend, batch, device):
    """Seconds and peak bytes of a step, weights and optimizer included."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    cfg = load_config(str(ROOT / 'configs/upernet_vil_b_ade20k.py'), {})
    init_default_scope('mmseg')
    cfg.model.backbone.update(init_cfg=None, backend=backend)
    width = plan['upernet_width']
    if width:
        cfg.model.backbone.arch = dict(embed_dims=width, depth=24)
        cfg.model.decode_head.update(in_channels=[width] * 4, channels=width)
        cfg.model.auxiliary_head.update(in_channels=width, channels=width)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    size = plan['upernet_size']
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(0, 150, (batch, 1, size, size), device=device)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            losses = model.loss(images, samples)
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if 'loss' in name).backward()
        optimizer.step()

    def synchronize():
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    for _ in range(plan['warmup']):
        step()
    synchronize()
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    for _ in range(plan['steps']):
        step()
    synchronize()
    seconds = (time.perf_counter() - start) / plan['steps']
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else None


# -- Command line ---------------------------------------------------------------------------------

FULL = dict(
    tests=('tests/test_ops', 'tests/test_layers', 'tests/test_backbones'),
    archs=('tiny', 'small', 'base'),
    sizes=(224, 512, 1024),
    batches=(128, 24, 6),
    rounds=7,
    upernet_width=None,  # as the config says
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


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--out', type=Path, default=Path('gpu_report'), metavar='FOLDER', help='(%(default)s)'
    )
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda', help='(%(default)s)')
    parser.add_argument(
        '--quick', action='store_true', help='tiny sizes: does the command work at all?'
    )
    parser.add_argument('--traceback', action='store_true', help='show the trace of an error')
    return parser


def main():
    args = parse_args(make_parser())
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError(
            'torch sees no GPU here, and this report is about one. To try the command itself: '
            '--device cpu --quick'
        )
    if args.device == 'cpu' and not args.quick:
        raise UserError('--device cpu wants --quick: the full report takes days on a CPU')
    device, plan = torch.device(args.device), QUICK if args.quick else FULL
    args.out.mkdir(parents=True, exist_ok=True)
    file, parts, goals = args.out / 'report.md', [], []

    def add(title, text):
        parts.append(f'## {title}\n\n{text}\n')
        table = ['| model | image | target | measured | |', '| -- | --: | -- | --: | -- |', *goals]
        head = f'# mmvil on a GPU, {datetime.now():%Y-%m-%d %H:%M}\n\n{environment(device)}\n'
        summary = '## Targets\n\n' + '\n'.join(table) + '\n'
        file.write_text('\n'.join([head, summary, *parts]), encoding='utf-8')
        print(f'\n## {title}\n\n{text}\n', flush=True)

    add('Tests', run_tests(plan['tests'], args.out))
    for arch in plan['archs']:
        records = run_benchmark(arch, args.out, plan, device)
        goals += targets(records, arch)
        add(f'ViL-{arch}, bfloat16', benchmark_table(records))
    size = f'{plan["upernet_size"]} x {plan["upernet_size"]}'
    add(f'UperNet ViL-B, {size}, training steps in bfloat16', upernet(plan, device))
    print(f'Report: {file}')


if __name__ == '__main__':
    run(main)
