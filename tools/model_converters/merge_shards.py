# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Merge the shards of an FSDP or DeepSpeed checkpoint into one file.

python tools/model_converters/merge_shards.py work_dirs/vil_b/iter_160000.pth vil_b.pth
"""

from pathlib import Path

from mmvil.apis.merge import merge_shards
from mmvil.cli.errors import UserError
from mmvil.cli.main import make_parser, parse_args, run


def make_merge_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('src', type=Path, help='checkpoint folder, such as iter_160000.pth')
    add('dst', type=Path, help='file to write')
    add('--force', action='store_true', help='replace DST if it exists')
    return parser


def main():
    args = parse_args(make_merge_parser())
    if args.dst.exists() and not args.force:
        raise UserError(f'{args.dst} exists; --force replaces it')
    number = merge_shards(args.src, args.dst)
    print(f'Wrote {args.dst} with {number} tensors.')


if __name__ == '__main__':
    run(main)
