# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Distribute runs over processes and machines by files in one folder, without a server.

A run has a name. Three kinds of files hold its state:

    NAME.json             its result, complete as soon as it exists.
    NAME.attempt-K        the K-th attempt has begun; its process touches this file regularly.
    NAME.attempt-K.error  the K-th attempt failed; this is the trace.

An attempt begins by creating its file exclusively, which a file system (NFS, too) grants to one
process only. It ends when it fails, or when its file was not touched for a while: then its process
was killed, and any process may begin attempt K + 1. No file is moved or used twice, so that no two
processes ever hold one run. Ages are measured by the clock of the file system, so that the clocks
of the machines need not agree. No process is declared dead at first sight, because after a pause of
the whole machine all of them look dead until their next heartbeat.
"""

import json
import os
import re
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
    """Another process has taken a run over, because this one gave no sign of life for too long."""


class Claims:
    """Runs in a shared folder.

    Args:
        folder (str | Path): Created if missing.
        stale_after (float): Seconds without a heartbeat after which an attempt counts as killed.
            Default: 300.
        max_attempts (int): Attempts after which a run counts as failed. Default: 3.
    """

    def __init__(
        self, folder: str | Path, stale_after: float = 300.0, max_attempts: int = 3
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stale_after = stale_after
        self.max_attempts = max_attempts
        self.heartbeat = stale_after / 10
        self._suspects = {}

    def states(self, names: list[str]) -> dict[str, str]:
        """State of each run: 'done', 'running', 'failed', 'open', or 'again': open once more."""
        files = set(os.listdir(self.folder))
        attempts = self._attempts(files)
        now = self._now()
        return {name: self._state(name, files, attempts.get(name, 0), now) for name in names}

    def claim(self, name: str) -> 'Claim | None':
        """Begin a run, or return None if it is not open."""
        files = set(os.listdir(self.folder))
        attempt = self._attempts(files).get(name, 0)
        if self._state(name, files, attempt, self._now()) not in ('open', 'again'):
            return None
        attempt += 1
        path = self.folder / f'{name}.attempt-{attempt}'
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return None
        with os.fdopen(file, 'w') as stream:
            stream.write(f'{socket.gethostname()}, process {os.getpid()}\n')
        claim = Claim(self, name, attempt)
        if claim.superseded() or self.result_path(name).exists():  # since we looked
            claim.release()
            return None
        return claim

    def result(self, name: str) -> dict | None:
        """Result of a finished run, else None."""
        try:
            return json.loads(self.result_path(name).read_text())
        except FileNotFoundError:
            return None

    def last_error(self, name: str) -> str:
        """Last line of the newest trace of a run."""
        traces = sorted(self.folder.glob(f'{name}.attempt-*.error'))
        lines = traces[-1].read_text().strip().splitlines() if traces else []
        return lines[-1] if lines else 'its process was killed'

    def forget_attempts(self, name: str) -> None:
        """Let a failed run be tried again."""
        for path in self.folder.glob(f'{name}.attempt-*'):
            path.unlink(missing_ok=True)

    def result_path(self, name: str) -> Path:
        return self.folder / f'{name}.json'

    def _state(self, name: str, files: set, attempt: int, now: float) -> str:
        if f'{name}.json' in files:
            return 'done'
        if not attempt:
            return 'open'
        if f'{name}.attempt-{attempt}.error' not in files:
            try:
                touched = (self.folder / f'{name}.attempt-{attempt}').stat().st_mtime
            except FileNotFoundError:  # just released
                return 'open'
            if not self._is_dead(name, attempt, touched, now):
                return 'running'
        return 'failed' if attempt >= self.max_attempts else 'again'

    def _is_dead(self, name: str, attempt: int, touched: float, now: float) -> bool:
        """Whether an attempt is stale and has been since two heartbeats ago, by our own clock."""
        if now - touched < self.stale_after:
            return False
        since = self._suspects.setdefault((name, attempt, touched), time.monotonic())
        return time.monotonic() - since >= 2 * self.heartbeat

    @staticmethod
    def _attempts(files) -> dict[str, int]:
        """Number of the last attempt of each run."""
        last = {}
        for file in files:
            match = re.fullmatch(r'(.+)\.attempt-(\d+)', file)
            if match:
                last[match[1]] = max(last.get(match[1], 0), int(match[2]))
        return last

    def _now(self) -> float:
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix='.clock-') as file:
            return os.fstat(file.fileno()).st_mtime


class Claim:
    """One attempt at a run. A thread sends heartbeats until it is finished, failed or released."""

    def __init__(self, claims: Claims, name: str, attempt: int) -> None:
        self.claims = claims
        self.name = name
        self.attempt = attempt
        self.path = claims.folder / f'{name}.attempt-{attempt}'
        self.lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()

    def finish(self, result: dict) -> None:
        """Publish the result.

        Raises:
            ClaimLost: If another process has taken the run over.
        """
        self._end()
        if self.superseded():
            raise ClaimLost(self.name)
        write(self.claims.result_path(self.name), json.dumps(result, indent=1) + '\n')

    def fail(self, trace: str) -> None:
        """Publish that the attempt failed, and why."""
        self._end()
        write(self.path.with_name(self.path.name + '.error'), trace)

    def release(self) -> None:
        """Withdraw the attempt as if it had not begun."""
        self._end()
        self.path.unlink(missing_ok=True)

    def superseded(self) -> bool:
        """Whether another process has begun the next attempt."""
        return self.path.with_name(f'{self.name}.attempt-{self.attempt + 1}').exists()

    def _keep_alive(self) -> None:
        while not self._over.wait(self.claims.heartbeat):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                self.lost = True
            except OSError:
                continue  # a file server that is away for a moment
            self.lost = self.lost or self.superseded()

    def _end(self) -> None:
        self._over.set()
        self._thread.join()


def write(path: Path, text: str) -> None:
    """Write a file atomically: readers see all of it or nothing."""
    temporary = path.with_name(f'.{path.name}.{socket.gethostname()}-{os.getpid()}')
    temporary.write_text(text)
    os.replace(temporary, path)


def work(
    claims: Claims,
    states: Callable[[], dict],
    do: Callable[[Any, Claim], dict],
    describe: Callable[[Any, dict], str],
    say: Callable[[str], None],
) -> None:
    """Do open runs until none is left, here or elsewhere.

    Args:
        claims (Claims): The shared folder.
        states (Callable): Returns {run: state} of the runs known by now, see
            :meth:`Claims.states`; each run has a ``name``.
        do (Callable): Does a run and returns its result.
        describe (Callable): One line on a run and its result, once it is published.
        say (Callable): Reports a line.

    Raises:
        UserError: If three runs in a row have failed.
    """
    failed = set()  # since the last success
    waiting = False
    while True:
        now = states()
        open_runs = [run for run, state in now.items() if state in ('open', 'again')]
        claimed = ((run, claims.claim(run.name)) for run in open_runs)
        run, claim = next(((run, claim) for run, claim in claimed if claim), (None, None))
        if claim is None:
            if not open_runs and 'running' not in now.values():
                return
            if not waiting:
                say('The rest is being done by other processes; waiting for them.')
            waiting = True
            time.sleep(min(5.0, claims.heartbeat))
            continue

        waiting = False
        try:
            result = do(run, claim)
            claim.finish(result)
            failed.clear()
            say(describe(run, result))
        except ClaimLost:
            claim.release()
            say(f'{run}: out of touch for too long, another process does it')
        except Exception as error:
            claim.fail(traceback.format_exc())
            failed.add(run)
            reason = textwrap.shorten(one_line(error), 200, placeholder='…')
            say(f'{run}: FAILED (attempt {claim.attempt}), {reason}')
            if len(failed) == 3:
                raise UserError(
                    'stopped, because three runs in a row failed; that is hardly the fault of the '
                    f'runs. The last one: {reason}. Traces: {claims.folder}/*.error'
                ) from None
        except BaseException:  # Ctrl-C, SIGTERM
            claim.release()
            raise
