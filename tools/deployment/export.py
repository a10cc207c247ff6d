# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Export a segmentor or classifier with ONNX or torch.export, and compare the file with PyTorch.

python tools/deployment/export.py configs/upernet_vil_t_ade20k.py checkpoint.pth --out vil_t.onnx

The file accepts any number of images of any size, RGB from 0 to 255 or, with other channels, as the
config loads them. See docs/deployment.md.
"""

import importlib
import logging
import time
import warnings
from pathlib import Path

import torch

from mmvil.apis import deploy
from mmvil.apis.inspect_blocks import find_backbone, trained_size
from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError
from mmvil.cli.inference import build_model
from mmvil.cli.main import add_config_arguments, at_least, make_parser, parse_args, run

FORMATS = {'.onnx': 'onnx', '.pt2': 'pt2'}


def make_export_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_config_arguments(parser, 'config file that the checkpoint was trained with')
    add('checkpoint', help='checkpoint file')
    add('--out', type=Path, help='file to write (default: CONFIG_NAME.onnx)')
    add('--format', choices=FORMATS.values(), help='(default: by the suffix of --out, else onnx)')
    outputs = dict(choices=deploy.OUTPUTS, default='logits')
    add('--output', help='what the file returns (%(default)s)', **outputs)
    pair = dict(type=at_least(1), nargs=2, metavar=('HEIGHT', 'WIDTH'))
    add('--size', help='image size for tracing and checking (default: as trained)', **pair)
    add('--static', action='store_true', help='one image of exactly --size, for simpler runtimes')
    add('--normalized-input', action='store_true', help='do not include normalization')
    tokens = 'tokens per chunk of the mLSTM (default: by head width)'
    add('--chunk-size', type=at_least(1), help=tokens)
    add('--opset', type=at_least(1), default=20, help='ONNX opset (%(default)s)')
    accepted = 'tolerated relative difference, or fraction of labels (%(default)s)'
    add('--tolerance', type=at_least(0, float), default=1e-3, help=accepted)
    return parser


def complete(args):
    """Choose format and file, and check that PyTorch and the packages for ONNX can export."""
    suffix = args.out.suffix if args.out else '.onnx'
    args.format = args.format or FORMATS.get(suffix)
    if args.format is None:
        raise UserError(
            f'--out ends with {suffix!r}; use .onnx or .pt2, or choose a format with --format'
        )
    args.out = args.out or Path(f'{Path(args.config).stem}.{args.format}')
    if not hasattr(torch.compiler, 'is_exporting'):
        raise UserError(
            f'export needs a newer PyTorch than {torch.__version__} (2.15 is known to work). '
            'Checkpoints are the same on both lines of OpenMMLab: install the maintained one in '
            "another environment, pip install '.[onedl]', and export there"
        )
    for package in ('onnx', 'onnxscript', 'onnxruntime') if args.format == 'onnx' else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f'ONNX needs {package}: pip install onnx onnxscript onnxruntime'
            ) from error


@torch.no_grad()
def check(model, exported, shapes):
    """Compare an exported file with PyTorch on random images, print the differences, and return the
    largest one, see :func:`mmvil.apis.deploy.compare_output`.
    """
    generator = torch.Generator().manual_seed(0)
    differences = []
    for shape in shapes:
        images = torch.rand(shape, generator=generator) * 255
        if not model.normalize:
            images = images / 64 - 2
        results = exported(images), model(images)
        for name in model.names:
            one, other = (x[name] if isinstance(x, dict) else x for x in results)
            difference, summary = deploy.compare_output(one, other, model.output == 'labels')
            task = f'{name}: ' if len(model.names) > 1 else ''
            print(f'  {"x".join(map(str, shape)):>16}: {task}{summary}')
            differences.append(difference)
    return torch.tensor(differences).max().item()  # NaN, if there is one


def main():
    args = parse_args(make_export_parser())
    cfg = load_config(args.config, args.cfg_options)
    if cfg.default_scope == 'mmdet':
        raise UserError('only segmentors and classifiers can be exported, not detectors')
    complete(args)
    model = build_model(cfg, args.checkpoint)
    model = deploy.Deployed(model, args.output, normalize=not args.normalized_input).eval()
    backbone = find_backbone(model)
    size, patch = tuple(args.size or trained_size(backbone)), backbone.patch_size
    if min(size) < patch:
        raise UserError(f'--size must be at least one patch ({patch}), but is {size[0]} {size[1]}')
    description = model.describe(size)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    print(f'Tracing at {size[0]}x{size[1]} ...')
    for library in ('torch', 'onnxscript'):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter('ignore')  # warnings for exporter developers
    start = time.perf_counter()
    program = deploy.trace(model, size, args.static, args.chunk_size)
    if args.format == 'onnx':
        deploy.save_onnx(program, args.out, model.names, description, args.opset)
    else:
        deploy.save_pt2(program, args.out, description)
    megabytes, seconds = args.out.stat().st_size / 1e6, time.perf_counter() - start
    print(f'Wrote {args.out} ({megabytes:.1f} MB, {seconds:.0f} s)')
    print(f'  input  {description["input"]}\n  output {args.output}')

    print('Compared with PyTorch:')
    shapes = [(1, model.channels, *size)]
    if not args.static:  # sizes that patches do not tile
        shapes.append((3, model.channels, size[0] * 5 // 4 + 1, max(size[1] * 3 // 4 - 1, patch)))
    worst = check(model, deploy.load_exported(args.out, args.format), shapes)
    if not worst <= args.tolerance:
        raise UserError(
            f'{args.out} differs from PyTorch by {worst:.1e}, more than --tolerance '
            f'{args.tolerance:g}'
        )


if __name__ == '__main__':
    run(main)
