# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Try ViL in the configs of the installed OpenMMLab libraries, and write a table of results.

python tools/.dev_scripts/swap_matrix.py --out docs/swap_matrix.md
python tools/.dev_scripts/swap_matrix.py --libraries mmseg --only pspnet --out docs/swap_matrix.md

In each folder of configs, every combination of backbone, neck and head is tried once: the backbone
is swapped (mmvil.swap_backbone), the model is built, trained for one step, in which the loss is
finite and every parameter gets a gradient, and predicts. ViL is tiny and so are the images; the
rest of the network has its full size. Lines of a file that are not tried again stay.
"""

import argparse
import copy
import importlib
import importlib.metadata
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
from mmengine.structures import InstanceData, PixelData

from mmvil import swap_backbone
from mmvil.cli.errors import UserError
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

Written by `tools/.dev_scripts/swap_matrix.py`; do not edit. How to swap: see
[swap_backbone.md](swap_backbone.md).

In each folder of configs, every combination of backbone, neck and head was tried once.

- **works**: after `mmvil.swap_backbone` or `--backbone`, without further changes. That is one
  training step, in which the loss was finite and every parameter got a gradient, and one
  prediction, with {side}x{side} images (larger where a head needs it) and a tiny ViL, on a CPU with
  mmcv built for it. *keeps* means that necks and heads stay as they were, and ViL's maps are
  projected to these widths. In CGNet, ERFNet, Fast-SCNN, ICNet, STDC and UNet, the backbone is
  nearly all of the network: what is left is a small head on ViL.
- **cannot**: and why.
- **untested**: the swap is done, but this small check does not run with the old backbone either.

Versions: {versions}.
"""


# -- Cases: one config of each combination ---------------------------------------------------------


def find_cases(library, only=('',)):
    """Choose one config of each combination.

    Args:
        library (str): 'mmseg', 'mmpretrain' or 'mmdet'.
        only (Sequence[str]): Parts of paths, one of which the configs must have. Default: any.

    Returns:
        dict[str, str]: Parts, 'backbone → neck → heads', by the path relative to the library's
        configs.
    """
    root = config_root(library)
    cases = {}
    # The shortest names stand for the plainest configs.
    for path in sorted(root.glob('*/**/*.py'), key=lambda path: (len(str(path)), path.name)):
        folder = path.relative_to(root).parts[0]
        if folder not in CHOSEN.get(library, [folder]) or folder.startswith('_'):
            continue
        if 'levir' in path.name:  # pairs of images, which mmseg's own preprocessor refuses
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                cfg = Config.fromfile(path)
                model = cfg.get('model') or {}
        except Exception:  # it needs a library that is not installed
            cases.setdefault((folder,), path)
            continue
        if not model or 'train_dataloader' not in cfg:  # parts of configs, or not to be trained
            continue
        parts = [type_names(model.get(part)) for part in ('backbone', 'neck')]
        heads = [type_names(model[key]) for key in model if key in ('decode_head', 'head')]
        if not heads or library == 'mmdet' or not model.get('backbone'):
            heads = [str(model.get('type'))]
        elif not str(model.get('type')).endswith(('EncoderDecoder', 'ImageClassifier')):
            heads = [model['type']]
        cases.setdefault((folder, *parts, '+'.join(heads)), path)
    cases = {str(path.relative_to(root)): parts for (_, *parts), path in cases.items()}
    return {
        path: ' → '.join(filter(None, parts))
        for path, parts in sorted(cases.items())
        if any(part in path for part in only)
    }


def config_root(library):
    """The folder of an installed library's configs."""
    folder = Path(importlib.import_module(library).__file__).parent
    for root in (folder / '.mim' / 'configs', folder.parent / 'configs'):
        if root.is_dir():
            return root
    raise UserError(f'{library} is installed without its configs ({folder}/.mim/configs)')


def type_names(node):
    if isinstance(node, (list, tuple)):
        return '+'.join(map(type_names, node))
    kind = (node or {}).get('type', '')
    return kind if isinstance(kind, str) else kind.__name__


# -- One case --------------------------------------------------------------------------------------


def try_config(path, arch=None):
    """Swap the backbone of a config, train a step, predict.

    Returns:
        tuple[str, str]: 'works', 'cannot', 'untested' (where ``train_and_predict`` does not suit
        the network) or 'fails' (which is a bug), and remarks.
    """
    torch.manual_seed(0)
    try:
        cfg = swap_backbone(path, arch=arch or ARCH)
    except ValueError as error:
        return 'cannot', ' '.join(str(error).split())
    except ImportError as error:
        return 'cannot', f'it needs what is not installed: {error}'
    model, failure = train_and_predict(cfg)
    if failure:
        _, old_failure = train_and_predict(Config.fromfile(path))
        if old_failure:
            return 'untested', f'this check fails with its own backbone, too: {old_failure}'
        return 'fails', failure
    remarks = [f'keeps {kept_channels(cfg)}'] if kept_channels(cfg) else []
    homes = {type(module).__module__ for module in model.modules()}
    if any(home.startswith('mmdet.') for home in homes) and cfg.default_scope != 'mmdet':
        remarks.append('needs mmdet')
    used = (
        getattr(value, '__module__', '')
        for home in homes
        for value in vars(sys.modules[home]).values()
    )
    if any(str(home).startswith('mmcv.ops.') for home in used):
        remarks.append("needs mmcv's compiled ops")
    return 'works', '; '.join(remarks)


def train_and_predict(cfg):
    """Run one training step and one prediction.

    Returns:
        tuple[nn.Module | None, str | None]: The model, and the failure.
    """
    for side in SIDES:
        try:
            model = build_small(copy.deepcopy(cfg), side)
            lacking = train_step(model, cfg, side)
            predict(model, cfg, side)
        except Exception as error:
            failure = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
            continue
        if lacking:
            names = ', '.join(lacking[:3])
            return None, f'no gradient for {names} ({len(lacking)} parameters)'
        return model, None
    return None, failure


def build_small(cfg, side):
    """Build the model for tiny images, on the CPU."""
    backbone = cfg.model.backbone
    if 'img_size' in backbone:
        backbone.img_size = side
    if cfg.default_scope == 'mmseg':  # images are padded to the size of the crops
        cfg.model.data_preprocessor.size = (side, side)
    if cfg.default_scope == 'mmpretrain' and 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    for node in nodes(cfg.model):  # pre-trained weights of frozen parts of a head, say
        if type_names(node.get('init_cfg')) == 'Pretrained':
            node['init_cfg'] = None
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    return model


def nodes(node):
    """Yield the dicts inside a config."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for each in node:
            yield from nodes(each)


def train_step(model, cfg, side):
    """Run forward and backward; return the names of trainable parameters without gradient."""
    model.train()
    data = model.data_preprocessor(make_batch(cfg, side), training=True)
    total, _ = model.parse_losses(model(**data, mode='loss'))
    if not torch.isfinite(total):
        raise ValueError(f'the loss is {total.item()}')
    total.backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@torch.no_grad()
def predict(model, cfg, side):
    model.eval()
    if cfg.default_scope == 'mmpretrain' and not cfg.model.type.endswith('Classifier'):
        return  # self-supervised frameworks only train
    model(**model.data_preprocessor(make_batch(cfg, side), training=False), mode='predict')


def make_batch(cfg, side):
    """Two images with labels as the data loader of a library gives them."""
    channels = cfg.model.backbone.get('in_channels', 3)
    images = [torch.randint(256, (channels, side, side), dtype=torch.uint8) for _ in range(2)]
    samples = [SAMPLES[cfg.default_scope](cfg.model, side) for _ in images]
    multiview = [n for n in nodes(cfg.train_dataloader) if n.get('type') == 'MultiView']
    if multiview:  # self-supervised pipelines
        views = multiview[0]['num_views']
        views = sum(views) if isinstance(views, (list, tuple)) else views
        images = [torch.stack(images) for _ in range(views)]
    return dict(inputs=images, data_samples=samples)


def seg_sample(model, side):
    from mmseg.structures import SegDataSample

    classes = find_key(model, 'num_classes')
    labels = torch.randint(classes, (1, side, side))
    return SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=metainfo(side))


def cls_sample(model, side):
    from mmpretrain.structures import DataSample

    sample = DataSample(metainfo=metainfo(side)).set_gt_label(1)
    classes = find_key(model.get('head'), 'num_classes')
    if classes and model.head.type.startswith(('MultiLabel', 'CSRA')):
        sample.set_gt_score(torch.eye(classes)[1])
    return sample


def det_sample(model, side):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[4.0, 4, 40, 40], [20, 16, 60, 50]])
    instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]))
    if 'mask' in str(model).lower():
        masks = torch.zeros(2, side, side, dtype=torch.uint8)
        masks[0, 4:40, 4:40] = masks[1, 16:50, 20:60] = 1
        instances.masks = BitmapMasks(masks.numpy(), side, side)
    return DetDataSample(metainfo=metainfo(side), gt_instances=instances)


SAMPLES = dict(mmseg=seg_sample, mmpretrain=cls_sample, mmdet=det_sample)


def metainfo(side):
    shapes = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    known = dict.fromkeys(shapes, (side, side))
    return dict(**known, border=(0, 0, 0, 0), scale_factor=(1.0, 1.0), flip=False, img_id=0)


def find_key(config, key):
    """Return the first value of a key inside a config, None if it has none."""
    return next((node[key] for node in nodes(config) if node.get(key)), None)


def kept_channels(cfg):
    """Return the old widths if ViL's maps are projected to them."""
    return (cfg.model.backbone.get('pyramid') or {}).get('out_channels')


# -- The table -------------------------------------------------------------------------------------


def read_table(path):
    """Read a file that ``write_table`` wrote, if it exists.

    Returns:
        dict[str, dict[str, tuple]]: (parts, verdict, remarks) by library and path of the config.
    """
    outcomes = {}
    for line in path.read_text().splitlines() if path and path.exists() else []:
        if line.startswith('## '):
            rows = outcomes.setdefault(line.split()[1].strip(':'), {})
        elif line.startswith('| `'):
            config, *cells = (cell.strip() for cell in line.strip('|').split('|'))
            rows[config.strip('`')] = tuple(cells)
    return outcomes


def write_table(outcomes):
    """Format what ``read_table`` returns as Markdown."""
    versions = []
    for module in (*outcomes, 'mmcv', 'mmengine', 'torch'):
        for name in importlib.metadata.packages_distributions().get(module, [])[:1]:
            versions.append(f'{name} {importlib.metadata.version(name)}')
    lines = [HEADER.format(side=SIDES[0], versions=', '.join(versions))]
    for library, rows in outcomes.items():
        counts = Counter(verdict for _, verdict, _ in rows.values())
        lines += [
            f'## {library}: ' + ', '.join(f'{n} {verdict}' for verdict, n in counts.most_common()),
            '',
            '| config | old backbone → neck → head | ViL | |',
            '|---|---|---|---|',
        ]
        for path, (parts, verdict, remarks) in sorted(rows.items()):
            lines.append(f'| `{path}` | {parts} | {verdict} | {remarks} |')
        lines.append('')
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--libraries', nargs='+', choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument(
        '--only', nargs='+', default=[''], help='parts of the paths of the configs to try'
    )
    parser.add_argument('--out', type=Path, help='Markdown file (default: print)')
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
            verdict, remarks = try_config(config_root(library) / path)
            outcomes.setdefault(library, {})[path] = (parts, verdict, remarks)
            progress = f'[{number}/{len(cases)}] {path}: {verdict}'
            print(f'{progress} ({remarks})' if remarks else progress, file=sys.stderr, flush=True)
            if args.out:
                args.out.write_text(write_table(outcomes))
    if not args.out:
        print(write_table(outcomes))


if __name__ == '__main__':
    run(main)
