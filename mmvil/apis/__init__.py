# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What people call by hand. The only part of mmvil that names mmseg, mmpretrain, mmdet or timm."""

from .models import register_models

__all__ = ['register_models']
