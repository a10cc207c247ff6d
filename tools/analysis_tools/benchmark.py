# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Benchmark time and memory of ViL against DeiT of the same width and any other backbone.

python tools/analysis_tools/benchmark.py --arch tiny --sizes 224 512 1024 --plot benchmark.png
python tools/analysis_tools/benchmark.py --backends parallel chunkwise --lean on off --sizes 512
python tools/analysis_tools/benchmark.py --timm convnext_tiny --config configs/upernet_r18_camvid.py

Models run in alternation and are compared with DeiT within a round. Other load on the machine
affects all of them alike, so ratios are reliable even where times are not.
"""

import itertools
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope

import mmvil
from mmvil.apis.measure import MODES, compare
from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError
from mmvil.cli.main import at_least, device, figure_path, make_parser, parse_args, run

ARCHS = ('tiny', 'small', 'base')
LEAN = dict(on=(True, ''), cell=('cell', ' keeping cell'), off=(False, ' keeping all'))
"""The backbone's option ``lean``, and the suffix of the model's name."""


def make_benchmark_parser():
    parser = make_parser(__doc__, whole=True)
    add = parser.add_argument
    add('--arch', choices=ARCHS, default='tiny', help='size of ViL and DeiT (%(default)s)')
    backends = [name for name in mmvil.ops.BACKENDS if name != 'reference']
    some = dict(nargs='+', choices=backends, default=['auto'])
    add('--backends', help='backends of the mLSTM (auto)', **some)
    some = dict(nargs='+', choices=list(LEAN), default=['on'])
    add('--lean', help="save little for backward, the cell's inputs too, or all (on)", **some)
    add('--compile', action='store_true', help='add each model with torch.compile')
    add('--timm', nargs='+', default=[], metavar='NAME', help='more models, from timm')
    add('--config', nargs='+', default=[], help='more models: the backbones of configs')
    some = dict(type=at_least(16), nargs='+', metavar='PIXELS', default=[224, 512, 1024])
    add('--sizes', help='square images, multiples of 16 pixels (224 512 1024)', **some)
    batch = 'images, one number for all sizes or one for each (8 at 224 pixels, fewer above)'
    add('--batch', type=at_least(1), nargs='+', help=batch)
    add('--modes', nargs='+', choices=MODES, default=list(MODES))
    usual = 'cuda' if torch.cuda.is_available() else 'cpu'
    add('--device', type=device, default=usual, help='(%(default)s)')
    add('--amp', choices=['float16', 'bfloat16'], help='autocast (default: float32)')
    add('--rounds', type=at_least(1), default=7, help='measurements of each model (%(default)s)')
    add('--threads', type=at_least(1), help='CPU threads (default: chosen by torch)')
    add('--json', type=Path, metavar='FILE', help='write all measurements')
    plot = 'plot time and memory against image size'
    add('--plot', type=figure_path, metavar='FILE.png', help=plot)
    return parser


def check(args):
    """Complete the arguments, and raise if anything cannot be measured."""
    wrong = [size for size in args.sizes if size % 16]
    if wrong:
        raise UserError(f'--sizes must be multiples of 16 pixels, but {wrong[0]} is not')
    if args.batch is None:
        args.batch = [max(1, round(8 * (224 / size) ** 2)) for size in args.sizes]
    elif len(args.batch) == 1:
        args.batch *= len(args.sizes)
    if len(args.batch) != len(args.sizes):
        raise UserError(f'--batch takes one number or {len(args.sizes)}, one for each of --sizes')
    args.modes = sorted(set(args.modes))
    for file in filter(None, (args.json, args.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)


def make_builders(args):
    """Functions from an image size to a model, by name, starting with DeiT."""
    builders = {f'DeiT-{args.arch}': timm_builder(f'deit_{args.arch}_patch16_224')}
    for backend, lean in itertools.product(args.backends, args.lean):
        name = f'ViL-{args.arch}'
        name += '' if backend == 'auto' else f' {backend}'
        option, suffix = LEAN[lean]
        builders[name + suffix] = vil_builder(arch=args.arch, backend=backend, lean=option)
    builders.update((name, timm_builder(name)) for name in args.timm)
    builders.update((Path(path).stem, config_builder(path)) for path in args.config)
    if args.compile:
        builders.update({f'{name} compiled': compiled(build) for name, build in builders.items()})
    return builders


def vil_builder(**options):
    return lambda size: mmvil.VisionLSTM(img_size=size, out_type='bilateral_concat', **options)


def timm_builder(name):
    try:
        import timm
    except ImportError:
        raise UserError('DeiT comes from timm, which is not installed: pip install timm') from None
    if not timm.is_model(name):
        raise UserError(f'timm has no model {name!r}; see timm.list_models()')

    def build(size):
        try:
            return timm.create_model(name, img_size=size, num_classes=0)
        except TypeError:  # models without an image size, such as convolutional ones
            return timm.create_model(name, num_classes=0)

    return build


def config_builder(path):
    cfg = load_config(path, {})

    def build(size):
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        backbone = {**cfg.model.backbone, 'init_cfg': None}
        if 'img_size' in backbone:
            backbone['img_size'] = size
        return MODELS.build(backbone)

    return build


def compiled(build):
    return lambda size: torch.compile(build(size), dynamic=False)


def describe(args):
    """Describe versions, hardware and precision of the measurements."""
    cpu = f'CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})'
    on_gpu = args.device.type == 'cuda'
    return dict(
        mmvil=mmvil.__version__,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(args.device) if on_gpu else cpu,
        threads=torch.get_num_threads(),
        dtype=f'{args.amp} autocast' if args.amp else 'float32',
    )


def milliseconds(record):
    return 1e3 * statistics.median(record['seconds_per_image'])


def print_table(records):
    width = max(len(record['model']) for record in records)
    print(
        f'\n{"image":>11} {"batch":>5} {"mode":8} {"model":{width}} {"ms/image":>9} {"ratio":>6} '
        f'{"GMACs":>8} {"saved MB":>9} {"peak MB":>8}'
    )
    for record in records:
        size = f'{record["size"]} x {record["size"]}'
        print(
            f'{size:>11} {record["batch"]:>5} {record["mode"]:8} {record["model"]:{width}} '
            f'{milliseconds(record):>9.1f} {scaled(record["time_ratio"], 1, 2):>6} '
            f'{scaled(record["multiply_adds_per_image"], 1e9):>8} '
            f'{scaled(record["saved_bytes_per_image"], 1e6):>9} '
            f'{scaled(record["peak_bytes"], 1e6):>8}'
        )
    print(
        f'\nratio: time relative to {records[0]["ratio_to"]}, median over rounds.  GMACs: 1e9 '
        'executed multiply-adds per image.\nsaved: by autograd for the backward pass, per '
        'image, 1 MB = 1e6 bytes.  peak: of the batch, without the weights (GPU only).'
    )


def scaled(number, unit, digits=1):
    return '-' if number is None else f'{number / unit:.{digits}f}'


def plot(records, path):
    """Plot time per patch for each mode, and saved bytes, against image size."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    modes = list(dict.fromkeys(record['mode'] for record in records))
    size = (4 * len(modes) + 4, 3.6)
    figure, axes = plt.subplots(1, len(modes) + 1, figsize=size, layout='constrained')
    for name in dict.fromkeys(record['model'] for record in records):
        own = [record for record in records if record['model'] == name]
        points = {mode: [] for mode in (*modes, 'saved')}
        for record in own:
            patches = (record['size'] / 16) ** 2
            points[record['mode']].append((record['size'], 1e3 * milliseconds(record) / patches))
            if record['saved_bytes_per_image'] is not None:
                points['saved'].append((record['size'], record['saved_bytes_per_image'] / 1e6))
        for axis, curve in zip(axes, points.values()):
            if curve:
                axis.plot(*zip(*curve), marker='o', label=name)
    titles = [f'{mode}: µs per 16 x 16 patch' for mode in modes]
    sizes = sorted({record['size'] for record in records})
    for axis, title in zip(axes, [*titles, 'saved for backward: MB per image']):
        axis.set(title=title, xlabel='image size in pixels', xscale='log', yscale='log')
        axis.set_xticks(sizes, map(str, sizes))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter('{x:g}')
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main():
    args = parse_args(make_benchmark_parser())
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()

    def progress(text):
        print(f'[{time.perf_counter() - start:6.0f} s] {text}', flush=True)

    environment = describe(args)
    print(', '.join(f'{key} {value}' for key, value in environment.items()))
    builders, records = make_builders(args), []
    amp = getattr(torch, args.amp) if args.amp else None
    for size, batch in zip(args.sizes, args.batch):
        image = torch.randn(batch, 3, size, size, device=args.device)
        records += compare(builders, image, args.modes, amp, args.rounds, progress)
        if args.json:  # after each size, so that an interruption loses no results
            report = dict(environment=environment, command=sys.argv[1:], results=records)
            args.json.write_text(json.dumps(report, indent=1) + '\n')
    if not records:
        raise UserError('no model fits into memory')
    print_table(records)
    if args.plot:
        plot(records, args.plot)
        print(f'Plot: {args.plot}')


if __name__ == '__main__':
    run(main)
