# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Distribute runs over processes and machines with files in a shared folder, without a server.

A run has a name. Three kinds of files store its state:

    NAME.json             its result, complete as soon as it exists.
    NAME.attempt-K        the K-th attempt has begun; its process touches this file regularly.
    NAME.attempt-K.error  the K-th attempt failed; this is the trace.

An attempt begins by creating its file exclusively, which a file system (including NFS) allows for
one process only. It ends when it fails, or when its file was not touched for a while; then any
process may begin attempt K + 1. No file is moved or reused, so two processes never hold the same
run. The clocks of the machines need not agree: ages are measured by the clock of the file system.

File locks of the operating system would need no heartbeat. But some cluster file systems apply them
within one machine only, without an error, and others keep those of a crashed machine.
"""

import json
import os
import socket
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError, one_line


class ClaimLost(Exception):
    """Another process has taken over a run, because this one sent no heartbeat for too long."""


class Claims:
    """Runs in a shared folder.

    Args:
        folder (str | Path): Created if missing.
        stale_after (float): Seconds without a heartbeat after which an attempt counts as killed.
            Default: 300.
        max_attempts (int): Attempts after which a run counts as failed. Default: 3.
    """

    def __init__(self, folder: str | Path, stale_after: float = 300, max_attempts: int = 3) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stale_after = stale_after
        self.max_attempts = max_attempts
        self.heartbeat = stale_after / 10
        self._stale_since = {}

    def states(self, names: list[str]) -> dict[str, str]:
        """State of each run: 'done', 'running', 'failed', 'open', or 'again' (open after a
        failure).
        """
        return {name: state for name, (state, _) in self._read_states(names).items()}

    def claim(self, name: str) -> 'Claim | None':
        """Begin a run, or return None if it is not open."""
        state, last = self._read_states([name])[name]
        if state not in ('open', 'again'):
            return None
        try:
            with (self.folder / f'{name}.attempt-{last + 1}').open('x') as file:
                file.write(f'{socket.gethostname()}, process {os.getpid()}\n')
        except FileExistsError:
            return None
        claim = Claim(self, name, last + 1)
        if claim.superseded() or self.result_path(name).exists():  # in the meantime
            claim.release()
            return None
        return claim

    def result(self, name: str) -> dict | None:
        """Result of a finished run, otherwise None."""
        path = self.result_path(name)
        return json.loads(path.read_text()) if path.exists() else None

    def result_path(self, name: str) -> Path:
        return self.folder / f'{name}.json'

    def last_error(self, name: str) -> str:
        """Last line of the latest traceback of a run."""
        traces = self.folder.glob(f'{name}.attempt-*.error')
        newest = max(traces, key=os.path.getmtime, default=None)
        lines = newest.read_text().strip().splitlines() if newest else []
        return lines[-1] if lines else 'its process was killed'

    def forget_attempts(self, name: str) -> None:
        """Allow a failed run to be tried again."""
        for path in self.folder.glob(f'{name}.attempt-*'):
            path.unlink(missing_ok=True)

    def _read_states(self, names: list[str]) -> dict[str, tuple[str, int]]:
        """State of each run, and number of its last attempt."""
        files = set(os.listdir(self.folder))
        last = dict.fromkeys(names, 0)
        for file in files:
            name, _, number = file.rpartition('.attempt-')
            if name in last and number.isdigit():
                last[name] = max(last[name], int(number))
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix='.clock-') as file:
            now = os.fstat(file.fileno()).st_mtime
        return {name: (self._state(name, last[name], files, now), last[name]) for name in names}

    def _state(self, name: str, attempt: int, files: set, now: float) -> str:
        if f'{name}.json' in files:
            return 'done'
        if not attempt:
            return 'open'
        if f'{name}.attempt-{attempt}.error' not in files:
            try:
                touched = (self.folder / f'{name}.attempt-{attempt}').stat().st_mtime
            except FileNotFoundError:  # just released
                return 'open'
            if now - touched < self.stale_after:
                return 'running'
            # Not dead at first sight: after a pause of the machine, all look dead for one
            # heartbeat.
            since = self._stale_since.setdefault((name, attempt, touched), time.monotonic())
            if time.monotonic() - since < 2 * self.heartbeat:
                return 'running'
        return 'failed' if attempt >= self.max_attempts else 'again'


class Claim:
    """One attempt at a run. A thread sends heartbeats until it is finished, failed or released."""

    def __init__(self, claims: Claims, name: str, attempt: int) -> None:
        self.claims = claims
        self.name = name
        self.attempt = attempt
        self.path = claims.folder / f'{name}.attempt-{attempt}'
        self.lost = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, daemon=True)
        self._thread.start()

    def finish(self, result: dict) -> None:
        """Publish the result.

        Raises:
            ClaimLost: If another process has taken over the run.
        """
        self._stop_heartbeat()
        if self.superseded():
            raise ClaimLost(self.name)
        write(self.claims.result_path(self.name), json.dumps(result, indent=1) + '\n')

    def fail(self, trace: str) -> None:
        """Publish the traceback of a failed attempt."""
        self._stop_heartbeat()
        write(self.path.with_name(self.path.name + '.error'), trace)

    def release(self) -> None:
        """Withdraw the attempt as if it had never begun."""
        self._stop_heartbeat()
        self.path.unlink(missing_ok=True)

    def superseded(self) -> bool:
        """Whether another process has begun the next attempt."""
        return self.path.with_name(f'{self.name}.attempt-{self.attempt + 1}').exists()

    def _send_heartbeats(self) -> None:
        while not self._stopped.wait(self.claims.heartbeat):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                self.lost = True
            except OSError:
                continue  # a temporary outage of the file server
            self.lost = self.lost or self.superseded()

    def _stop_heartbeat(self) -> None:
        self._stopped.set()
        self._thread.join()


def write(path: Path, text: str) -> None:
    """Write a file atomically: readers see all of it or none."""
    temporary = path.with_name(f'.{path.name}.{socket.gethostname()}-{os.getpid()}')
    temporary.write_text(text)
    os.replace(temporary, path)


def work(
    claims: Claims,
    states: Callable[[], dict],
    execute: Callable[[Any, Claim], dict],
    describe: Callable[[Any, dict], str],
    log: Callable[[str], None],
) -> None:
    """Do open runs until none is left in any process.

    Args:
        claims (Claims): The shared folder.
        states (Callable): Returns {run: state} for the runs known so far; each run has a ``name``.
        execute (Callable): Does a run and returns its result.
        describe (Callable): Returns a line about a run and its published result.
        log (Callable): Reports a line.

    Raises:
        UserError: If three runs in a row have failed.
    """
    failed = set()  # since the last success
    waiting = False
    while unfinished := [run for run, state in states().items() if state not in ('done', 'failed')]:
        claimed = ((run, claims.claim(run.name)) for run in unfinished)
        run, claim = next((pair for pair in claimed if pair[1]), (None, None))
        if claim is None:
            if not waiting:
                log('Other processes are doing the remaining runs; waiting for them.')
            waiting = True
            time.sleep(min(5.0, claims.heartbeat))
            continue

        waiting = False
        try:
            result = execute(run, claim)
            claim.finish(result)
            failed.clear()
            log(describe(run, result))
        except ClaimLost:
            claim.release()
            log(f'{run}: no heartbeat for too long; another process has taken over')
        except Exception as error:
            claim.fail(traceback.format_exc())
            failed.add(run)
            reason = textwrap.shorten(one_line(error), 200, placeholder='…')
            log(f'{run}: FAILED (attempt {claim.attempt}), {reason}')
            if len(failed) == 3:
                raise UserError(
                    'stopped, because three runs in a row failed, which suggests a common '
                    f'cause. The last one: {reason}. Tracebacks: {claims.folder}/*.error'
                ) from None
        except BaseException:  # Ctrl-C, SIGTERM
            claim.release()
            raise
