# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Checkpoint files: the published ones, keys, safe loading, atomic saving, resuming, shards."""

from .channels import adapt_input_channels
from .keys import infer_architecture, is_official, official_names, vil_to_mmvil
from .official import OFFICIAL_CHECKPOINTS, OFFICIAL_URL, OfficialCheckpoint, find_official

__all__ = [
    'OFFICIAL_CHECKPOINTS',
    'OFFICIAL_URL',
    'OfficialCheckpoint',
    'adapt_input_channels',
    'find_official',
    'infer_architecture',
    'is_official',
    'official_names',
    'vil_to_mmvil',
]
