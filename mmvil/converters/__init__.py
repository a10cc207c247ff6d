# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Former name of :mod:`mmvil.checkpoints`, kept for one release."""

import warnings

from ..checkpoints import *  # noqa: F403
from ..checkpoints import __all__  # noqa: F401

warnings.warn(
    'mmvil.converters is now mmvil.checkpoints.', category=DeprecationWarning, stacklevel=2
)
