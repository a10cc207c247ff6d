# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Replace the backbone of an existing config with Vision-LSTM."""

from .swap import swap_backbone

__all__ = ['swap_backbone']
