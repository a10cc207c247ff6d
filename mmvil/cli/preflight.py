# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Checks before a run, for problems that would fail later with a worse message or none."""

import copy
import difflib
import inspect
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import MODELS, RUNNERS, DefaultScope
from mmengine.runner import Runner
from mmengine.utils import scandir

from ..apis.swap.probe import HEADS, BackboneProbe, training_size
from ..checkpoints import (
    OFFICIAL_URL,
    cached_path,
    describe_misfit,
    find_official,
    weights_of,
)
from ..checkpoints.sharded import is_sharded
from ..engine.config_nodes import as_list, dicts, innermost_datasets, loaders, type_name
from ..engine.cpu import fit_to_cpu
from ..engine.hooks import NamePicturesHook
from .config import build_lazily, default_hook
from .errors import UserError, as_user_error, is_first_process, one_line

MISFIT = 'Invalid channel dimensions|expected input|same reduction dim|mat1 and mat2 shapes'
"""Messages of torch, on the meta device, on inputs whose channels do not fit a layer."""
UNKNOWN_CLASS = 'out of bounds|smaller than num_classes|device-side assert'
"""Messages of torch, in losses, on labels beyond the outputs of a head."""


# -- Runner ----------------------------------------------------------------------------------------


def build_runner(cfg: Config, notes: Sequence[str] = ()) -> Runner:
    """Build the runner of a config for this machine.

    Args:
        cfg (Config): Not modified; the runner gets a copy, adapted if there is no GPU, see
            :func:`mmvil.engine.cpu.fit_to_cpu`.
        notes (Sequence[str]): Warnings for the runner's log.
    """
    cfg = copy.deepcopy(cfg)
    notes = [*notes, *fit_to_cpu(cfg)]
    own, given = cfg.model.get('data_preprocessor'), cfg.get('data_preprocessor')
    if own is not None and given not in (None, own):
        notes.append('data_preprocessor is not used: set model.data_preprocessor instead')
    for loader in loaders(cfg):
        if loader.get('num_workers', 0) == 0:  # torch then rejects persistent workers
            loader.persistent_workers = False
    strategy = _check_strategy(cfg)
    if cfg.get('compile') and not strategy:
        notes.append(
            'compile=True compiles the whole training step, again for new file names and for '
            'minutes each time; model.backbone.compile=True compiles the blocks of ViL once'
        )
    with _building():
        runner = RUNNERS.build(cfg) if cfg.get('runner_type') else Runner.from_cfg(cfg)
    if cfg.get('compile') and strategy:
        # FlexibleRunner does not read it from the config, and would compile the optimizer step.
        options = {} if cfg.compile is True else cfg.compile
        runner._compile = dict(target='forward', **options)
    if default_hook(cfg, 'visualization').get('enable'):  # mmpretrain's
        runner.register_hook(NamePicturesHook())
    for note in notes:
        runner.logger.warning(note)
    return runner


def _check_strategy(cfg):
    """Return the type of the strategy, after a check of the settings that it needs or does not
    support, and that would fail late or with another message.
    """
    strategy = type_name(cfg.get('strategy'))
    if strategy == 'DeepSpeedStrategy':
        if cfg.get('compile'):
            raise UserError('DeepSpeedStrategy does not support compile=True; leave it out')
        if cfg.get('optim_wrapper') and type_name(cfg.optim_wrapper) != 'DeepSpeedOptimWrapper':
            raise UserError(
                'DeepSpeedStrategy needs an optim_wrapper of the type DeepSpeedOptimWrapper, as in '
                'configs/upernet_vil_b_ade20k_zero2.py'
            )
    if strategy == 'FSDPStrategy':
        if 'EMAHook' in map(type_name, as_list(cfg.get('custom_hooks'))):
            raise UserError('EMAHook cannot copy a sharded model; leave it out of custom_hooks')
        if cfg.get('launcher', 'none') == 'none':
            raise UserError(
                'FSDPStrategy needs a launcher, even for one process: tools/dist_train.sh CONFIG 1'
            )
    return strategy


def build_loops(runner: Runner, *names: str) -> None:
    """Build the named loops ('train', 'val', 'test') with their dataloaders and metrics, which
    mmengine builds when a run starts, to report invalid settings like those of the other parts.
    """
    with _building():
        for name in names:
            getattr(runner, f'{name}_loop')


def train(runner: Runner) -> None:
    """Train, and report invalid settings like :func:`build_runner`."""
    build_loops(runner, 'train', 'val')
    check_saving(runner)
    heads = [runner.cfg.model.get(key) for key in HEADS]  # mmdet checks its own
    dataset = runner.train_loop.dataloader.dataset
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
    mismatches = class_mismatches(classes, heads)
    for each in mismatches:
        runner.logger.warning(each)
    try:
        with _resuming(runner):
            runner.train()
    except (IndexError, RuntimeError) as error:
        if mismatches and re.search(UNKNOWN_CLASS, str(error)):
            raise UserError('; '.join(mismatches)) from error
        check_images(dataset, runner.cfg, error)
        check_channels(runner.cfg)
        raise
    except Exception:
        # Until mmengine has built optimizer and schedulers, they are configs.
        parts = [runner.optim_wrapper, *as_list(runner.param_schedulers)]
        with _building() if any(isinstance(part, dict) for part in parts) else nullcontext():
            raise


@contextmanager
def _resuming(runner):
    """Report a checkpoint whose optimizer or loss scaling is not that of the config."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        calls = [call.name for call in traceback.extract_tb(error.__traceback__)]
        if runner._resume and 'load_or_resume' in calls:
            raise UserError(
                f'cannot resume from {runner._load_from} with another optimizer or precision '
                f'({one_line(error)}). To start from its weights: --cfg-options '
                f'load_from={runner._load_from}, without --resume.'
            ) from error
        raise


def _building():
    failed = 'cannot build what the config describes (--traceback shows where)'
    return as_user_error(failed, (AssertionError, ImportError, KeyError, TypeError, ValueError))


# -- Before training and testing -------------------------------------------------------------------


def check_training(cfg: Config) -> None:
    """Check everything that training needs before it starts."""
    check_backbone(cfg)
    check_work_dir(cfg)
    check_data(cfg, 'train_dataloader', 'val_dataloader')
    check_config_checkpoints(cfg)


def check_testing(cfg: Config) -> None:
    """Check everything that testing ``load_from`` needs before it starts."""
    check_backbone(cfg)
    check_work_dir(cfg)
    check_data(cfg, 'test_dataloader')
    check_checkpoint(cfg.load_from)


# -- Settings --------------------------------------------------------------------------------------


def check_backbone(cfg: Config) -> None:
    """Check that the ViL backbone supports the options in the config."""
    known = list(inspect.signature(MODELS.get('mmvil.VisionLSTM')).parameters)
    for node in dicts(cfg.get('model') or {}):
        if type_name(node) not in ('VisionLSTM', 'MaskedVisionLSTM'):
            continue
        _reject_unknown('VisionLSTM', set(node) - set(known) - {'type', '_scope_'}, known)


def check_saving(runner: Runner) -> None:
    """Check settings that mmengine reads late: the interval of validations after an iteration,
    options of CheckpointHook at the first checkpoint, and metrics of segmentation after the first
    validation.
    """
    if runner.val_loop is not None and getattr(runner.train_loop, 'val_interval', 1) < 1:
        raise UserError('train_cfg.val_interval must be at least 1.' + _no_validate_hint('val'))
    metrics = _metric_names(getattr(runner.val_loop, 'evaluator', None))
    for hook in runner.hooks:
        if isinstance(hook, EarlyStoppingHook):
            _check_metric('monitor of EarlyStoppingHook', hook.monitor, metrics)
        if isinstance(hook, CheckpointHook):
            options = inspect.signature(runner.save_checkpoint).parameters
            known = [*inspect.signature(CheckpointHook).parameters][:-1]  # without kwargs
            _reject_unknown('CheckpointHook', set(hook.args) - set(options), known)
            for name in hook.save_best or ():
                _check_metric('save_best', name, metrics)


def _metric_names(evaluator):
    """Names of all values that a validation computes; none unless all metrics are mmseg's."""
    names = []
    for metric in evaluator.metrics if evaluator else ():
        if type(metric).compute_metrics.__qualname__ != 'IoUMetric.compute_metrics':
            return []
        with _building():
            found = metric.total_area_to_metrics(*4 * [torch.ones(1)], metric.metrics)
        prefix = f'{metric.prefix}/' if metric.prefix else ''
        names += [prefix + (name if name == 'aAcc' else f'm{name}') for name in found]
    return names


def _check_metric(option, name, metrics):
    """Raise a UserError if an option names none of the metrics, unless these are not known."""
    if metrics and name not in ('auto', *metrics):
        raise UserError(f'{option} is {name!r}, but the metrics are {", ".join(sorted(metrics))}')


def _reject_unknown(owner: str, unknown: set[str], known: Sequence[str]) -> None:
    """Raise a UserError for the first unknown option of a class, if there is one."""
    for key in sorted(unknown)[:1]:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f'Did you mean {close[0]}?' if close else f'It has: {", ".join(known)}.'
        raise UserError(f'{owner} has no option {key!r}. {hint}')


def class_mismatches(classes: Sequence[str], model) -> list[str]:
    """Describe heads in a config whose number of classes differs from that of the dataset."""
    found = []
    for head in dicts(model) if classes else ():
        kind, number = type_name(head), head.get('num_classes')
        # RPN heads have a single class for all objects, STDC heads two for boundaries.
        is_judged = kind.endswith('Head') and not kind.endswith(('RPNHead', 'STDCHead'))
        if is_judged and number not in (None, len(classes)):
            found.append(
                f'num_classes={number} in {head.type}, but the dataset has {len(classes)} classes'
            )
    return found


# -- Channels and sizes of images ------------------------------------------------------------------


def expected_channels(cfg: Config) -> Iterator[tuple[str, int]]:
    """Settings of the model that imply a number of channels, with that number."""
    backbone = cfg.model.get('backbone') or {}
    if 'in_channels' in backbone or type_name(backbone).endswith('VisionLSTM'):
        channels = backbone.get('in_channels', 3)
        yield f'the backbone has in_channels={channels}', channels
    for name in ('mean', 'std'):
        values = data_preprocessor(cfg).get(name)
        if values is not None and len(values) != 1:  # a single value applies to all channels
            yield f'{name} of the data_preprocessor has {len(values)} values', len(values)


def data_preprocessor(cfg: Config) -> dict:
    """Config of the data preprocessor, which normalizes images, or an empty dict."""
    return cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}


def check_images(dataset, cfg: Config, error: Exception) -> None:
    """Check, after training has failed with an error that collating a batch or subtracting ``mean``
    may have raised, that images have the same size, where it matters, and the number of channels
    that the config expects.
    """
    shape = r'(\[.*\]) at entry'
    if found := re.search(f'stack expects .* but got {shape} 0 and {shape}', str(error)):
        raise UserError(
            f'images of a batch have different shapes, {found[1]} and {found[2]}; the pipeline '
            'must resize or crop them to the same size'
        ) from error
    if not re.search('must match the size of tensor b .* dimension [01]', str(error)):
        return
    views = as_list(dataset[0]['inputs'])
    for name, expected in expected_channels(cfg):
        if views[0].shape[0] != expected:
            raise UserError(f'images have {views[0].shape[0]} channels, but {name}') from error
    if traceback.extract_tb(error.__traceback__)[-1].filename.endswith('data_preprocessor.py'):
        raise UserError(
            'some images have another number of channels; tools/check_dataset.py names them'
        ) from error


def check_channels(cfg: Config) -> None:
    """Check, after training has failed, that the neck or the heads read as many channels as a ViL
    backbone outputs, by running them on the meta device. Those that cannot run there are not
    checked.
    """
    if type_name((cfg.get('model') or {}).get('backbone')) != 'VisionLSTM':
        return
    try:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            probe = BackboneProbe(cfg.model, training_size(cfg), None, None)
    except (RuntimeError, TypeError, ValueError):  # unusual models
        return
    if re.search(MISFIT, probe.failure or ''):
        part = probe.failure.partition(':')[0]
        raise UserError(
            f'the backbone outputs {probe.widths} channels, but in_channels (or in_index) of the '
            f'{part} is for others'
        )


# -- Files of data ---------------------------------------------------------------------------------


def check_data(cfg: Config, *names: str) -> None:
    """Check that folders, images and annotations of the named dataloaders exist."""
    for dataset in check_folders(cfg, *names):
        check_annotations(dataset)


def check_folders(cfg: Config, *names: str) -> list:
    """Check that the folders read by the named dataloaders exist and contain images.

    Returns:
        list: Their datasets, see :func:`mmvil.cli.config.build_lazily`.
    """
    datasets = []
    for name in filter(cfg.get, names):
        for dataset_cfg in innermost_datasets(cfg[name].dataset):
            _check_folder(dataset_cfg.get('data_root'), name)
            dataset = build_lazily(dataset_cfg, cfg.get('default_scope'))
            datasets.append(dataset)
            prefix = getattr(dataset, 'data_prefix', {})
            for folder in prefix.values():
                _check_folder(folder, name)
            file = getattr(dataset, 'ann_file', '')
            if isinstance(file, str) and file and '://' not in file and not os.path.isfile(file):
                raise UserError(f'annotations not found: {os.path.abspath(file)} ({name})')
            # mmengine's InfiniteSampler waits forever on an empty dataset.
            extensions = () if file else sorted(getattr(dataset, 'extensions', ()))
            suffixes = tuple(extensions or as_list(getattr(dataset, 'img_suffix', '')))
            folder = prefix.get('img_path') or ''
            files = scandir(folder, suffixes, recursive=True, case_sensitive=not extensions)
            if os.path.isdir(folder) and not any(files):
                none = f'there is no *{", *".join(suffixes)} in {os.path.abspath(folder)}'
                raise UserError(f'no images: {none}.{_no_validate_hint(name)}')
    return datasets


def _check_folder(folder: str | None, loader: str) -> None:
    if folder and '://' not in folder and not os.path.isdir(folder):
        raise UserError(
            f'data not found: {os.path.abspath(folder)} ({loader} of the config reads it). Put or '
            'link the data there, or specify its folder with --data-root.'
            + _no_validate_hint(loader)
        )


def check_annotations(dataset) -> None:
    """Check that each image of a segmentation dataset has an annotation (complete download)."""
    if getattr(dataset, 'test_mode', True):
        return
    images, annotations = image_and_annotation_stems(dataset)
    missing = sorted(images - annotations)
    if missing:
        folders = dataset.data_prefix
        raise UserError(
            f'{len(missing)} of {len(images)} images in {folders["img_path"]} have no annotation '
            f'in {folders["seg_map_path"]} ({missing[0]}{dataset.seg_map_suffix}, …). Was the '
            'download complete? tools/check_dataset.py CONFIG lists all problems.'
        )


def image_and_annotation_stems(dataset) -> tuple[set[str], set[str]]:
    """Names of the files in the folders of images and annotations, without suffix; empty if the
    dataset does not use all files of two local folders.
    """
    prefix = getattr(dataset, 'data_prefix', {})
    images, maps = prefix.get('img_path'), prefix.get('seg_map_path')
    if not images or not maps or dataset.ann_file or '://' in images + maps:
        return set(), set()
    return _stems(images, dataset.img_suffix), _stems(maps, dataset.seg_map_suffix)


def _stems(folder: str, suffix: str | tuple[str, ...]) -> set[str]:
    return {
        name.removesuffix(each)
        for each in as_list(suffix)
        for name in scandir(folder, each, recursive=True)
    }


def _no_validate_hint(loader: str) -> str:
    """Hint for running without the data of a dataloader."""
    return ' To train without validation: --no-validate.' if loader.startswith('val') else ''


# -- Work dir --------------------------------------------------------------------------------------


def check_work_dir(cfg: Config) -> None:
    """Check that the work dir, or the folder in which it will be created, is writable."""
    check_writable(cfg.work_dir, 'the work dir', '. Choose another with --work-dir.')


def check_writable(folder: str | Path, name: str = 'the folder', hint: str = '') -> None:
    """Check that a folder, or the one in which it will be created, is writable."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = 'no permission to write' if existing.is_dir() else 'it is a file'
        raise UserError(f'cannot use {name} {folder}: {existing}: {why}{hint}')


# -- Checkpoints -----------------------------------------------------------------------------------


def check_checkpoint(path: str) -> None:
    """Check that a path is a PyTorch checkpoint or an official one, and note if that is yet to be
    downloaded. Other URLs are not checked.
    """
    if path.startswith(('mmvil://', OFFICIAL_URL)):
        cached = cached_path(find_official(path))
        if not cached.is_file() and is_first_process():
            print(f'note: {path} is not at {cached} yet and will be downloaded')
    if '://' in path or is_sharded(path):
        return
    if os.path.isdir(path):
        raise UserError(
            f'{path} is a folder, but was not written by FSDP training. Merge the shards of '
            'DeepSpeed into one file with tools/model_converters/merge_shards.py.'
        )
    if not os.path.isfile(path):
        raise UserError(f'checkpoint not found: {os.path.abspath(path)}')
    with open(path, 'rb') as file:
        start = file.read(2)
    # A pickle, a zip file, or what PyTorch itself tells by the suffix.
    if start[:1] != b'\x80' and start != b'PK' and not path.endswith('.safetensors'):
        raise UserError(f'{path} is not a PyTorch checkpoint')


def check_config_checkpoints(cfg: Config) -> None:
    """Check the files specified by ``load_from`` and ``init_cfg``."""
    kinds = ('Pretrained', 'PretrainedInit')
    named = [node.get('checkpoint') for node in dicts(cfg) if type_name(node) in kinds]
    load_from = cfg.get('load_from')
    by_deepspeed = type_name(cfg.get('strategy')).startswith('DeepSpeed')
    is_shards = by_deepspeed and os.path.isdir(load_from or '')
    for path in (*named, None if is_shards else load_from):
        if path is not None:
            check_checkpoint(path)


def check_fit(model: torch.nn.Module, checkpoint: dict, path: str) -> None:
    """Check that a checkpoint contains every tensor of a model in the right shape; mmengine would
    only warn.
    """
    # FSDP itself has the full tensors, which it gives to rank 0; the wrapped module has shards.
    sharded = hasattr(model, 'summon_full_params')
    while not sharded and (is_model_wrapper(model) or isinstance(model, BaseTTAModel)):
        model = model.module
    if mismatch := describe_misfit(weights_of(checkpoint), model.state_dict()):
        raise UserError(
            f'{path} does not fit the config: {mismatch}. '
            'Test and resume with the config that it was trained with.'
        )


def restored_settings(runner: Runner, checkpoint: dict) -> list[str]:
    """Settings of the optimizer and its schedulers that differ between a checkpoint and the config.
    When it resumes, mmengine restores those of the checkpoint.
    """
    groups, schedulers = runner.optim_wrapper.param_groups, as_list(runner.param_schedulers)
    pairs = [('optimizer', *both) for both in zip(groups, checkpoint['optimizer']['param_groups'])]
    for i, (own, saved) in enumerate(zip(schedulers, checkpoint.get('param_schedulers') or ())):
        pairs.append((f'param_scheduler.{i}', own.state_dict(), saved))
    progress = {'params', 'last_step', 'base_values'}
    return sorted(
        {
            f'{part}.{key.removeprefix("initial_")}'
            for part, own, saved in pairs
            for key in (own.keys() & saved.keys()) - progress
            # Scheduled values change, their initial values do not.
            if key[0] != '_' and f'initial_{key}' not in own
            if as_list(own[key]) != as_list(saved[key])
        }
    )


class CheckFitHook(Hook):
    """Reject a checkpoint that does not fit when the runner loads it, and warn of settings that
    have no effect because resuming restores those of the checkpoint.
    """

    priority = 'VERY_HIGH'  # before EMAHook loads its part

    def after_load_checkpoint(self, runner, checkpoint):
        check_fit(runner.model, checkpoint, runner._load_from or 'the checkpoint')
        if runner._resume and 'param_groups' in checkpoint.get('optimizer', {}):
            if restored := restored_settings(runner, checkpoint):
                runner.logger.warning(
                    f'resuming restores {", ".join(restored)} of the checkpoint; those of the '
                    'config are different and have no effect'
                )
