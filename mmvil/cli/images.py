# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Former place of what reads and shows images."""

from .inference import ImageReader, build_pipeline, data_preprocessor, loads, loads_bgr, picture
