# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Call a script of tools/ as a command line does, without paying for its imports each time."""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

# A server imports the libraries once; each call is a fork of it, which knows nothing of the others
# and nothing of the test session (its threads, its CUDA context, its registries).
_SERVER = multiprocessing.get_context('forkserver')
_SERVER.set_forkserver_preload(
    [
        'tests.mmcv_ops',
        'mmengine.runner',
        'mmseg.apis',
        'mmseg.models',
        'mmseg.datasets',
        'mmpretrain',
    ]
)


def call_tool_in_processes(count, script, *arguments):
    """Run a script as torchrun does with so many processes.

    Returns:
        str: What the first one printed.
    """
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    together = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=str(count))
    command = [str(part) for part in (script, *arguments, '--launcher', 'pytorch')]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(count)]
        processes = [
            _SERVER.Process(
                target=_run,
                args=(command, output, dict(RANK=output.name, LOCAL_RANK=output.name, **together)),
            )
            for output in outputs
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=300)
        printed = [output.read_text() for output in outputs]
        for process in processes:
            process.kill()
    statuses = [process.exitcode for process in processes]
    assert statuses == [0] * count, '\n'.join(text[-6000:] for text in printed)
    return printed[0]


def call_tool(script, *arguments, status=0):
    """Run a script in a process of its own.

    Args:
        script (Path): The script.
        *arguments: Its command line, converted to strings.
        status (int): The expected exit status.

    Returns:
        str: What it printed, stdout and stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, 'output')
        command = [str(part) for part in (script, *arguments)]
        process = _SERVER.Process(target=_run, args=(command, output))
        process.start()
        process.join(timeout=300)
        printed = output.read_text()
        if process.is_alive():
            process.kill()
            raise TimeoutError(f'{command} ran for 300 seconds and printed:\n{printed}')
    assert process.exitcode == status, printed[-6000:]
    return printed


def losses(work_dir):
    """{iteration: training loss} of a work dir; what was trained again replaces what was lost."""
    found = {}
    for log in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        found.update({line['step']: line['loss'] for line in lines if 'loss' in line})
    return found


def _run(command, output, environment=None):
    """In the new process: become `python script arguments > output 2>&1`."""
    import torch

    os.environ.update(environment or {})

    torch.set_num_threads(1)
    with output.open('w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    runpy.run_path(command[0], run_name='__main__')
