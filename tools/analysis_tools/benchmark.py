# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Time and memory of ViL, side by side with DeiT of the same width and with any other backbone.

python tools/analysis_tools/benchmark.py --arch tiny --sizes 224 512 1024 --plot benchmark.png
python tools/analysis_tools/benchmark.py --backends parallel chunkwise --lean on off --sizes 512
python tools/analysis_tools/benchmark.py --timm convnext_tiny --config configs/upernet_r18_camvid.py

All models take turns, round after round, and each is compared with DeiT inside the round: what else
the machine does then hits all of them alike, and ratios can be trusted where times can not.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope

import mmvil
from mmvil.apis.measure import compare
from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError
from mmvil.cli.main import parse_args, run
from mmvil.engine.cpu import keep_freed_memory

DEIT = {
    'tiny': 'deit_tiny_patch16_224',
    'small': 'deit_small_patch16_224',
    'base': 'deit_base_patch16_224',
}


# -- Contenders: functions from an image size to a model ------------------------------------------


def make_contenders(args):
    """Name and builder of each model, DeiT first."""
    arch = args.arch
    contenders = {f'DeiT-{arch}': timm_builder(DEIT[arch])}
    for backend in args.backends:
        for lean in args.lean:
            options = dict(arch=arch, backend=backend, lean=lean == 'on')
            name = f'ViL-{arch}'
            name += '' if backend == 'auto' else f' {backend}'
            name += '' if lean == 'on' else ' keeping all'
            contenders[name] = vil_builder(**options)
    contenders.update((name, timm_builder(name)) for name in args.timm)
    contenders.update((Path(path).stem, config_builder(path)) for path in args.config)
    if args.compile:
        contenders.update(
            {f'{name} compiled': compiled(build) for name, build in contenders.items()}
        )
    return contenders


def vil_builder(**options):
    return lambda size: mmvil.VisionLSTM(img_size=size, out_type='bilateral_concat', **options)


def timm_builder(name):
    try:
        import timm
    except ImportError:
        raise UserError('DeiT comes from timm, which is not installed: pip install timm') from None
    if not timm.is_model(name):
        raise UserError(f'timm has no model {name!r}; timm.list_models() names them')

    def build(size):
        try:
            return timm.create_model(name, img_size=size, num_classes=0)
        except TypeError:  # networks for any size, such as convolutional ones
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


# -- Report ---------------------------------------------------------------------------------------


def add_ratios(records):
    """Relate each model to the first one, which is DeiT, inside each round."""
    for record in records:
        base = next(
            other
            for other in records
            if (other['size'], other['mode']) == (record['size'], record['mode'])
        )
        pairs = zip(record['seconds_per_image'], base['seconds_per_image'])
        record['time_ratio'] = statistics.median(own / other for own, other in pairs)
        record['ratio_to'] = base['model']


def print_table(records):
    width = max(len(record['model']) for record in records)
    print(
        f'\n{"image":>11} {"batch":>5} {"mode":8} {"model":{width}} {"ms/image":>9} {"ratio":>6} '
        f'{"GMACs":>8} {"saved MB":>9} {"peak MB":>8}'
    )
    for record in records:
        size = f'{record["size"]} x {record["size"]}'
        milliseconds = 1e3 * statistics.median(record['seconds_per_image'])
        print(
            f'{size:>11} {record["batch"]:>5} {record["mode"]:8} {record["model"]:{width}} '
            f'{milliseconds:>9.1f} {record["time_ratio"]:>6.2f} '
            f'{scaled(record["multiply_adds_per_image"], 1e9):>8} '
            f'{scaled(record["saved_bytes_per_image"], 1e6):>9} '
            f'{scaled(record["peak_bytes"], 1e6):>8}'
        )
    print(
        f'\nratio: time relative to {records[0]["ratio_to"]}, median of the rounds.  GMACs: 1e9 '
        'multiply-adds per image, executed.\nsaved: kept by autograd for the backward pass, per '
        'image, 1 MB = 1e6 bytes.  peak: of the batch, beside the weights (GPU only).'
    )


def scaled(number, unit):
    return '-' if number is None else f'{number / unit:.1f}'


def plot(records, modes, path):
    """Time per token for each mode, and saved bytes, against the image size."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(
        1, len(modes) + 1, figsize=(4 * len(modes) + 4, 3.6), layout='constrained'
    )
    for name in dict.fromkeys(record['model'] for record in records):
        own = [record for record in records if record['model'] == name]
        for mode, axis in zip(modes, axes):
            points = [
                (r['size'], 1e6 * statistics.median(r['seconds_per_image']) / (r['size'] / 16) ** 2)
                for r in own
                if r['mode'] == mode
            ]
            axis.plot(*zip(*points), marker='o', label=name)
        points = [
            (r['size'], r['saved_bytes_per_image'] / 1e6)
            for r in own
            if r['saved_bytes_per_image'] is not None
        ]
        if points:
            axes[-1].plot(*zip(*points), marker='o', label=name)
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


# -- Command line ---------------------------------------------------------------------------------


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--arch', choices=list(DEIT), default='tiny', help='of ViL and DeiT (%(default)s)')
    add(
        '--backends',
        nargs='+',
        choices=[name for name in mmvil.ops.BACKENDS if name != 'reference'],
        default=['auto'],
        help='forms of the mLSTM (auto)',
    )
    add(
        '--lean',
        nargs='+',
        choices=['on', 'off'],
        default=['on'],
        help='keep little for the backward pass, or everything, or both in turn (on)',
    )
    add('--compile', action='store_true', help='each model once more with torch.compile')
    add('--timm', nargs='+', default=[], metavar='NAME', help='more models, of timm')
    add('--config', nargs='+', default=[], help='more models: the backbones of configs')
    add(
        '--sizes',
        type=int,
        nargs='+',
        default=[224, 512, 1024],
        metavar='PIXELS',
        help='square images, multiples of 16 pixels (224 512 1024)',
    )
    add(
        '--batch',
        type=int,
        nargs='+',
        help='images, one number for all sizes or one for each (8 at 224 pixels, fewer above)',
    )
    add('--modes', nargs='+', choices=['forward', 'training'], default=['forward', 'training'])
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='(%(default)s)')
    add('--amp', choices=['float16', 'bfloat16'], help='autocast (without: float32)')
    add('--rounds', type=int, default=7, help='turns that each model takes (%(default)s)')
    add('--threads', type=int, help='CPU threads (as torch chooses)')
    add('--json', type=Path, metavar='FILE', help='write all measurements')
    add('--plot', type=Path, metavar='FILE.png', help='draw time and memory against image size')
    add('--traceback', action='store_true', help='show the trace of an error')
    return parser


def check(args):
    wrong = [size for size in args.sizes if size < 16 or size % 16]
    if wrong:
        raise UserError(f'--sizes must be multiples of 16 pixels, but {wrong[0]} is not')
    if args.batch is None:
        args.batch = [max(1, round(8 * (224 / size) ** 2)) for size in args.sizes]
    elif len(args.batch) == 1:
        args.batch *= len(args.sizes)
    if len(args.batch) != len(args.sizes):
        raise UserError(f'--batch wants one number or {len(args.sizes)}, one for each of --sizes')
    if min(args.rounds, *args.batch) < 1:
        raise UserError('--rounds and --batch must be at least 1')
    args.modes = sorted(set(args.modes))
    args.device = torch.device(args.device)
    if args.device.type == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda, but torch sees no GPU here')
    for file in filter(None, (args.json, args.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)


def describe(args):
    """Where the numbers come from."""
    on_gpu = args.device.type == 'cuda'
    return dict(
        mmvil=mmvil.__version__,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(args.device) if on_gpu else cpu_name(),
        threads=torch.get_num_threads(),
        dtype=f'{args.amp} autocast' if args.amp else 'float32',
    )


def cpu_name():
    return f'CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})'


def main():
    args = parse_args(make_parser())
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if torch.device(args.device).type == 'cpu':
        keep_freed_memory()  # as training and testing do
    start = time.perf_counter()

    def progress(text):
        print(f'[{time.perf_counter() - start:6.0f} s] {text}', flush=True)

    environment = describe(args)
    print(', '.join(f'{key} {value}' for key, value in environment.items()))
    contenders, records = make_contenders(args), []
    for size, batch in zip(args.sizes, args.batch):
        records += compare(contenders, size, batch, args, progress)
        add_ratios(records)
        if args.json:  # after each size: an interruption costs no results
            report = dict(environment=environment, command=sys.argv[1:], results=records)
            args.json.write_text(json.dumps(report, indent=1) + '\n')
    if not records:
        raise UserError('no model fits into the memory')
    print_table(records)
    if args.plot:
        plot(records, args.modes, args.plot)
        print(f'Plot: {args.plot}')


if __name__ == '__main__':
    run(main)
