# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Logging of tensor functions and layers, which have no runner."""

import logging
from functools import lru_cache


@lru_cache
def warn_once(message: str) -> None:
    """Log a warning once per process."""
    logging.getLogger('mmvil').warning(message)
