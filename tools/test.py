# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Evaluate a checkpoint of a segmentor, classifier or detector.

python tools/test.py configs/upernet_vil_t_ade20k.py work_dirs/upernet_vil_t_ade20k/iter_160000.pth
"""

import copy
import os
from collections import Counter
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.fileio import dump

from mmvil.cli.config import (
    as_list,
    default_hook,
    dicts,
    innermost_datasets,
    read_runner_config,
    require,
)
from mmvil.cli.errors import UserError
from mmvil.cli.inference import ImageReader, loads
from mmvil.cli.main import add_runner_arguments, at_least, make_parser, parse_args, run
from mmvil.cli.preflight import (
    CheckFitHook,
    build_loops,
    build_runner,
    check_testing,
    check_writable,
)


def main():
    args = parse_args(make_test_parser())
    cfg = read_config(args)
    check_testing(cfg)
    if args.check:
        print('Config, data and checkpoints are in place.')
        return

    runner = build_runner(cfg)
    runner.register_hook(CheckFitHook())
    build_loops(runner, 'test')
    if any(getattr(metric, 'output_dir', None) for metric in runner.test_loop.evaluator.metrics):
        check_names(runner.test_dataloader.dataset)
    metrics = runner.test()
    if args.out and args.out_item == 'metrics' and is_main_process():
        dump(metrics, args.out)


def make_test_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_runner_arguments(parser)
    add('checkpoint', help='checkpoint file')
    out = 'label maps of a segmentor (folder), results of a classifier (.pkl, .json)'
    add('--out', help=f'{out} or detector (prefix of .json files)')
    item = 'write predictions or metrics (.json, .yaml, .pkl) to --out (default: pred)'
    add('--out-item', choices=['pred', 'metrics'], default='pred', help=item)
    add('--dump', metavar='PKL', help='write all predictions to a pickle file')
    add('--tta', action='store_true', help='multi-scale and flip, or flip only')
    types = dict(choices=['float32', 'float16', 'bfloat16'], default='float32')
    add('--precision', help='default: float32; on a CPU, half precision is bfloat16', **types)
    add('--amp', action='store_true', help='same as --precision float16')
    add('--show', action='store_true', help='show the predictions in a window')
    pictures = 'folder for pictures; for segmentors and detectors, in its vis_data/vis_image'
    add('--show-dir', help=pictures)
    every = 'draw only every n-th image; onedl-mmsegmentation draws all'
    add('--interval', type=at_least(1), default=1, help=every)
    seconds = dict(type=at_least(0, float), default=2, metavar='SECONDS')
    add('--wait-time', help='how long --show shows a picture', **seconds)
    return parser


def read_config(args):
    """Read the config and apply the command line."""
    cfg = read_runner_config(args)
    require(cfg, 'test_dataloader', 'test_evaluator', 'test_cfg')
    cfg.load_from, cfg.resume = args.checkpoint, False  # a resumed training has dumped True
    is_classifier = cfg.model.type.endswith('Classifier')
    precision = 'float16' if args.amp else args.precision
    if precision != 'float32':
        if cfg.default_scope == 'mmdet' and (precision == 'bfloat16' or get_device() == 'cpu'):
            raise UserError('mmdet cannot evaluate detections in bfloat16; use float32')
        cfg.test_cfg.fp16 = True  # mmengine's name for autocast in PyTorch's default dtype
        torch.set_autocast_gpu_dtype(getattr(torch, precision))
    if args.show or args.show_dir is not None:
        draw(cfg, args, is_classifier)
    if args.tta:
        use_tta(cfg, is_classifier)

    evaluators, dumps = as_list(cfg.test_evaluator), [args.dump]
    if args.out_item == 'metrics' and not args.out:
        raise UserError('--out-item metrics needs a file: --out metrics.json')
    if args.out and args.out_item == 'metrics':
        check_file('metrics are', args.out, '.json', '.yaml', '.yml', '.pkl', '.pickle')
    elif args.out and is_classifier:
        dumps.append(args.out)
    elif args.out:
        if os.path.isfile(args.out):
            raise UserError(f'label maps are written to a folder, but {args.out} is a file')
        for evaluator in evaluators:
            if evaluator.type.endswith('CocoMetric'):
                check_writable(Path(args.out).parent)
                evaluator.outfile_prefix = args.out
            else:
                check_writable(args.out)
                evaluator.update(output_dir=args.out, keep_results=True)
    for path in filter(None, dumps):
        check_file('predictions are', path, '.pkl', '.pickle')
        evaluators.append(dict(type='DumpResults', out_file_path=path))
    cfg.test_evaluator = evaluators
    # mmengine writes the config into the work dir, over that of the training if it has its name.
    path = Path(cfg.filename)
    path = path.with_stem(f'{path.stem.removesuffix("_test")}_test')
    return Config(cfg.to_dict(), cfg.text, path, cfg.env_variables)


def check_file(what, path, *suffixes):
    """Reject files before testing that could not be written afterwards."""
    if Path(path).suffix not in suffixes:
        raise UserError(f'{what} written to a {suffixes[0]} file, but {path} was asked for')
    check_writable(Path(path).parent)


def check_names(dataset):
    """Reject images whose label maps mmseg would write to the same file, named after the image."""
    paths = (dataset.get_data_info(index)['img_path'] for index in range(len(dataset)))
    for name, number in Counter(Path(path).stem for path in paths).items():
        if number > 1:
            raise UserError(
                f'--out would write {number} label maps to {name}.png, because the images of '
                'several folders have the same names; --dump writes all predictions to one file'
            )


def draw(cfg, args, is_classifier):
    """Draw predictions with the library's hook."""
    hook = default_hook(cfg, 'visualization')
    if not hook:
        raise UserError('--show and --show-dir need default_hooks.visualization in the config')
    if not ImageReader(cfg).bgr:  # the hooks read files with OpenCV
        raise UserError(
            '--show and --show-dir draw photographs only; tools/demo.py and '
            'tools/visualization/plot_predictions.py also draw these images'
        )
    if args.show_dir is not None:
        check_writable(args.show_dir)
    hook.update(show=args.show, wait_time=args.wait_time, interval=args.interval)
    if is_classifier:
        if args.tta:
            raise UserError('--tta and --show-dir cannot be combined for classifiers')
        hook.update(enable=True, out_dir=args.show_dir)
    else:
        hook.draw = True
        if args.show_dir is not None:
            cfg.visualizer.save_dir = os.path.abspath(args.show_dir)


def use_tta(cfg, is_classifier):
    """Test each image several times: according to tta_pipeline, or flipped and not flipped."""
    is_described = 'tta_pipeline' in cfg and 'tta_model' in cfg
    if not is_described and not is_classifier:
        raise UserError('--tta needs tta_pipeline and tta_model in the config')
    hook = default_hook(cfg, 'visualization')
    if hook and is_classifier:
        hook.enable = False  # it cannot draw several views
    for dataset in innermost_datasets(cfg.test_dataloader.dataset):
        *pipeline, pack = dataset.pipeline
        flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
        flipped = [*pipeline, dict(type='TestTimeAug', transforms=[flips, [pack]])]
        dataset.pipeline = load_alike(cfg.tta_pipeline, dataset) if is_described else flipped
    tta_model = cfg.tta_model if is_described else dict(type='mmpretrain.AverageClsScoreTTA')
    tta_model = dict(**tta_model, module=cfg.model)
    if 'data_preprocessor' in cfg.model:  # else that of the config, if any, would replace it
        tta_model['data_preprocessor'] = cfg.model.data_preprocessor
    cfg.model = tta_model


def load_alike(tta_pipeline, dataset):
    """Copy a pipeline, with the loaders of a dataset: a config that changes how its images and
    masks are read seldom repeats it here.
    """
    tta_pipeline = copy.deepcopy(tta_pipeline)
    for what in ('image', 'annotation'):
        steps = [step for step in dataset.pipeline if loads(step, what)]
        for step in dicts(tta_pipeline) if len(steps) == 1 else ():
            if loads(step, what):
                step.clear()
                step.update(steps[0])
    return tta_pipeline


if __name__ == '__main__':
    run(main)
