# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import os
import time
from dataclasses import dataclass

import pytest

from mmvil.cli import run_queue
from mmvil.cli.errors import UserError


def test_claims_grant_a_run_once(tmp_path):
    claims, others = run_queue.Claims(tmp_path), run_queue.Claims(tmp_path)
    claim = claims.claim('a')
    assert others.states(['a', 'b']) == dict(a='running', b='open')
    assert others.claim('a') is None
    claim.finish(dict(accuracy=1.0))
    assert others.states(['a'])['a'] == 'done' and others.result('a') == dict(accuracy=1.0)
    assert others.claim('a') is None


def test_stale_claims_are_taken_over(tmp_path):
    claims = run_queue.Claims(tmp_path, stale_after=1, max_attempts=2)
    begun = tmp_path / 'a.attempt-1'
    begun.touch()
    os.utime(begun, (0, time.time() - 100))
    assert claims.states(['a'])['a'] == 'running'  # at first sight
    time.sleep(0.3)
    os.utime(begun, (0, time.time() - 100))
    assert claims.states(['a'])['a'] == 'running'  # it was touched since
    time.sleep(0.3)
    assert claims.states(['a'])['a'] == 'again'
    claim = claims.claim('a')
    assert claim.attempt == 2
    claim.fail('Traceback\nValueError: no')
    assert claims.states(['a'])['a'] == 'failed' and claims.last_error('a') == 'ValueError: no'
    claims.forget_attempts('a')
    assert claims.states(['a'])['a'] == 'open'


def test_claims_send_heartbeats_and_detect_a_loss(tmp_path):
    claims = run_queue.Claims(tmp_path, stale_after=0.5)
    claim = claims.claim('a')
    time.sleep(1)
    assert claims.states(['a'])['a'] == 'running' and not claim.lost
    (tmp_path / 'a.attempt-2').touch()  # as if this process had been suspended for long
    time.sleep(0.5)
    assert claim.lost
    with pytest.raises(run_queue.ClaimLost):
        claim.finish(dict(accuracy=1.0))
    assert claims.result('a') is None


def test_last_error_is_that_of_the_newest_attempt(tmp_path):
    for attempt in (9, 10):
        path = tmp_path / f'a.attempt-{attempt}.error'
        path.write_text(f'attempt {attempt}\n')
        os.utime(path, (attempt, attempt))
    assert run_queue.Claims(tmp_path).last_error('a') == 'attempt 10'


def test_released_claims_leave_no_files(tmp_path):
    claims = run_queue.Claims(tmp_path)
    claims.claim('a').release()
    assert not os.listdir(tmp_path) and claims.claim('a').attempt == 1


def test_claims_by_many_threads_at_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    claims = run_queue.Claims(tmp_path)
    names = [f'run{i}' for i in range(20)]
    with ThreadPoolExecutor(8) as pool:
        granted = list(pool.map(claims.claim, names * 8))
    assert sum(claim is not None for claim in granted) == len(names)
    for claim in filter(None, granted):
        claim.release()


# -- work ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    name: str


def work(claims, names, do):
    """Do the runs; return what was said."""
    said, runs = [], [Run(name) for name in names]

    def states():
        found = claims.states(names)
        return {run: found[run.name] for run in runs}

    run_queue.work(claims, states, do, lambda run, result: f'{run.name}: {result}', said.append)
    return said


def test_work_does_open_runs_and_publishes_their_results(tmp_path):
    claims = run_queue.Claims(tmp_path)
    assert work(claims, ['a', 'b'], lambda run, claim: dict(x=run.name)) == [
        "a: {'x': 'a'}",
        "b: {'x': 'b'}",
    ]
    assert claims.result('b') == dict(x='b')
    assert work(claims, ['a', 'b'], lambda run, claim: dict(x='other')) == []


def test_work_tries_a_failed_run_again_and_stops_after_three_in_a_row(tmp_path):
    claims = run_queue.Claims(tmp_path)

    def fail_once(run, claim):
        if claim.attempt == 1:
            raise KeyError('x')
        return {}

    failed, done = work(claims, ['a'], fail_once)
    assert "FAILED (attempt 1), KeyError: 'x'" in failed and done == 'a: {}'

    def fail(run, claim):
        raise KeyError('y')

    with pytest.raises(UserError, match="three runs in a row failed.*KeyError: 'y'"):
        work(claims, ['b', 'c', 'd'], fail)
    assert claims.last_error('d') == "KeyError: 'y'"


def test_work_releases_a_run_when_interrupted(tmp_path):
    claims = run_queue.Claims(tmp_path)

    def interrupt(run, claim):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(claims, ['a'], interrupt)
    assert claims.states(['a']) == dict(a='open')
