# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What the command lines share: arguments, checks before the work starts, errors in one line."""

import argparse
import difflib
import errno
import gc
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec('mmvil') is None:  # run from a checkout that is not pip-installed
    sys.path.insert(0, str(ROOT))


class UserError(Exception):
    """Something the user can put right. The message says what was wrong and what to do."""


def run(main) -> None:
    """Call ``main``; report what the user can put right in one line and exit with status 2.

    That is a ``UserError``, or a ``ValueError`` that mmvil itself raises about a value it was
    given; a sample that cannot be used, a loss that is not finite, a disk that is full.
    ``--traceback``, or MMVIL_TRACEBACK=1 in the environment, shows the whole trace.

    Checkpoints are loaded without running code that they contain, unless ``--trust-checkpoint``.
    """
    if '--trust-checkpoint' not in sys.argv:
        load_safely_from_now_on()
    try:
        main()
    except (UserError, ValueError, FloatingPointError, OSError) as error:
        message = _explain(error)
        wants_trace = '--traceback' in sys.argv or os.environ.get('MMVIL_TRACEBACK', '0') != '0'
        if wants_trace or message is None:
            raise
        # Every process knows the same, but each its own samples.
        if is_first_process() or isinstance(error, SampleError):
            print(f'error: {message}', file=sys.stderr)
        sys.exit(2)
    leave_process_group()


def leave_process_group() -> None:
    """End the threads by which CPU processes communicate, while Python still runs.

    Gloo's may still hold a tensor that another process has received already. To free it they need
    Python, and one that finds Python gone aborts the process, after all its work was done.
    """
    if is_distributed():
        gc.collect()  # the model's wrapper holds the group, too
        torch.distributed.destroy_process_group()


def is_first_process() -> bool:
    """Whether this is the process of a training that speaks. Known before processes connect."""
    return os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0')) == '0'


def _explain(error: Exception):
    """One line for what the user can put right, None for anything else."""
    if isinstance(error, SampleError):  # in a worker process, torch packs it into its trace
        return str(error).strip().splitlines()[-1].rpartition('SampleError: ')[2]
    if isinstance(error, UntrustedCheckpointError):
        return f'{error}. If you trust its source, add --trust-checkpoint.'
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            return None
        file = f' while writing {error.filename}' if error.filename else ''
        return (
            f'{error.strerror}{file}. Checkpoints written before are complete; go on with --resume '
            'when there is room.'
        )
    if isinstance(error, (UserError, FloatingPointError)) or _raised_in_mmvil(error):
        return str(error)
    return None


def _raised_in_mmvil(error: Exception) -> bool:
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return Path(innermost.filename).is_relative_to(Path(mmvil.__file__).parent)


try:
    import torch
    from _malloc import keep_freed_memory
    from mmengine.config import Config, DictAction
    from mmengine.device import get_device
    from mmengine.dist import is_distributed
    from mmengine.hooks import Hook
    from mmengine.model import BaseTTAModel, is_model_wrapper
    from mmengine.registry import DATASETS, MODELS, RUNNERS
    from mmengine.runner import Runner

    import mmvil  # registers the backbone, refuses versions that do not fit
    from mmvil import swap_backbone
    from mmvil.converters import find_official, is_official, vil_to_mmvil
    from mmvil.engine import (
        SampleError,
        UntrustedCheckpointError,
        load_safely_from_now_on,
    )
    from mmvil.engine.shards import is_sharded
except ImportError as import_error:
    print(
        f'error: {import_error}\nHow to install mmvil beside OpenMMLab: see README.md.',
        file=sys.stderr,
    )
    sys.exit(2)


# -- Arguments ------------------------------------------------------------------------------------


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that training and testing have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        'config',
        help='config file, such as configs/upernet_vil_t_ade20k.py; or one that an installed '
        'library brings along, such as mmseg::pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py',
    )
    parser.add_argument(
        '--backbone',
        metavar='VIL',
        help="put ViL in the place of the config's backbone: vil-t, vil-s or vil-b",
    )
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints (default: ./work_dirs/CONFIG_NAME)'
    )
    parser.add_argument('--data-root', help="folder of the data, instead of the config's")
    parser.add_argument(
        '--no-pin-memory', action='store_true', help='turn pin_memory of the dataloaders off'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override settings of the config: model.backbone.arch=base key="[a,b]" key=a,b '
        'key="[(a,b),(c,d)]"; quotes are needed, white space is not allowed',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes were started',
    )
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help='set by launchers'
    )
    parser.add_argument(
        '--check',
        action='store_true',
        help='only check that config, data and checkpoints are in place',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load checkpoints even if they ask for functions that may run code',
    )
    parser.add_argument('--traceback', action='store_true', help='show the whole trace of an error')
    return parser


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and pass the local rank on where mmengine looks for it."""
    try:
        args = parser.parse_args()
    except ValueError:  # from DictAction
        parser.error('--cfg-options wants KEY=VALUE pairs without white space')
    if hasattr(args, 'local_rank'):
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


# -- Config ---------------------------------------------------------------------------------------


def load_config(path: str, options: dict, backbone: Optional[str] = None, **swap) -> Config:
    """Read a config file and merge the command line's options into it.

    Args:
        path (str): The file, or ``LIBRARY::PATH`` for a config of an installed library.
        options (dict): To be merged.
        backbone (str, optional): A ViL to put in the place of the config's backbone first.
        **swap: Options of :func:`mmvil.apis.swap.swap_backbone`.

    Raises:
        UserError: If the file is missing or broken, or needs a library that is not installed.
    """
    library, scoped, inside = path.partition('::')
    if scoped and (spec := importlib.util.find_spec(library)):
        path = str(Path(spec.origin).parent / '.mim' / 'configs' / inside)
    if not os.path.isfile(path):
        known = {config.name: config for config in (ROOT / 'configs').glob('*.py')}
        close = difflib.get_close_matches(Path(path).stem + '.py', known, n=1)
        hint = f'Did you mean {os.path.relpath(known[close[0]])}?' if close else 'See configs/.'
        raise UserError(f'config not found: {path}. {hint}')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise UserError(f'cannot read {path}: {_one_line(error)}') from error
    if backbone is not None:
        cfg = swap_backbone(cfg, backbone, **swap)
    try:
        cfg.merge_from_dict(options)
    except Exception as error:
        raise UserError(f'--cfg-options do not fit {path}: {_one_line(error)}') from error

    libraries = {cfg.get('default_scope', 'mmengine')}
    libraries.update(node['type'].partition('.')[0] for node in _dicts(cfg) if _has_scope(node))
    for library in sorted(libraries):
        if importlib.util.find_spec(library) is None:
            raise UserError(f'{path} needs {library}, which is not installed. See README.md.')
    return cfg


def apply_common_args(cfg: Config, args: argparse.Namespace) -> None:
    """Merge the arguments of ``make_parser`` into a config."""
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)

    for loader in _loaders(cfg):
        if args.no_pin_memory:
            loader.pin_memory = False
        if loader.get('num_workers', 0) == 0:  # else torch refuses persistent workers
            loader.persistent_workers = False
    set_data_root(cfg, args.data_root)


def set_data_root(cfg: Config, data_root) -> None:
    """Let all data sets of a config read from a folder, unless it is None."""
    if data_root is not None:
        for loader in _loaders(cfg):
            for dataset in innermost_datasets(loader.dataset):
                dataset.data_root = data_root


def fit_to_cpu(cfg: Config) -> list:
    """Replace what needs a GPU where there is none.

    Args:
        cfg (Config): Changed in place.

    Returns:
        list[str]: What was replaced, for the log. Empty on a machine with an accelerator.
    """
    if get_device() != 'cpu':
        return []
    keep_freed_memory()
    notes = []
    wrapper = cfg.get('optim_wrapper') or {}
    if wrapper.get('type') == 'AmpOptimWrapper':
        wrapper.type = 'OptimWrapper'
        for option in ('dtype', 'loss_scale', 'use_fsdp'):
            wrapper.pop(option, None)
        notes.append(
            'no GPU: training in float32, because mixed precision (AmpOptimWrapper) needs one'
        )
    sync_norms = [node for node in _dicts(cfg.model) if node.get('type') in ('SyncBN', 'MMSyncBN')]
    for node in sync_norms:
        node.type = 'BN' if cfg.launcher == 'none' else 'mmvil.engine.CPUSyncBatchNorm'
    if sync_norms and cfg.launcher != 'none':
        notes.append('no GPU: CPUSyncBatchNorm stands in for SyncBN, which torch has for GPUs only')
    for loader in _loaders(cfg):
        loader.pin_memory = False

    if cfg.launcher == 'pytorch':
        # Imported later, as DDP does, its functions keep the process group as their default, and
        # leave_process_group could not end it.
        from torch.distributed.nn import functional  # noqa: F401

        # mmengine would choose a CUDA device first; it leaves an existing process group alone.
        torch.distributed.init_process_group('gloo')
        if cfg.get('strategy') is None:
            cfg.model_wrapper_cfg = {
                **dict(type='MMDistributedDataParallel', broadcast_buffers=False),
                **dict(find_unused_parameters=cfg.get('find_unused_parameters', False)),
                **(cfg.get('model_wrapper_cfg') or {}),
                **dict(device_ids=None),
            }
        elif _strategy(cfg) == 'FSDPStrategy':
            cfg.strategy.model_wrapper.device_id = torch.device('cpu')
        notes.append('no GPU: the processes communicate by gloo')
    elif cfg.launcher != 'none':
        raise UserError(f'--launcher {cfg.launcher} needs GPUs; on CPUs use tools/dist_train.sh')
    return notes


def build_runner(cfg: Config, notes=()) -> Runner:
    """Build the runner that a config describes and write ``notes`` into its log.

    Raises:
        UserError: If some part of the config is refused by the class that it configures, or
            cannot be compiled.
    """
    compiles = cfg.get('compile') and cfg.get('strategy') is not None
    if compiles and _strategy(cfg).startswith('DeepSpeed'):
        raise UserError('DeepSpeedStrategy does not compile; leave compile=True out')
    try:
        runner = RUNNERS.build(cfg) if cfg.get('runner_type') else Runner.from_cfg(cfg)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'cannot build what the config describes: {_one_line(error)} (--traceback shows where)'
        ) from error
    if compiles:
        # FlexibleRunner does not read it from the config, and would compile the optimizer's step.
        options = {} if cfg.compile is True else cfg.compile
        runner._compile = dict(target='forward', **options)
    for note in notes:
        runner.logger.warning(note)
    return runner


# -- Checks: what would go wrong later with a worse message, or with none --------------------------


def check_backbone(cfg: Config) -> None:
    """Make sure that our backbones know the options that the config gives them.

    Raises:
        UserError: If one does not, with the option that was probably meant.
    """
    for node in _dicts(cfg.get('model') or {}):
        if str(node.get('type')).rpartition('.')[2] != 'VisionLSTM':
            continue
        known = list(inspect.signature(MODELS.get('mmvil.VisionLSTM')).parameters)
        for key in set(node) - set(known) - {'type', '_scope_'}:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f'Did you mean {close[0]}?' if close else f'It has: {", ".join(known)}.'
            raise UserError(f'VisionLSTM has no option {key!r}. {hint}')


def check_work_dir(cfg: Config) -> None:
    """Make sure that the work dir, or the folder that it will be made in, can be written to.

    Raises:
        UserError: If it cannot.
    """
    folder = Path(cfg.work_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = 'no permission to write' if existing.is_dir() else 'it is a file'
        raise UserError(
            f'cannot use the work dir {folder}: {existing}: {why}. Choose another by --work-dir.'
        )


def check_data(cfg: Config, *loaders: str) -> None:
    """Make sure that what the named dataloaders read is there: folders, images, annotations.

    Raises:
        UserError: If something is missing.
    """
    check_folders(cfg, *loaders)
    for loader in filter(cfg.get, loaders):
        for dataset_cfg in innermost_datasets(cfg[loader].dataset):
            check_annotations_are_there(build_lazily(dataset_cfg, cfg.get('default_scope')))


def check_folders(cfg: Config, *loaders: str) -> None:
    """Make sure that the folders which the named dataloaders read exist and hold images.

    Raises:
        UserError: If one is missing or empty.
    """
    for loader in filter(cfg.get, loaders):
        for dataset_cfg in innermost_datasets(cfg[loader].dataset):
            root = dataset_cfg.get('data_root') or ''
            dataset = build_lazily(dataset_cfg, cfg.get('default_scope'))
            prefix = getattr(dataset, 'data_prefix', {})
            for folder in filter(None, (root, *prefix.values())):
                if '://' not in folder and not os.path.isdir(folder):
                    raise UserError(
                        f'data not found: {os.path.abspath(folder)} ({loader} of the config reads '
                        'it). Put or link the data there, or name its folder by --data-root.'
                    )
            # An empty segmentation data set would make mmengine's InfiniteSampler wait for ever.
            suffix = getattr(dataset, 'img_suffix', '')
            folder = prefix.get('img_path') or ''
            if os.path.isdir(folder) and not any(Path(folder).rglob(f'*{suffix}')):
                raise UserError(f'no images: there is no *{suffix} in {os.path.abspath(folder)}')


def check_annotations_are_there(dataset) -> None:
    """Make sure that each image of a segmentation data set has an annotation.

    Raises:
        UserError: If one has none, as after half a download.
    """
    prefix = getattr(dataset, 'data_prefix', {})
    images, maps = prefix.get('img_path'), prefix.get('seg_map_path')
    if not images or not maps or dataset.ann_file or dataset.test_mode or '://' in images + maps:
        return
    names = stems(images, dataset.img_suffix)
    missing = sorted(names - stems(maps, dataset.seg_map_suffix))
    if missing:
        raise UserError(
            f'{len(missing)} of {len(names)} images in {images} have no annotation in {maps} '
            f'({missing[0]}{dataset.seg_map_suffix}, …). Was the download complete? '
            'tools/check_dataset.py CONFIG lists all that is wrong.'
        )


def stems(folder: str, suffix: str) -> set:
    """Files under a folder that end in a suffix, without it, relative to the folder."""
    found = set()
    for parent, _, files in os.walk(folder, followlinks=True):
        inside = os.path.relpath(parent, folder)
        found.update(os.path.join(inside, f[: -len(suffix)]) for f in files if f.endswith(suffix))
    return {os.path.normpath(name) for name in found}


def check_checkpoint(path: str) -> None:
    """Make sure that a path is a PyTorch checkpoint. URLs are taken on trust.

    Raises:
        UserError: If it is missing or something else.
        ValueError: If there is no official checkpoint of this name.
    """
    if path.startswith('mmvil://'):
        find_official(path)
    if '://' in path or is_sharded(path):
        return
    if os.path.isdir(path):
        raise UserError(
            f'{path} is a folder, but not one that FSDP training has written. The shards of '
            'DeepSpeed become one file by tools/model_converters/merge_shards.py.'
        )
    if not os.path.isfile(path):
        raise UserError(f'checkpoint not found: {os.path.abspath(path)}')
    with open(path, 'rb') as file:
        start = file.read(2)
    if start[:1] != b'\x80' and start != b'PK':  # a pickle, a zip file
        raise UserError(f'{path} is not a PyTorch checkpoint')


def check_config_checkpoints(cfg: Config) -> None:
    """Check the files that ``load_from`` and ``init_cfg`` name."""
    named = [cfg.get('load_from')]
    if _strategy(cfg).startswith('DeepSpeed') and os.path.isdir(cfg.get('load_from') or ''):
        named = []  # its own shards
    named += [node.get('checkpoint') for node in _dicts(cfg) if node.get('type') == 'Pretrained']
    for path in named:
        if path is not None:
            check_checkpoint(path)


def check_fit(model: torch.nn.Module, checkpoint: dict, path: str) -> None:
    """Make sure that a checkpoint holds every tensor of a model in the right shape.

    mmengine only warns about this, and goes on with random weights.

    Raises:
        UserError: If it does not.
    """
    # FSDP itself knows the whole tensors, inside are pieces; it tells them to the first process.
    sharded = hasattr(model, 'summon_full_params')
    while not sharded and (is_model_wrapper(model) or isinstance(model, BaseTTAModel)):
        model = model.module
    given = checkpoint.get('state_dict', checkpoint)
    given = {name.removeprefix('module.'): tensor for name, tensor in given.items()}
    if is_official(given):
        given = vil_to_mmvil(given)  # as the classifier does when it loads
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in given]
    misfits = [name for name in wanted if name in given and not _fits(name, given, wanted)]
    complaints = []
    if missing:
        complaints.append(f'{len(missing)} of {len(wanted)} tensors are missing ({missing[0]}, …)')
    if misfits:
        name = misfits[0]
        complaints.append(
            f'{len(misfits)} have another shape ({name}: {tuple(given[name].shape)} in the file, '
            f'{tuple(wanted[name].shape)} in the model)'
        )
    if complaints:
        raise UserError(
            f'{path} does not fit the config: {" and ".join(complaints)}. '
            'Test and resume with the config that it was trained with.'
        )


class CheckFitHook(Hook):
    """Refuses a checkpoint that does not fit, when the runner loads it."""

    def after_load_checkpoint(self, runner, checkpoint):
        check_fit(runner.model, checkpoint, runner._load_from or 'the checkpoint')


# -- Helpers ---------------------------------------------------------------------------------------


def _strategy(cfg: Config) -> str:
    """Class name of the strategy of a FlexibleRunner; empty for a plain Runner."""
    return (cfg.get('strategy') or {}).get('type', '').rpartition('.')[2]


def _one_line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


def _dicts(node):
    """Every dict inside a config."""
    if isinstance(node, (dict, Config)):
        if isinstance(node, dict):
            yield node
        for _, value in node.items():
            yield from _dicts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _dicts(value)


def _has_scope(node: dict) -> bool:
    return isinstance(node.get('type'), str) and '.' in node['type']


def _loaders(cfg: Config) -> list:
    names = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    return [cfg[name] for name in names if cfg.get(name) is not None]


def innermost_datasets(dataset: dict):
    """The innermost datasets: wrappers such as RepeatDataset and ConcatDataset hold others."""
    inner = dataset.get('datasets') or [dataset[key] for key in ('dataset',) if key in dataset]
    if not inner:
        yield dataset
    for each in inner:
        yield from innermost_datasets(each)


def build_lazily(dataset_cfg: dict, scope: str):
    """The dataset object, which knows its paths, without reading its list of files."""
    with DATASETS.switch_scope_and_registry(scope) as registry:
        try:
            return registry.build({**dataset_cfg, 'lazy_init': True, 'pipeline': []})
        except Exception:  # it will be built again in earnest, and complain then
            return None


def _fits(name: str, given: dict, wanted: dict) -> bool:
    if name.endswith('pos_embed'):  # the backbone resizes its grid
        return given[name].shape[-1] == wanted[name].shape[-1]
    return given[name].shape == wanted[name].shape
