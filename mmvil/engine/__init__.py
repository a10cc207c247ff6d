# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What training needs to know about the depth of a ViL model."""

from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['LayerDecayOptimWrapperConstructor']
