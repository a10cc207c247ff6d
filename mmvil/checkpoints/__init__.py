# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Checkpoint files: official checkpoints, key conversion, safe loading, atomic saving, resuming.

Importing this registers ``mmvil://`` and the backend 'mmvil_atomic' with mmengine.
"""

from .atomic import ATOMIC, AtomicLocalBackend
from .channels import adapt_input_channels
from .compare import describe_misfit
from .keys import infer_architecture, is_official, official_names, vil_to_mmvil, weights_of
from .loaders import (
    cached_path,
    fetch_checkpoint,
    load_safely,
    read_checkpoint,
    register_safe_loaders,
)
from .official import OFFICIAL_CHECKPOINTS, OFFICIAL_URL, OfficialCheckpoint, find_official
from .resume import find_good_checkpoint, verify
from .safe_load import DamagedCheckpointError, UntrustedCheckpointError

__all__ = [
    'ATOMIC',
    'AtomicLocalBackend',
    'DamagedCheckpointError',
    'OFFICIAL_CHECKPOINTS',
    'OFFICIAL_URL',
    'OfficialCheckpoint',
    'UntrustedCheckpointError',
    'adapt_input_channels',
    'cached_path',
    'describe_misfit',
    'fetch_checkpoint',
    'find_good_checkpoint',
    'find_official',
    'infer_architecture',
    'is_official',
    'load_safely',
    'official_names',
    'read_checkpoint',
    'register_safe_loaders',
    'verify',
    'vil_to_mmvil',
    'weights_of',
]
