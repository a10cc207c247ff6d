# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Functions for users. Only this package and mmvil.cli import mmseg, mmpretrain, mmdet or timm."""

from .convert import convert_checkpoint, fetch_checkpoint, read_checkpoint
from .models import get_model, list_models, register_models
from .swap import swap_backbone

__all__ = [
    'convert_checkpoint',
    'fetch_checkpoint',
    'get_model',
    'list_models',
    'read_checkpoint',
    'register_models',
    'swap_backbone',
]
