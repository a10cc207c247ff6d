# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Former name of :mod:`mmvil.checkpoints`, kept for one release."""

from ..checkpoints import *  # noqa: F403
from ..checkpoints import __all__  # noqa: F401
