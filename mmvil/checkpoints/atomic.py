# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Write checkpoints atomically: complete, or not at all."""

import os
import shutil

from mmengine.fileio import LocalBackend, register_backend

PARTIAL = '.partial'


class AtomicLocalBackend(LocalBackend):
    """Local files that appear under their name only when they are complete and on the disk.

    mmengine itself leaves half a file as the newest checkpoint when it is killed or the disk is
    full; with ``CheckpointHook(backend_args=ATOMIC)`` it does not.
    """

    def put(self, obj: bytes | memoryview, filepath: str | os.PathLike) -> None:
        """Write bytes to a file, or leave it as it was."""
        filepath = os.fspath(filepath)
        folder = os.path.dirname(filepath) or '.'
        os.makedirs(folder, exist_ok=True)
        partial = filepath + PARTIAL
        try:
            with open(partial, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, filepath)
        except BaseException as error:
            if os.path.exists(partial):
                os.remove(partial)
            if isinstance(error, OSError):  # say which file, in words that the caller may show
                raise OSError(error.errno, os.strerror(error.errno or 0), filepath) from error
            raise
        if os.name == 'posix':  # the new name, too, survives a loss of power
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


register_backend('mmvil_atomic', AtomicLocalBackend, force=True)
ATOMIC = dict(backend='mmvil_atomic')  # the ``backend_args`` of mmengine's functions and hooks


def replace(source: str, target: str) -> None:
    """Give a complete file or folder its final name, which an older checkpoint may have."""
    if os.path.isdir(target):
        shutil.rmtree(target)
    os.replace(source, target)
