# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Test and measure the GPU kernels in stages, and write a Markdown report.

python tools/analysis_tools/gpu_report.py --out gpu_report
python tools/analysis_tools/gpu_report.py --out gpu_report --stages models cell --minutes 10

Each part of a stage runs in a separate process with a time limit, so that one that crashes or hangs
loses its own numbers only. The report stops at a wrong number. Stages that are not run again keep
their results in the folder: report.md, and a JSON file and a log for each stage.

Exit status: 0, all stages passed; 1, a part failed or hung; 3, a number was wrong.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock, Timer

import torch
from mmengine.fileio import put

from mmvil.cli.errors import UserError
from mmvil.cli.main import at_least, make_parser, parse_args, run
from mmvil.cli.work_dir import ATOMIC

STAGES = Path(__file__).resolve().parents[1] / '.dev_scripts/gpu_stages.py'
STATUS = {'passed': 0, 'failed': 1, 'wrong': 3}
"""Exit statuses of parts and of the report, from best to worst."""
RUNNING = set()
"""Processes of parts, which end with this one."""


def main():
    parser = make_parser(__doc__, whole=True)
    add = parser.add_argument
    add('--out', type=Path, default=Path('gpu_report'), metavar='FOLDER', help='(%(default)s)')
    add('--stages', nargs='+', metavar='NAME', help='stages to run (all)')
    add('--resume', action='store_true', help='skip stages that passed')
    add('--minutes', type=at_least(0, float), default=math.inf, help='time limit (none)')
    add('--quick', action='store_true', help='tiny sizes, to test the command itself')
    add('--device', choices=['cuda', 'cpu'], default='cuda', help='cpu needs --quick (%(default)s)')
    args = parse_args(parser)
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('torch sees no GPU here; --device cpu --quick tests the command itself')
    if args.device == 'cpu' and not args.quick:
        raise UserError('--device cpu needs --quick: the full report takes days on a CPU')
    end = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STATUS['failed']))
    command = [sys.executable, str(STAGES), '--device', args.device, *['--quick'] * args.quick]
    listing = subprocess.run([*command, '--list'], check=True, stdout=subprocess.PIPE)
    plan = json.loads(listing.stdout.splitlines()[-1])  # above it, lines of libraries
    names = [stage['name'] for stage in plan['stages']]
    if unknown := set(args.stages or ()) - set(names):
        raise UserError(f'--stages {min(unknown)} is none of {", ".join(names)}')
    args.out.mkdir(parents=True, exist_ok=True)
    worst = 'passed'
    for stage in plan['stages']:
        before = read(args.out, stage)
        done = before.get('status') == 'passed' and before['environment'] == plan['environment']
        if stage['name'] in (args.stages or names) and not (args.resume and done):
            late = end - time.monotonic() < 1  # no part would end in the rest
            status = 'failed' if late else run_stage(stage, command, plan, args.out, end)
            worst = max(worst, status, key=STATUS.get)
            if late or status == 'wrong':
                break
    print(f'Report: {args.out / "report.md"}')
    sys.exit(STATUS[worst])


def run_stage(stage, command, plan, out, end):
    """Run the parts of a stage until ``end``, write rows as they arrive, and return the status."""
    result = dict(status='running', environment=plan['environment'], rows=[])
    lock, start = Lock(), time.monotonic()

    def write():
        result['seconds'] = round(time.monotonic() - start)
        text = json.dumps(result, indent=1) + '\n'
        put(text.encode(), out / f'{stage["name"]}.json', ATOMIC)
        put(report(plan, out).encode(), out / 'report.md', ATOMIC)

    def add(row):
        with lock:
            result['rows'].append(row)
            print(f'{stage["name"]}: ' + ', '.join(f'{k} {v}' for k, v in row.items()), flush=True)
            write()

    def run(part, following):
        if 'wrong' not in verdicts:
            process = started.pop() if started else start_part(part, command, log)
            if stage['workers'] == 1 and following:  # imports take as long as some parts
                started.append(start_part(following, command, log))
            limit = min(part['limit'], max(1, round(end - time.monotonic(), 1)))
            verdicts.append(run_part(process, {**part, 'limit': limit}, add, log))

    write()
    parts, started, verdicts = stage['parts'], [], []
    log = (out / f'{stage["name"]}.log').open('w')
    with log, ThreadPoolExecutor(stage['workers']) as pool:
        try:
            list(pool.map(run, parts, [*parts[1:], None]))
        finally:  # if interrupted
            for process in list(RUNNING):
                os.killpg(process.pid, signal.SIGKILL)
    result['status'] = max(verdicts, key=STATUS.get)
    write()
    return result['status']


def start_part(part, command, log):
    """Start the process of a part, which waits for a line of input once it has imported."""
    process = subprocess.Popen(
        [*command, part['function'], '--part', json.dumps(part['arguments']), '--wait'],
        env={**os.environ, **part['environment']},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,  # so that its child processes end with it
    )
    RUNNING.add(process)
    return process


def run_part(process, part, add, log):
    """Let a process continue that prints JSON objects: rows of the table, and ``{"at": ...}``
    before a step that may crash or hang. Return its verdict.
    """
    with contextlib.suppress(BrokenPipeError):  # if it has failed already
        print(file=process.stdin, flush=True)
    late = Timer(part['limit'], os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    at = 'the start'
    for line in process.stdout:
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError):  # output of a library
            continue
        at = row.get('at', at)
        if row and 'at' not in row:
            add(row)
    code = process.wait()
    hung = not late.is_alive()
    late.cancel()
    RUNNING.remove(process)
    verdict = {0: 'passed', STATUS['wrong']: 'wrong'}.get(code, 'failed')
    if verdict != 'passed':
        how = signal.Signals(-code).name if code < 0 else f'exit status {code}'
        how = f'no end after {part["limit"]} s' if hung else how
        where = f'{part["function"]} {part["arguments"]}'
        add(dict(part=where, problem=f'{verdict}: {how}, at {at}; see {Path(log.name).name}'))
    return verdict


def read(out, stage):
    file = out / f'{stage["name"]}.json'
    return json.loads(file.read_text()) if file.exists() else {}


def report(plan, out):
    """Format the environment, the verdicts and the tables of all stages as Markdown."""
    results = {stage['title']: read(out, stage) for stage in plan['stages']}
    lines = ['# mmvil on a GPU', '', *(f'- {line}' for line in plan['environment'])]
    lines += table(
        dict(stage=title, verdict=x.get('status', 'not run'), seconds=x.get('seconds', ''))
        for title, x in results.items()
    )
    for title, result in results.items():
        if result:
            lines += ['', f'## {title}', *table(result['rows'])]
            if result['environment'] != plan['environment']:
                lines += ['', 'Of another run: ' + '; '.join(result['environment'])]
    return '\n'.join(lines) + '\n'


def table(rows):
    """Format consecutive rows with the same columns as one table each."""
    lines, columns = [], None
    for row in rows:
        if list(row) != columns:
            columns = list(row)
            lines += ['', f'| {" | ".join(columns)} |', '|' + ' -- |' * len(columns)]
        cells = (f'{x:.4g}' if isinstance(x, float) else str(x) for x in row.values())
        lines.append(f'| {" | ".join(cells)} |'.replace('\n', ' '))
    return lines


if __name__ == '__main__':
    run(main)
