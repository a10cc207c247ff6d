# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Building blocks as plain ``nn.Module``, not registered."""

from .block_stack import BlockStack
from .drop_path import DropPath
from .embed import PatchEmbed, resize_pos_embed
from .pyramid import FeaturePyramid
from .vil_block import HeadwiseLinear, TokenConv, ViLBlock

__all__ = [
    'BlockStack',
    'DropPath',
    'FeaturePyramid',
    'HeadwiseLinear',
    'PatchEmbed',
    'TokenConv',
    'ViLBlock',
    'resize_pos_embed',
]
