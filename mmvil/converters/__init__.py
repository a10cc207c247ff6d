# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Pure functions from foreign state dicts to ours, and the list of what the authors publish."""

from .channels import adapt_input_channels
from .official import OFFICIAL_CHECKPOINTS, OFFICIAL_URL, OfficialCheckpoint, find_official
from .vil import infer_architecture, is_official, official_names, vil_to_mmvil

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
