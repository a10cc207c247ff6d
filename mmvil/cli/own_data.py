# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Classes of a user's own dataset, read from a file next to the data."""

import re
from pathlib import Path

from mmengine.config import Config
from mmengine.fileio import load
from mmengine.utils import scandir
from PIL import Image

from ..engine.config_nodes import as_list, dicts, innermost_datasets, loaders, type_name
from .errors import UserError, as_user_error

CLASS_FILES = ('classes.yaml', 'classes.txt')
PER_CLASS = ('colors', 'values', 'class_weight')
MAPPED_LOADER = 'mmvil.apis.annotations.LoadMappedAnnotations'
MIXED_DATASET = 'mmvil.apis.image_folders.MixedSuffixDataset'
MAPPING_OPTIONS = ('colors', 'values', 'ignore')  # its options


def configure_own_data(cfg: Config) -> None:
    """Write classes and suffixes of the data into a config, in place.

    This applies to configs with ``classes_from_data_root``, and to datasets in them that do not
    specify classes, so that configs dumped by a training run are not changed. See docs/own_data.md.
    """
    datasets = [
        dataset
        for loader in loaders(cfg)
        for dataset in innermost_datasets(loader.dataset)
        if cfg.get('classes_from_data_root') and not dataset.get('metainfo', {}).get('classes')
    ]
    root = Path(datasets[0].data_root) if datasets else None
    if root is None or not root.is_dir():  # reported by the checks before a run
        return
    file = next((root / name for name in CLASS_FILES if (root / name).is_file()), None)
    own = read_classes(file) if file else {}
    if cfg.default_scope == 'mmpretrain':
        own['classes'] = _configure_class_folders(datasets, own.get('classes'))
    elif file is None:
        raise UserError(f'no classes: write their names into {root}/classes.txt, one per line')
    else:
        _configure_masks(cfg, datasets, own)
    if own['classes']:
        _configure_model(cfg, own)


def read_classes(path: Path) -> dict:
    """Read a class file.

    Args:
        path (Path): YAML with ``classes`` and the keys of ``PER_CLASS`` and ``MAPPING_OPTIONS``, or
            a text file with one class per line, optionally with a color: ``road 128 64 128``.

    Raises:
        UserError: If keys are unknown or lengths differ.
    """
    with as_user_error(f'cannot read {path}'):
        own = _read_lines(path) if path.suffix == '.txt' else load(path)
    own = own if isinstance(own, dict) else dict(classes=own)  # a bare list, or an empty file
    own = {k: v if isinstance(v, list) else [v] for k, v in own.items() if v is not None}
    known = ('classes', *PER_CLASS, 'ignore')
    if set(own) - set(known):
        unknown = ', '.join(map(str, set(own) - set(known)))
        raise UserError(f'{path} has unknown keys: {unknown}. It may have: {", ".join(known)}.')
    classes = own.get('classes') or ()
    odd = [name for name in classes if isinstance(name, bool) or name is None]
    if odd:
        raise UserError(f'{path} names a class that YAML reads as {odd[0]}; write it in quotes')
    own['classes'] = classes = [str(name) for name in classes]
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UserError(
            f'{path} must name at least two classes, each once (the background is one, too), but '
            f'has: {", ".join(classes)}'
        )
    for key in PER_CLASS:
        if key in own and len(own[key]) != len(classes):
            wanted = f'{key} needs one entry for each of the {len(classes)} classes'
            raise UserError(f'{path}: {wanted}, but has {len(own[key])}')
    for color in own.get('colors', ()):
        if not isinstance(color, list) or [value in range(256) for value in color] != [True] * 3:
            raise UserError(f'{path}: colors are three numbers from 0 to 255, but one is {color}')
    return own


def _read_lines(path):
    """Classes and, if there are any, colors."""
    lines = [line.strip() for line in path.read_text('utf-8-sig').splitlines()]
    pattern = re.compile(r'(.*?)(?:[\s,;]+(\d+)[\s,;]+(\d+)[\s,;]+(\d+))?')
    found = [pattern.fullmatch(line).groups() for line in lines if line and line[0] != '#']
    colors = [[int(x) for x in color] for _, *color in found if None not in color]
    return dict(classes=[name for name, *_ in found], **(dict(colors=colors) if colors else {}))


def _configure_masks(cfg, datasets, own):
    for dataset in datasets:
        dataset.metainfo = dict(classes=own['classes'])
        if 'colors' in own:
            dataset.metainfo.palette = own['colors']
        prefixes = map(dataset.data_prefix.get, ('img_path', 'seg_map_path'))
        images, masks = (Path(dataset.data_root, prefix) for prefix in prefixes)
        is_plain = type_name(dataset) == 'BaseSegDataset' and not dataset.get('ann_file')
        may_mix = is_plain and not masks.is_relative_to(images)
        for folder, option in ((images, 'img_suffix'), (masks, 'seg_map_suffix')):
            if option in dataset:
                continue
            # A split to come is like training.
            suffixes = _suffixes_in(folder) or as_list(datasets[0].get(option))
            if len(suffixes) == 1:
                dataset[option] = suffixes[0]
            elif suffixes and folder == images and may_mix:
                dataset.update(type=MIXED_DATASET, img_suffix=suffixes)
            elif suffixes:
                raise UserError(
                    f'{folder} must have images of one suffix, but has: {", ".join(suffixes)}; '
                    f'convert or rename them, or set {option} in your config'
                )
    mapping = {key: own[key] for key in MAPPING_OPTIONS if key in own}
    for node in dicts(cfg) if mapping else ():
        if type_name(node) == 'LoadAnnotations':
            node.update(type=MAPPED_LOADER, **mapping)


def _suffixes_in(folder):
    """The suffixes of all image files in a folder, sorted."""
    files = scandir(folder, recursive=True) if folder.is_dir() else ()
    found = {Path(file).suffix for file in files}
    return sorted(suffix for suffix in found if suffix.lower() in Image.registered_extensions())


def _configure_class_folders(datasets, classes):
    """Check that all splits have the same folders, one per class; return their names."""
    source = 'the file of classes'
    for dataset in datasets:
        root = Path(dataset.data_root, dataset.data_prefix)
        if not root.is_dir():
            continue
        folders = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != '.')
        if classes is None:
            classes, source = folders, root
        if len(folders) < 2 or folders != classes:
            same = f'the same as {source} in alphabetical order ({", ".join(classes)}), '
            raise UserError(
                f'{root} must have at least two folders, one per class, '
                f'{same if source != root else ""}but has: {", ".join(folders) or "none"}'
            )
    for dataset in datasets if classes else ():
        dataset.metainfo = dict(classes=classes)
    return classes


def _configure_model(cfg, own):
    nodes = list(dicts([cfg.model, cfg.get('data_preprocessor')]))
    for node in nodes:
        if 'num_classes' in node:
            node.num_classes = len(own['classes'])
    if 'class_weight' in own:
        kinds = ('CrossEntropyLoss', 'LabelSmoothLoss')
        losses = [node for node in nodes if type_name(node).endswith(kinds)]
        if not losses:
            raise UserError(f'class_weight needs a {" or ".join(kinds)}, but the model has none')
        for loss in losses:
            loss.class_weight = own['class_weight']
