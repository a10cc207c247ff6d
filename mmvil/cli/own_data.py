# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Classes and folders of a user's own dataset: from a file beside the data into the config."""

import difflib
import os
import re
from pathlib import Path

from mmengine.config import Config
from mmengine.fileio import load
from mmengine.utils import scandir
from PIL import Image

from ..engine.config_nodes import dicts, innermost_datasets
from .errors import UserError, as_user_error

FILES = ('classes.yaml', 'classes.yml', 'classes.txt')
SPLITS = ('train', 'val', 'test')
PER_CLASS = ('colors', 'values', 'class_weight')
MAPPED = 'mmvil.apis.annotations.LoadMappedAnnotations'
MAPPING = ('values', 'colors', 'ignore')  # its options
KEYS = (
    *('classes', *PER_CLASS, 'ignore', 'img_suffix', 'seg_map_suffix'),
    *(f'{split}_{kind}' for split in SPLITS for kind in ('images', 'masks')),
)


def describe_own_data(cfg: Config) -> None:
    """Write classes, folders and suffixes of the data into a config, in place, as plain values.

    This is for configs with ``classes_from_data_root``, and the datasets in them that name no
    classes, so that the config dumped by a training stays as it is. See docs/own_data.md.
    """
    datasets = [
        (split, dataset)
        for split in SPLITS
        if cfg.get('classes_from_data_root') and cfg.get(f'{split}_dataloader')
        for dataset in innermost_datasets(cfg[f'{split}_dataloader'].dataset)
        if not (dataset.get('metainfo') or {}).get('classes')
    ]
    root = datasets[0][1].data_root if datasets else ''
    if not os.path.isdir(root):  # the checks before a run report it
        return
    file = next((Path(root, name) for name in FILES if Path(root, name).is_file()), None)
    own = read_classes(file) if file else {}
    if cfg.default_scope == 'mmpretrain':
        own['classes'] = _describe_class_folders(datasets, own)
    elif file is None:
        raise UserError(f'no classes: write their names into {root}/classes.txt, one per line')
    else:
        _describe_masks(datasets, own)
        _map_annotations(cfg, own)
    if own['classes']:
        _describe_model(cfg, own)


def read_classes(path: Path) -> dict:
    """Read a file of classes.

    Args:
        path (Path): YAML with the ``KEYS`` of this module, or text of one class per line, each with
            or without a color: ``road 128 64 128``.

    Raises:
        UserError: If keys are unknown or lengths differ.
    """
    if path.suffix == '.txt':
        own = _read_lines(path)
    else:
        with as_user_error(f'cannot read {path}'):
            own = dict(load(path))
    for key in set(own) - set(KEYS):
        close = difflib.get_close_matches(str(key), KEYS, n=1)
        hint = f'Did you mean {close[0]}?' if close else f'It may have: {", ".join(KEYS)}.'
        raise UserError(f'{path} has an unknown key {key!r}. {hint}')
    own['classes'] = classes = [str(name) for name in own.get('classes') or ()]
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UserError(
            f'{path} must name at least two classes, each once (the background is one, too), but '
            f'has: {", ".join(classes)}'
        )
    for key in PER_CLASS:
        if key in own and len(own[key]) != len(classes):
            raise UserError(f'{path} has {len(classes)} classes, but {len(own[key])} {key}')
    if isinstance(own.get('ignore'), int):
        own['ignore'] = [own['ignore']]
    return own


def _read_lines(path):
    """Classes and, if there are any, colors."""
    lines = [line.strip() for line in path.read_text('utf-8-sig').splitlines()]
    pattern = re.compile(r'(.*?)(?:[\s,;]+(\d+)[\s,]+(\d+)[\s,]+(\d+))?')
    found = [pattern.fullmatch(line).groups() for line in lines if line and line[0] != '#']
    colors = [[int(x) for x in color] for _, *color in found if None not in color]
    return dict(classes=[name for name, *_ in found], **(dict(colors=colors) if colors else {}))


# -- Segmentation ----------------------------------------------------------------------------------


def _describe_masks(datasets, own):
    for split, dataset in datasets:
        dataset.metainfo = dict(classes=own['classes'])
        if 'colors' in own:
            dataset.metainfo.palette = own['colors']
        for kind, prefix, suffix in (
            ('images', 'img_path', 'img_suffix'),
            ('masks', 'seg_map_path', 'seg_map_suffix'),
        ):
            dataset.data_prefix[prefix] = _folder(own, split, kind, dataset.data_prefix[prefix])
            found = _suffix_in(os.path.join(dataset.data_root, dataset.data_prefix[prefix]))
            if own.get(suffix, found):
                dataset[suffix] = own.get(suffix, found)


def _folder(own, split, kind, default):
    """Folder of a split; without one of its own, testing takes that of validation."""
    inherited = own.get(f'val_{kind}', default) if split == 'test' else default
    return own.get(f'{split}_{kind}', inherited)


def _suffix_in(folder):
    """The one suffix of all image files in a folder, or None if there are none."""
    files = scandir(folder, recursive=True) if os.path.isdir(folder) else ()
    known = Image.registered_extensions()
    found = {Path(file).suffix for file in files}
    found = sorted(suffix for suffix in found if suffix.lower() in known)
    if len(found) > 1:
        raise UserError(
            f'{folder} has files of several kinds ({", ".join(found)}), which the dataset class '
            'cannot read together: convert them, or name one by img_suffix or seg_map_suffix in '
            'classes.yaml'
        )
    return found[0] if found else None


def _map_annotations(cfg, own):
    """Replace ``LoadAnnotations`` in all pipelines if masks hold other values than indices."""
    mapping = {key: own[key] for key in MAPPING if key in own}
    for node in dicts(cfg) if mapping else ():
        if str(node.get('type')).rpartition('.')[2] == 'LoadAnnotations':
            node.update(type=MAPPED, **mapping)


# -- Classification --------------------------------------------------------------------------------


def _describe_class_folders(datasets, own):
    """Check that all splits have the same folders, one per class; return their names."""
    classes, source = own.get('classes'), 'the file of classes'
    for split, dataset in datasets:
        dataset.data_prefix = _folder(own, split, 'images', dataset.data_prefix)
        root = Path(dataset.data_root, dataset.data_prefix)
        if not root.is_dir():  # the checks before a run report it
            continue
        folders = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != '.')
        if classes is None:
            classes, source = folders, root
        if len(folders) < 2 or folders != classes:
            raise UserError(
                f'{root} must have at least two folders, one per class, the same as {source} in '
                f'alphabetical order ({", ".join(classes)}), but has: {", ".join(folders)}'
            )
    for _, dataset in datasets if classes else ():
        dataset.metainfo = dict(classes=classes)
    return classes


# -- The model -------------------------------------------------------------------------------------


def _describe_model(cfg, own):
    losses = ('CrossEntropyLoss', 'LabelSmoothLoss')
    weighted = False
    for node in dicts([cfg.model, cfg.get('data_preprocessor')]):
        if 'num_classes' in node:
            node.num_classes = len(own['classes'])
        if 'class_weight' in own and str(node.get('type')).endswith(losses):
            node.class_weight, weighted = own['class_weight'], True
    if 'class_weight' in own and not weighted:
        raise UserError(f'class_weight needs a loss of the model to be one of: {", ".join(losses)}')
