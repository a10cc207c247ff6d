# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The log of the tensor functions and layers, which know no runner."""

import logging
from functools import lru_cache


@lru_cache
def warn_once(message: str) -> None:
    """Log a warning, the first time that it comes up in this process."""
    logging.getLogger('mmvil').warning(message)
