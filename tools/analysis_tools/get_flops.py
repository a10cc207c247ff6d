# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Count the parameters and multiply-adds of a config's model.

python tools/analysis_tools/get_flops.py configs/upernet_vil_t_ade20k.py --shape 512 683
python tools/analysis_tools/get_flops.py configs/vil_t_imagenet.py --sizes 224 512 1024 2048

The model runs on the meta device, so any size takes seconds and no memory.
"""

import json

from mmengine.fileio import put_text
from mmengine.registry import init_default_scope

from mmvil.apis.flop_count import count_multiply_adds, count_parameters
from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError, as_user_error
from mmvil.cli.inference import build_untrained
from mmvil.cli.main import add_config_arguments, at_least, make_parser, parse_args, run

NOTE = """\
Multiply-adds (MACs), which papers call FLOPs, of one image in inference; matrix products and
convolutions only.
  needed    by the model's equations; counted so, ViL-T/S/B at 224 x 224 have the
            published 1.5/5.1/18.6 G
  executed  by PyTorch, which also multiplies zeros between small diagonal blocks and masked
            pairs of tokens"""


def build_model(cfg):
    """Build the model of a config on the meta device."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    return build_untrained(cfg.model).eval().to('meta')


def make_flops_parser():
    parser = make_parser(__doc__, whole=True)
    add_config_arguments(parser, backbone=True)
    sizes = parser.add_mutually_exclusive_group()
    some = dict(type=at_least(1), nargs='+', metavar='PIXELS')
    shape = "height and width, or one number for both (default: the backbone's img_size, or 224)"
    sizes.add_argument('--shape', help=shape, **some)
    sizes.add_argument('--sizes', help='sizes of square images, to show the growth', **some)
    parser.add_argument('--json', metavar='FILE', help='also write the numbers to a file')
    return parser


def image_sizes(args, cfg):
    """Pairs of height and width."""
    if args.sizes:
        return [(size, size) for size in args.sizes]
    shape = args.shape or cfg.model.backbone.get('img_size', 224)
    shape = [shape] if isinstance(shape, int) else list(shape)
    if len(shape) > 2:
        raise UserError(f'--shape takes height and width, not {len(shape)} numbers')
    return [(shape[0], shape[-1])]


def giga(count):
    return f'{count / 1e9:.2f} G' if count >= 5e6 else f'{count / 1e9:.4f} G' if count else '-'


def print_parts(parameters, count):
    print(f'{"":16}{"parameters":>12}{"needed":>12}{"executed":>12}')
    for name in parameters:
        needed, executed = (giga(count[key][name]) for key in ('needed', 'executed'))
        print(f'{name:16}{parameters[name] / 1e6:>10.2f} M{needed:>12}{executed:>12}')


def print_growth(counts):
    print(f'{"image":>14}{"needed":>12}{"executed":>12}{"executed per 16 x 16 pixels":>30}')
    for count in counts:
        height, width = count['shape']
        needed, executed = count['needed']['total'], count['executed']['total']
        per_patch = f'{executed / (height * width / 256) / 1e6:.2f} M'
        print(f'{f"{height} x {width}":>14}{giga(needed):>12}{giga(executed):>12}{per_patch:>30}')


def main():
    args = parse_args(make_flops_parser())
    cfg = load_config(args.config, args.cfg_options, args.backbone)
    sizes = image_sizes(args, cfg)
    model = build_model(cfg)
    parameters = count_parameters(model)
    channels = cfg.model.backbone.get('in_channels', 3)
    counts = []
    for size in sizes:
        with as_user_error('cannot run the model on the shapes of images alone'):
            needed, executed = (
                count_multiply_adds(model, (1, channels, *size), needed) for needed in (True, False)
            )
        counts.append(dict(shape=size, needed=needed, executed=executed))

    print(f'{args.config}, {parameters["total"]:,} parameters')
    if args.sizes:
        print_growth(counts)
    else:
        print(f'image of {sizes[0][0]} x {sizes[0][1]} pixels (height x width)')
        print_parts(parameters, counts[0])
    print(NOTE)
    if args.json:
        report = dict(config=args.config, parameters=parameters, multiply_adds=counts)
        put_text(json.dumps(report, indent=2) + '\n', args.json)


if __name__ == '__main__':
    run(main)
