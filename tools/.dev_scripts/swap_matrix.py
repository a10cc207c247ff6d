# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Try ViL in the configs of the installed OpenMMLab libraries, and write a table of results.

python tools/.dev_scripts/swap_matrix.py --out docs/swap_matrix.md
python tools/.dev_scripts/swap_matrix.py --libraries mmseg --only pspnet --out docs/swap_matrix.md

In each config folder, every combination of backbone, neck and head is tried once, as described in
docs/swap_backbone.md. Rows of an existing file that are not tried again are kept.
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
from mmengine.logging import MMLogger

from mmvil import swap_backbone
from mmvil.apis.read_config import config_dir, read_config
from mmvil.apis.training_memory import build_training_model, random_batch
from mmvil.cli.config import dicts
from mmvil.cli.errors import one_line
from mmvil.cli.main import run

LIBRARIES = ('mmseg', 'mmpretrain', 'mmdet')
ARCH = dict(embed_dims=32, depth=10)
SIDES = (64, 512)  # of images: some heads pool over windows larger than small maps

# Representative folders of mmpretrain and mmdet: classifiers by kind of features, linear probes,
# self-supervised frameworks with and without masks, other tasks; detectors.
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
    add('--only', nargs='+', default=[''], help='substrings of the config paths to try')
    add('--out', type=Path, help='Markdown file (default: print)')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    MMLogger.get_instance('mmengine').setLevel(logging.ERROR)

    outcomes = read_table(args.out)
    for library in args.libraries:
        if importlib.util.find_spec(library) is None:
            print(f'{library} is not installed: skipped', file=sys.stderr)
            continue
        cases = find_cases(library, args.only)
        for number, (path, parts) in enumerate(cases.items(), start=1):
            verdict, remarks = try_config(config_dir(library) / path)
            outcomes.setdefault(library, {})[path] = (parts, verdict, remarks)
            progress = f'[{number}/{len(cases)}] {path}: {verdict}'
            print(f'{progress} ({remarks})' if remarks else progress, file=sys.stderr, flush=True)
            if args.out:
                args.out.write_text(format_table(outcomes))
    if not args.out:
        print(format_table(outcomes))


# -- Cases: one config of each combination ---------------------------------------------------------


def find_cases(library, only):
    """Choose one config per combination: its path and its parts, 'backbone → neck → heads'."""
    root = config_dir(library)
    cases = {}
    # The shortest names are the plainest configs.
    for path in sorted(root.glob('*/**/*.py'), key=lambda path: (len(str(path)), path.name)):
        folder = path.relative_to(root).parts[0]
        if folder not in CHOSEN.get(library, [folder]) or folder.startswith('_'):
            continue
        if 'levir' in path.name:  # pairs of images, unlike random batches
            continue
        try:
            cfg = read_config(path)
        except Exception:  # needs a library that is not installed
            cases.setdefault((folder,), path)
            continue
        if cfg.get('model') and 'train_dataloader' in cfg:  # not a base or test-only config
            cases.setdefault((folder, *parts_of(cfg.model, library)), path)
    cases = {str(path.relative_to(root)): parts for (_, *parts), path in cases.items()}
    return {
        path: ' → '.join(filter(None, parts))
        for path, parts in sorted(cases.items())
        if any(part in path for part in only)
    }


def parts_of(model, library):
    """Backbone, neck and heads, or the whole model if it is more than a head on a backbone."""
    kind = str(model.get('type'))
    heads = [model[key] for key in model if key in ('decode_head', 'head')]
    is_plain = kind.endswith(('EncoderDecoder', 'ImageClassifier')) and library != 'mmdet'
    if not (heads and is_plain and model.get('backbone')):
        heads = [dict(type=kind)]
    return [type_names(part) for part in (model.get('backbone'), model.get('neck'), heads)]


def type_names(node):
    if isinstance(node, (list, tuple)):
        return '+'.join(map(type_names, node))
    return (node or {}).get('type', '')


# -- One case --------------------------------------------------------------------------------------


def try_config(path):
    """Swap the backbone of a config, run a training step and predict. Return the verdict, 'works',
    'cannot', 'untested' or 'fails' (a bug), and remarks.
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
            train_and_predict(read_config(path))
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
    """Run a training step and a prediction on large enough images, and return the model."""
    for side in SIDES:
        try:
            return train_and_predict_at(copy.deepcopy(cfg), side)
        except Exception:
            if side == SIDES[-1]:
                raise


def train_and_predict_at(cfg, side):
    if 'img_size' in cfg.model.backbone:
        cfg.model.backbone.img_size = side
    for node in dicts(cfg.model):  # such as pre-trained weights of frozen parts of a head
        if type_names(node.get('init_cfg')) == 'Pretrained':
            node['init_cfg'] = None
    model = build_training_model(cfg)
    model.init_weights()
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        with_mask = 'mask' in str(cfg.model).lower()
        images = demo_mm_inputs(image_shapes=(3, side, side), num_classes=2, with_mask=with_mask)
        batch = model.data_preprocessor(images, training=True).values()
    else:
        batch = random_batch(cfg, 2, size=(side, side))
    total, _ = model.parse_losses(model.loss(*batch))
    if not torch.isfinite(total):
        raise ValueError(f'the loss is {total.item()}')
    total.backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if lacking:
        names = ', '.join(lacking[:3])
        raise ValueError(f'no gradient for {names} ({len(lacking)} parameters)')
    if cfg.default_scope != 'mmpretrain' or cfg.model.type.endswith('Classifier'):
        with torch.no_grad():  # self-supervised frameworks only train
            model.eval().predict(*batch)
    return model


# -- The table -------------------------------------------------------------------------------------


def read_table(path):
    """Read (parts, verdict, remarks) by library and config path, if the file exists."""
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
