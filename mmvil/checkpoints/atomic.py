# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Write checkpoints atomically: complete, or not at all."""

import os
import shutil

from mmengine.fileio import LocalBackend, register_backend

PARTIAL = '.partial'


class AtomicLocalBackend(LocalBackend):
    """Local files that appear under their name only once they are complete and on disk.

    By default, mmengine leaves a truncated file as the newest checkpoint if it is killed or the
    disk is full. ``CheckpointHook(backend_args=ATOMIC)`` prevents this.
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
            if isinstance(error, OSError):  # name the file, in a message for users
                raise OSError(error.errno, os.strerror(error.errno or 0), filepath) from error
            raise
        if os.name == 'posix':  # so that the new name survives a power failure, too
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


register_backend('mmvil_atomic', AtomicLocalBackend, force=True)
ATOMIC = dict(backend='mmvil_atomic')  # the ``backend_args`` of mmengine's functions and hooks


def replace(source: str, target: str) -> None:
    """Rename a complete file or folder to its final name, replacing an older checkpoint."""
    if os.path.isdir(target):
        shutil.rmtree(target)
    os.replace(source, target)
