# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Share runs among processes and machines by files in one folder, without a server.

A run has a name. Three kinds of files say how it stands:

    NAME.json             its result. Complete as soon as it is there.
    NAME.attempt-K        somebody has begun it, for the K-th time, and touches this file regularly.
    NAME.attempt-K.error  the K-th attempt failed; this is the trace.

An attempt begins by creating its file exclusively, which a file system (NFS, too) grants to one
process only. It is over when it has failed, or when its file was not touched for a while: then its
process was killed, and anyone may begin attempt K + 1. No file is moved or used twice, so there is
no moment at which two processes hold one run. Ages are told by the clock of the file system, so the
clocks of the machines need not agree. And nobody is declared dead at first sight: after a pause of
the whole machine everybody looks so, until the next sign of life.
"""

import json
import os
import re
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Dict, List, Optional


class ClaimLost(Exception):
    """This process was out of touch for so long that another one has taken its run over."""


class Claims:
    """The runs in a folder.

    Args:
        folder (str | Path): Created if need be.
        stale_after (float): Seconds without a sign of life after which an attempt counts as killed.
        max_attempts (int): How often a run is begun before it counts as failed.
    """

    def __init__(self, folder, stale_after: float = 300.0, max_attempts: int = 3) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stale_after = stale_after
        self.max_attempts = max_attempts
        self.heartbeat = stale_after / 10
        self._suspects = {}

    def states(self, names: List[str]) -> Dict[str, str]:
        """How runs stand: 'done', 'running', 'failed', 'open', or 'again': open, but not new."""
        files = set(os.listdir(self.folder))
        attempts = self._attempts(files)
        now = self._now()
        return {name: self._state(name, files, attempts.get(name, 0), now) for name in names}

    def claim(self, name: str) -> Optional['Claim']:
        """Begin a run, or return None where it is not open, or not any more."""
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

    def result(self, name: str) -> Optional[dict]:
        """What a finished run wrote, else None."""
        try:
            return json.loads(self.result_path(name).read_text())
        except FileNotFoundError:
            return None

    def last_error(self, name: str) -> str:
        """Last line of the last trace of a run."""
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
        """Whether an attempt gives no sign of life, and gave none since it was first suspected."""
        if now - touched < self.stale_after:
            return False
        since = self._suspects.setdefault((name, attempt, touched), time.monotonic())
        return time.monotonic() - since >= 2 * self.heartbeat

    @staticmethod
    def _attempts(files) -> Dict[str, int]:
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
    """One attempt at a run, kept alive by a thread until it ends in one of three ways."""

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
        """Note that the attempt failed, and why."""
        self._end()
        write(self.path.with_name(self.path.name + '.error'), trace)

    def release(self) -> None:
        """Give the run back as if it had not been begun."""
        self._end()
        self.path.unlink(missing_ok=True)

    def superseded(self) -> bool:
        """Whether somebody has begun the next attempt."""
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
    """Write a file so that others see all of it or nothing."""
    temporary = path.with_name(f'.{path.name}.{socket.gethostname()}-{os.getpid()}')
    temporary.write_text(text)
    os.replace(temporary, path)


def work(protocol, train, say):
    """Do open runs until none is left, neither here nor elsewhere."""
    failed = set()  # since the last success
    waiting = False
    while True:
        states = protocol.runs()
        open_runs = [job for job, state in states.items() if state in ('open', 'again')]
        claim = None
        for job in open_runs:
            claim = protocol.claims.claim(job.name)
            if claim is not None:
                break
        if claim is None:
            if not open_runs and 'running' not in states.values():
                return
            if not waiting:
                say('The rest is being done by other processes; waiting for them.')
            waiting = True
            time.sleep(min(5.0, protocol.claims.heartbeat))
            continue

        waiting = False
        start = time.monotonic()
        try:
            accuracy = train(job, claim)
            seconds = time.monotonic() - start
            claim.finish(dict(accuracy=accuracy, seconds=round(seconds, 1)))
            failed.clear()
            say(f'{job}: {accuracy:.2f} % in {_duration(seconds)}; {progress(protocol)}')
        except ClaimLost:
            claim.release()
            say(f'{job}: out of touch for too long, another process does it')
        except Exception:
            trace = traceback.format_exc()
            claim.fail(trace)
            failed.add(job)
            reason = _short(trace.strip().splitlines()[-1])
            say(f'{job}: FAILED (attempt {claim.attempt}), {reason}')
            if len(failed) == 3:
                raise UserError(
                    'stopped, because three runs in a row failed; that is hardly the fault of the '
                    f'runs. The last one: {reason}. Traces: {protocol.claims.folder}/*.error'
                ) from None
        except BaseException:  # Ctrl-C, SIGTERM
            claim.release()
            raise
