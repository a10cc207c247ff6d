# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Convert an official Vision-LSTM checkpoint for mmpretrain.

python tools/model_converters/vil_to_mmvil.py vil2_tiny16_e800_in1k.th vil2_tiny16.pth --check
"""

from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import save_checkpoint

from mmvil.apis import convert_checkpoint, fetch_checkpoint
from mmvil.cli.errors import UserError
from mmvil.cli.main import at_least, make_parser, parse_args, run
from mmvil.cli.work_dir import ATOMIC


def make_converter_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('src', help='official file, or mmvil://NAME to download it')
    add('dst', type=Path, help='file to write')
    default = 'from the file or its name, otherwise the patch size'
    add('--stride', type=at_least(1), help=f'step between patches in pixels (default: {default})')
    add('--check', action='store_true', help='build the model, load it strictly and run it')
    add('--force', action='store_true', help='replace DST if it exists')
    return parser


def describe(meta: dict) -> str:
    """Describe architecture and origin of a converted checkpoint."""
    size = 'x'.join(map(str, meta['architecture']['img_size']))
    return (
        'ViL version {version}, {depth} blocks, {embed_dims} wide, {num_heads} heads, patch size '
        '{patch_size}, stride {stride} ({stride_from}), image size {size}, {num_classes} classes\n'
        'SHA-256 of {source}: {source_sha256}'
    ).format(size=size, **meta, **meta['architecture'])


def check(checkpoint: dict) -> str:
    """Build the model of a converted checkpoint, load it strictly and run it."""
    init_default_scope('mmpretrain')
    cfg = Config.fromstring(checkpoint['meta']['cfg'], '.py')
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    found = checkpoint['meta']['architecture']
    images = torch.randn(1, found['in_channels'], *found['img_size'])
    with torch.no_grad():
        logits = model(images)
    if logits.shape != (1, found['num_classes']) or not logits.isfinite().all():
        raise UserError(f'the converted model gives no finite logits: shape {tuple(logits.shape)}')
    count = sum(parameter.numel() for parameter in model.parameters())
    return f'Checked: {count:,} parameters load strictly, and the model gives finite logits.'


def main():
    args = parse_args(make_converter_parser())
    target = args.dst
    if target.exists() and not args.force:
        raise UserError(f'{target} exists; --force replaces it')
    source = fetch_checkpoint(args.src) if '://' in args.src else args.src
    checkpoint = convert_checkpoint(source, args.stride)
    print(describe(checkpoint['meta']))

    if args.check:
        print(check(checkpoint))
    save_checkpoint(checkpoint, str(target), backend_args=ATOMIC)  # DST is never incomplete
    print(f'Wrote {target}.')


if __name__ == '__main__':
    run(main)
