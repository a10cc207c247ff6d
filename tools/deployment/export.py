# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Export a segmentor or classifier to ONNX or torch.export, and check the file against PyTorch.

python tools/deployment/export.py configs/upernet_vil_t_ade20k.py checkpoint.pth --out vil_t.onnx

The file takes any number of images of any size, in RGB from 0 to 255 or, of other channels, as the
config loads them. See docs/deployment.md.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import torch
from mmengine.config import DictAction

from mmvil import VisionLSTM
from mmvil.apis.deploy import Deployed, check, describe, load, save_onnx, save_pt2, trace
from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError
from mmvil.cli.inference import build_model
from mmvil.cli.main import parse_args, run

SUFFIXES = dict(onnx='.onnx', pt2='.pt2')
OUTPUTS = ('logits', 'probabilities', 'labels')


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', type=Path, help='file to write (default: CONFIG_NAME.onnx)')
    parser.add_argument(
        '--format', choices=SUFFIXES, help='(default: by the suffix of --out, else onnx)'
    )
    parser.add_argument(
        '--output', choices=OUTPUTS, default='logits', help='what the file returns (%(default)s)'
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='image size to trace and check with (default: that of the position embedding)',
    )
    parser.add_argument(
        '--static', action='store_true', help='one image of exactly --size, for simpler runtimes'
    )
    parser.add_argument(
        '--normalized-input',
        action='store_true',
        help='leave mean and standard deviation to the caller',
    )
    parser.add_argument(
        '--chunk-size', type=int, help='tokens in a chunk of the mLSTM (default: by head width)'
    )
    parser.add_argument('--opset', type=int, default=20, help='of ONNX (%(default)s)')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-3,
        help='largest accepted difference to PyTorch, relative to the largest output; with '
        '--output labels: share of labels that differ (%(default)s)',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE'
    )
    parser.add_argument('--traceback', action='store_true', help='show the trace of an error')
    return parser


# -- Command line ----------------------------------------------------------------------------------


def check_installation(output_format):
    """Make sure that PyTorch and the packages for ONNX are there."""
    if not hasattr(torch.compiler, 'is_exporting'):
        raise UserError(
            f'export needs a newer PyTorch than {torch.__version__} (2.15 is known to work). '
            'Checkpoints are the same on both lines of OpenMMLab: install the maintained one in '
            "another environment, pip install '.[onedl]', and export there"
        )
    if output_format == 'onnx':
        for package in ('onnx', 'onnxscript', 'onnxruntime'):
            try:
                __import__(package)
            except ImportError as error:
                raise UserError(
                    f'ONNX needs {package}: pip install onnx onnxscript onnxruntime'
                ) from error


def training_size(model):
    """The image size that the position embedding was made for."""
    for backbone in model.modules():
        if isinstance(backbone, VisionLSTM):
            return tuple(side * backbone.patch_size for side in backbone.pos_embed.shape[1:3])
    raise UserError('the model has no VisionLSTM; give the image size by --size HEIGHT WIDTH')


def main():
    args = parse_args(make_parser())
    output_format = args.format
    if output_format is None:
        suffix = args.out.suffix if args.out else '.onnx'
        formats = {value: key for key, value in SUFFIXES.items()}
        if suffix not in formats:
            raise UserError(
                f'--out ends with {suffix!r}; .onnx or .pt2 says the format, or --format does'
            )
        output_format = formats[suffix]
    check_installation(output_format)
    cfg = load_config(args.config, args.cfg_options)
    out = args.out or Path(Path(args.config).stem + SUFFIXES[output_format])

    model = Deployed(
        build_model(cfg, args.checkpoint), args.output, normalize=not args.normalized_input
    ).eval()
    size = tuple(args.size or training_size(model))
    description = describe(model, size)
    print(f'Tracing at {size[0]}x{size[1]} ...')
    logging.getLogger('torch').setLevel(logging.ERROR)
    warnings.simplefilter('ignore')  # of exporters, to their own developers
    start = time.perf_counter()
    program = trace(model, size, args.static, args.chunk_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    if output_format == 'onnx':
        save_onnx(program, out, args.opset, model.names, description)
    else:
        save_pt2(program, out, description)
    print(f'Wrote {out} ({out.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s)')
    print(f'  input  {description["input"]}\n  output {args.output}')

    print('Compared with PyTorch:')
    shapes = [(1, model.channels, *size)]
    if not args.static:  # a second size that the patches do not tile, larger and smaller than both
        other = size[0] * 5 // 4 + 1, max(size[1] * 3 // 4 - 1, 16)
        shapes.append((3, model.channels, *other))
    worst = check(model, load(out, output_format), shapes)
    if not worst <= args.tolerance:
        raise UserError(
            f'{out} differs from PyTorch by {worst:.1e}, more than --tolerance {args.tolerance:g}'
        )


if __name__ == '__main__':
    run(main)
