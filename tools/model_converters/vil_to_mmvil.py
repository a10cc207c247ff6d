# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Convert an official Vision-LSTM checkpoint to one that mmpretrain loads.

python tools/model_converters/vil_to_mmvil.py vil2_tiny16_e800_in1k.th vil2_tiny16.pth --check
"""

import os
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmvil.apis import convert_checkpoint, fetch_checkpoint
from mmvil.cli.errors import UserError
from mmvil.cli.main import make_parser, parse_args, run


def make_converter_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('src', help='official file, or mmvil://NAME to download it')
    add('dst', type=Path, help='file to write')
    default = 'from the file or its name, else the patch size'
    add('--stride', type=int, help=f'pixels between patches; weights lack it (default: {default})')
    add('--check', action='store_true', help='build the model, load it strictly and run it')
    add('--force', action='store_true', help='replace DST if it exists')
    return parser


def describe(meta: dict) -> str:
    """Architecture and origin of a converted checkpoint."""
    found = meta['architecture']
    stride = f'stride {found["stride"]} ({found["stride_from"]})'
    return (
        f'ViL version {found["version"]}, {found["depth"]} blocks, {found["embed_dims"]} wide, '
        f'{found["num_heads"]} heads, patch size {found["patch_size"]}, {stride}, '
        f'image size {"x".join(map(str, found["img_size"]))}, {found["num_classes"]} classes\n'
        f'SHA-256 of {meta["source"]}: {meta["source_sha256"]}'
    )


def check(path: Path) -> str:
    """Build the model that a converted file describes, load it strictly and run it."""
    init_default_scope('mmpretrain')
    from mmpretrain.registry import MODELS

    checkpoint = torch.load(path, map_location='cpu', weights_only=True)
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
    if not target.absolute().parent.is_dir():
        raise UserError(f'there is no folder {target.absolute().parent}')
    source = fetch_checkpoint(args.src) if '://' in args.src else args.src
    checkpoint = convert_checkpoint(source, args.stride)
    print(describe(checkpoint['meta']))

    # Written elsewhere first: DST is never half a file, nor one that failed its check.
    unfinished = target.with_name(f'.{target.name}.{os.getpid()}')
    try:
        torch.save(checkpoint, unfinished)
        if args.check:
            print(check(unfinished))
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f'Wrote {target}.')


if __name__ == '__main__':
    run(main)
