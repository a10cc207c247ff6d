# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Try ViL in the configs of the installed OpenMMLab libraries, and write a table of results.

python tools/.dev_scripts/swap_matrix.py --out docs/swap_matrix.md
python tools/.dev_scripts/swap_matrix.py --libraries mmseg --only pspnet --out docs/swap_matrix.md

In each folder of configs, every combination of backbone, neck and head is tried once, as
docs/swap_backbone.md says. Lines of a file that are not tried again stay.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import logging
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

from mmvil import swap_backbone
from mmvil.cli.config import configs_of, dicts
from mmvil.cli.errors import one_line
from mmvil.cli.main import run

LIBRARIES = ('mmseg', 'mmpretrain', 'mmdet')
ARCH = dict(embed_dims=32, depth=10)
SIDES = (64, 512)  # of the images: some heads pool over windows that are larger than small maps

# Folders of mmpretrain and mmdet that stand for the others: classifiers by their kind of features,
# linear probes, self-supervised frameworks with and without masks, other tasks; detectors.
CHOSEN = dict(
    mmpretrain=(
        'resnet vgg mobilenet_v3 hrnet swin_transformer convnext vision_transformer deit levit '
        'efficientformer poolformer mlp_mixer conformer csra arcface barlowtwins byol densecl '
        'mocov2 mocov3 simclr simsiam swav beit beitv2 cae mae maskfeat milan mixmim simmim spark '
        'eva itpn clip blip'
    ).split(),
    mmdet=(
        'faster_rcnn mask_rcnn cascade_rcnn retinanet fcos atss detr deformable_detr dino '
        'mask2former ssd yolox rtmdet centernet'
    ).split(),
)

HEADER = """\
# Where ViL fits: the configs of OpenMMLab

Written by `tools/.dev_scripts/swap_matrix.py`; do not edit. The verdicts and how to swap:
[swap_backbone.md](swap_backbone.md).

Versions: {versions}.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--libraries', nargs='+', choices=LIBRARIES, default=LIBRARIES)
    add('--only', nargs='+', default=[''], help='parts of the paths of the configs to try')
    add('--out', type=Path, help='Markdown file (default: print)')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    MMLogger.get_instance('mmengine').setLevel(logging.ERROR)

    outcomes = read_table(args.out)
    for library in args.libraries:
        if importlib.util.find_spec(library) is None:
            print(f'{library} is not installed and left out', file=sys.stderr)
            continue
        cases = find_cases(library, args.only)
        for number, (path, parts) in enumerate(cases.items(), start=1):
            verdict, remarks = try_config(configs_of(library) / path)
            outcomes.setdefault(library, {})[path] = (parts, verdict, remarks)
            progress = f'[{number}/{len(cases)}] {path}: {verdict}'
            print(f'{progress} ({remarks})' if remarks else progress, file=sys.stderr, flush=True)
            if args.out:
                args.out.write_text(format_table(outcomes))
    if not args.out:
        print(format_table(outcomes))


# -- Cases: one config of each combination ---------------------------------------------------------


def find_cases(library, only):
    """Choose one config of each combination: its parts, 'backbone → neck → heads', by its path."""
    root = configs_of(library)
    cases = {}
    # The shortest names stand for the plainest configs.
    for path in sorted(root.glob('*/**/*.py'), key=lambda path: (len(str(path)), path.name)):
        folder = path.relative_to(root).parts[0]
        if folder not in CHOSEN.get(library, [folder]) or folder.startswith('_'):
            continue
        if 'levir' in path.name:  # pairs of images, which mmseg's own preprocessor refuses
            continue
        try:
            cfg = Config.fromfile(path)
        except Exception:  # it needs a library that is not installed
            cases.setdefault((folder,), path)
            continue
        if cfg.get('model') and 'train_dataloader' in cfg:  # not a part, nor for testing only
            cases.setdefault((folder, *parts_of(cfg.model, library)), path)
    cases = {str(path.relative_to(root)): parts for (_, *parts), path in cases.items()}
    return {
        path: ' → '.join(filter(None, parts))
        for path, parts in sorted(cases.items())
        if any(part in path for part in only)
    }


def parts_of(model, library):
    """Backbone, neck, and heads or the whole model where it is more than a head on a backbone."""
    kind = str(model.get('type'))
    heads = [model[key] for key in model if key in ('decode_head', 'head')]
    is_plain = kind.endswith(('EncoderDecoder', 'ImageClassifier')) and library != 'mmdet'
    if not (heads and is_plain and model.get('backbone')):
        heads = [dict(type=kind)]
    return [type_names(part) for part in (model.get('backbone'), model.get('neck'), heads)]


def type_names(node):
    if isinstance(node, (list, tuple)):
        return '+'.join(map(type_names, node))
    kind = (node or {}).get('type', '')
    return kind if isinstance(kind, str) else kind.__name__


# -- One case --------------------------------------------------------------------------------------


def try_config(path):
    """Swap the backbone of a config, train a step, predict; return the verdict, 'works', 'cannot',
    'untested' or 'fails' (which is a bug), and remarks.
    """
    torch.manual_seed(0)
    try:
        cfg = swap_backbone(path, arch=ARCH)
    except ValueError as error:
        return 'cannot', ' '.join(str(error).split())
    except ImportError as error:
        return 'cannot', f'it needs what is not installed: {error}'
    try:
        model = train_and_predict(cfg)
    except Exception as error:
        try:
            train_and_predict(Config.fromfile(path))
        except Exception as old:
            return 'untested', f'this check fails with its own backbone, too: {one_line(old)[:200]}'
        return 'fails', one_line(error)[:200]

    kept = cfg.model.backbone.get('pyramid', {}).get('out_channels')
    remarks = [f'keeps {kept}'] if kept else []
    homes = {type(module).__module__ for module in model.modules()}
    if any(home.startswith('mmdet.') for home in homes) and cfg.default_scope != 'mmdet':
        remarks.append('needs mmdet')
    used = (value for home in homes for value in vars(sys.modules[home]).values())
    if any(str(getattr(value, '__module__', '')).startswith('mmcv.ops.') for value in used):
        remarks.append("needs mmcv's compiled ops")
    return 'works', '; '.join(remarks)


def train_and_predict(cfg):
    """Run a training step and a prediction on images that are large enough; return the model."""
    for side in SIDES:
        try:
            model = build_small(copy.deepcopy(cfg), side)
            train_step(model, cfg, side)
            if cfg.default_scope != 'mmpretrain' or cfg.model.type.endswith('Classifier'):
                with torch.no_grad():  # self-supervised frameworks only train
                    model.eval().test_step(make_batch(cfg, side))
            return model
        except Exception:
            if side == SIDES[-1]:
                raise


def build_small(cfg, side):
    """Build the model for tiny images, on the CPU."""
    backbone = cfg.model.backbone
    if 'img_size' in backbone:
        backbone.img_size = side
    if cfg.default_scope == 'mmseg':  # images are padded to the size of the crops
        cfg.model.data_preprocessor.size = (side, side)
    if cfg.default_scope == 'mmpretrain' and 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    for node in dicts(cfg.model):  # pre-trained weights of frozen parts of a head, say
        if type_names(node.get('init_cfg')) == 'Pretrained':
            node['init_cfg'] = None
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    return model


def train_step(model, cfg, side):
    data = model.train().data_preprocessor(make_batch(cfg, side), training=True)
    total, _ = model.parse_losses(model(**data, mode='loss'))
    if not torch.isfinite(total):
        raise ValueError(f'the loss is {total.item()}')
    total.backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if lacking:
        names = ', '.join(lacking[:3])
        raise ValueError(f'no gradient for {names} ({len(lacking)} parameters)')


def make_batch(cfg, side):
    """Two images with labels as the data loader of a library gives them."""
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        with_mask = 'mask' in str(cfg.model).lower()
        return demo_mm_inputs(image_shapes=(3, side, side), num_classes=2, with_mask=with_mask)
    channels = cfg.model.backbone.get('in_channels', 3)
    images = [torch.randint(256, (channels, side, side), dtype=torch.uint8) for _ in range(2)]
    make_sample = seg_sample if cfg.default_scope == 'mmseg' else cls_sample
    samples = [make_sample(cfg.model, side) for _ in images]
    multiview = [n for n in dicts(cfg.train_dataloader) if n.get('type') == 'MultiView']
    if multiview:  # self-supervised pipelines
        views = multiview[0]['num_views']
        views = sum(views) if isinstance(views, (list, tuple)) else views
        images = [torch.stack(images) for _ in range(views)]
    elif cfg.model.type == 'SimMIM':
        images = torch.stack(images)
    return dict(inputs=images, data_samples=samples)


def seg_sample(model, side):
    from mmseg.structures import SegDataSample

    classes = next(node['num_classes'] for node in dicts(model) if node.get('num_classes'))
    labels = torch.randint(classes, (1, side, side))
    shapes = dict.fromkeys(
        ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), (side, side)
    )
    return SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=shapes)


def cls_sample(model, side):
    from mmpretrain.structures import DataSample

    sample = DataSample().set_gt_label(1)
    head = model.get('head')
    if model.type == 'SimMIM':
        sample.mask = torch.eye(side // head.patch_size)
    if type_names(head).startswith(('MultiLabel', 'CSRA')):
        sample.set_gt_score(torch.eye(head.num_classes)[1])
    return sample


# -- The table -------------------------------------------------------------------------------------


def read_table(path):
    """Read (parts, verdict, remarks) by library and path of the config, if the file exists."""
    outcomes = {}
    for line in path.read_text().splitlines() if path and path.exists() else []:
        if line.startswith('## '):
            rows = outcomes.setdefault(line.split()[1].strip(':'), {})
        elif line.startswith('| `'):
            config, *cells = (cell.strip() for cell in line.strip('|').split('|'))
            rows[config.strip('`')] = tuple(cells)
    return outcomes


def format_table(outcomes):
    installed = importlib.metadata.packages_distributions()
    names = [installed[m][0] for m in (*outcomes, 'mmcv', 'mmengine', 'torch') if m in installed]
    versions = [f'{name} {importlib.metadata.version(name)}' for name in names]
    lines = [HEADER.format(versions=', '.join(versions))]
    for library, rows in outcomes.items():
        counts = Counter(verdict for _, verdict, _ in rows.values()).most_common()
        lines += [f'## {library}: ' + ', '.join(f'{n} {verdict}' for verdict, n in counts), '']
        lines += ['| config | old backbone → neck → head | ViL | |', '|---|---|---|---|']
        lines += [f'| `{path}` | {" | ".join(cells)} |' for path, cells in sorted(rows.items())]
        lines.append('')
    return '\n'.join(lines)


if __name__ == '__main__':
    run(main)
