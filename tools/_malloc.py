# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""A setting of the C library that makes layers on a CPU faster."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep up to 512 MiB of freed memory for the next layer.

    It would hand back tensors of some megabytes when they are freed, and every page of the next one
    would cost a fault, a quarter of a small model's time. What the environment sets has precedence.
    Without glibc nothing happens.
    """
    if any(name.startswith('MALLOC_') for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # its largest
    mallopt(M_TRIM_THRESHOLD, 512 * 2**20)
