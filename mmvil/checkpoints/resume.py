# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Find the checkpoint to resume training from."""

import os
import re
import zipfile
from pathlib import Path

from .safe_load import DamagedCheckpointError, load_file


def verify(path: str | os.PathLike, trusted: bool = False) -> None:
    """Check that a checkpoint file is complete: its checksums are correct, and it loads.

    Args:
        path (str): The file.
        trusted (bool): Allow it to run code. Default: False.

    Raises:
        DamagedCheckpointError: If it is not complete.
        UntrustedCheckpointError: If it is not trusted and may run code.
    """
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
            broken = error
        if broken is not None:
            raise DamagedCheckpointError(f'{path} is damaged: {broken}')
    load_file(path, 'cpu', trusted)


def find_good_checkpoint(
    work_dir: str | os.PathLike, trusted: bool = False
) -> tuple[str | None, list[str]]:
    """Find the newest complete checkpoint in a work dir; checkpoints may run code if ``trusted``.

    Returns:
        tuple[str | None, list[str]]: Its path, or None; and for each newer checkpoint, the reason
        why it was skipped.
    """
    paths = {path for path in Path(work_dir).glob('*.pth') if _step(path) >= 0}
    named = Path(work_dir, 'last_checkpoint')  # for hooks with another out_dir
    if named.is_file() and named.read_text().strip():
        paths.add(Path(named.read_text().strip()))
    problems = []
    existing = filter(Path.exists, paths)
    for path in sorted(existing, key=lambda p: (p.stat().st_mtime, _step(p)), reverse=True):
        try:
            if path.is_file():  # otherwise the folder of a sharded checkpoint
                verify(path, trusted)
            return str(path), problems
        except DamagedCheckpointError as error:
            problems.append(str(error))
    return None, problems


def _step(path: Path) -> int:
    match = re.fullmatch(r'(?:iter|epoch)_(\d+)\.pth', path.name)
    return int(match[1]) if match else -1
