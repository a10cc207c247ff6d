# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Pure functions from foreign state dicts to ours."""

from .vil import is_official, vil_to_mmvil

__all__ = ['is_official', 'vil_to_mmvil']
