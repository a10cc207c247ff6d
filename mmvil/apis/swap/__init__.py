# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Vision-LSTM in place of the backbone of an existing config."""

from .swap import swap_backbone

__all__ = ['swap_backbone']
