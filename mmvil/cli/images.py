# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Former place of parts of :mod:`mmvil.cli.inference`."""

from .inference import ImageReader, data_preprocessor

__all__ = ['ImageReader', 'data_preprocessor']
