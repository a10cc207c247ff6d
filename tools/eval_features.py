# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Evaluate frozen features with k-nearest neighbours and a linear probe, on any image folder.

python tools/eval_features.py configs/vil_t_imagenet.py vil2_tiny16_e800_in1k.th --data-root flowers

The data root contains train/CLASS/IMAGE and val/CLASS/IMAGE. Features are the input of the
classifier's linear layer; images pass through the config's test pipeline.
"""

import os
from pathlib import Path

import torch
from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from rich.progress import track

from mmvil.apis.feature_probes import accuracy, knn, linear_probe
from mmvil.apis.vtab1k import identify
from mmvil.cli.config import load_config
from mmvil.cli.errors import UserError
from mmvil.cli.main import add_run_arguments, at_least, make_parser, parse_args, run
from mmvil.cli.preflight import check_checkpoint, check_writable, data_preprocessor


def main():
    args = parse_args(make_eval_parser())
    if args.data_root is None:
        raise UserError('specify the folder with train/CLASS and val/CLASS with --data-root')
    features = get_features(args)
    if args.check:
        print('Config, data and checkpoint are in place.')
        return
    (train, train_labels), (val, val_labels) = (
        (tensor.to(get_device()) for tensor in features[split]) for split in ('train', 'val')
    )
    if args.k > len(train):
        raise UserError(f'--k {args.k} is more than the {len(train)} training images')

    print(f'{len(train)} training and {len(val)} validation images, {train.shape[1]} features')
    for name, temperature in (('weighted', args.temperature), ('plain', None)):
        found = knn(train, train_labels, val, args.k, temperature)
        print(f'{args.k}-NN, {name}: {accuracy(found, val_labels):.2f} %')
    found, penalty = linear_probe(train, train_labels, val)
    print(f'linear probe: {accuracy(found, val_labels):.2f} % (penalty {penalty:g})')


def make_eval_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_run_arguments(parser)
    add('checkpoint', help="weights: mmvil's or the authors'")
    add('--k', type=at_least(1), default=20, help='number of neighbours (default: 20)')
    weight = 'neighbours have the weight exp(cosine / temperature) (default: 0.07)'
    add('--temperature', type=at_least(1e-6, float), default=0.07, help=weight)
    add('--batch-size', type=at_least(1), default=128, help='images per batch')
    add('--workers', type=at_least(0), default=8, help='processes that read images')
    add('--amp', action='store_true', help='extract features in mixed precision')
    add('--features', metavar='FILE.pt', help='file to save features to, or to load them from')
    return parser


def get_features(args):
    """Get features and labels of both splits, from the file of --features or from images."""
    check_checkpoint(args.checkpoint)
    source = dict(
        config=os.path.abspath(args.config),
        data_root=os.path.abspath(args.data_root),
        cfg_options=str(args.cfg_options),
        backbone=args.backbone,
        amp=args.amp,
        **identify(args.checkpoint),
    )
    if args.features and os.path.exists(args.features):
        return read_features(args.features, source)
    cfg = load_config(args.config, args.cfg_options, args.backbone)
    if cfg.get('default_scope') != 'mmpretrain' or cfg.get('test_dataloader') is None:
        raise UserError(f'{args.config} is not of a classifier; its test pipeline prepares images')
    init_default_scope(cfg.default_scope)
    loaders = {split: make_dataloader(cfg, args, split) for split in ('train', 'val')}
    train, val = (loader.dataset.CLASSES for loader in loaders.values())
    if train != val:
        odd = sorted(set(train) ^ set(val))
        raise UserError(f'train and val have different classes, such as {odd[0]}')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=args.checkpoint)
    backbone = MODELS.build(cfg.model.backbone)
    backbone.init_weights()
    kind = dict(type='mmpretrain.ClsDataPreprocessor')
    preprocessor = MODELS.build({**kind, **data_preprocessor(cfg)})
    if args.features:
        check_writable(Path(args.features).parent)
    if args.check:
        return None
    if args.features:
        Path(args.features).parent.mkdir(parents=True, exist_ok=True)
    parts = [part.to(get_device()).eval() for part in (backbone, preprocessor)]
    features = {split: extract(*parts, loader, args.amp) for split, loader in loaders.items()}
    features['source'] = source
    if args.features:
        torch.save(features, args.features)
    return features


def read_features(path, source):
    """Read the file of --features, and check that it was made from the same source."""
    try:
        features = torch.load(path, weights_only=True)
        stored = features['source']
    except Exception:  # torch raises anything
        raise UserError(f'{path} was not written by --features. Name another file.') from None
    if stored != source:
        raise UserError(f'{path} was made from {stored}. Name another file, or remove it.')
    return features


def make_dataloader(cfg, args, split):
    folder = Path(args.data_root, split)
    if not folder.is_dir() or not any(path.is_dir() for path in folder.iterdir()):
        raise UserError(f'data not found: expected {folder.absolute()}/CLASS/IMAGE')
    dataset = dict(type='CustomDataset', data_root=args.data_root, data_prefix=split)
    loader = dict(
        dataset=dict(dataset, pipeline=cfg.test_dataloader.dataset.pipeline),
        batch_size=args.batch_size,
        num_workers=args.workers,
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    return Runner.build_dataloader(loader)


@torch.no_grad()
def extract(backbone, preprocessor, dataloader, amp):
    """Extract features (images, channels) in float32 and labels (images,)."""
    device = get_device().split(':')[0]
    features, labels = [], []
    for batch in track(dataloader, f'{len(dataloader.dataset)} images', transient=True):
        batch = preprocessor(batch)
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            output = backbone(batch['inputs'])[-1]
        if output.dim() == 4:  # feature maps of a backbone without pooling
            output = output.mean((2, 3))
        features.append(output.float().cpu())
        labels += [sample.gt_label.item() for sample in batch['data_samples']]
    return torch.cat(features), torch.tensor(labels)


if __name__ == '__main__':
    run(main)
