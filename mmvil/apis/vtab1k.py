# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""The VTAB-1K protocol: its runs, which are left, and the tables of results."""

import csv
import io
import statistics
from collections import Counter
from dataclasses import dataclass


GROUPS = dict(
    natural=(
        *('caltech101', 'cifar', 'dtd', 'oxford_flowers102', 'oxford_iiit_pet', 'svhn'),
        'sun397',
    ),
    specialized=('patch_camelyon', 'eurosat', 'resisc45', 'diabetic_retinopathy'),
    structured=(
        *('clevr_count', 'clevr_dist', 'dmlab', 'kitti', 'dsprites_loc', 'dsprites_ori'),
        *('smallnorb_azi', 'smallnorb_ele'),
    ),
)


DATASETS = [dataset for group in GROUPS.values() for dataset in group]


# arXiv 2406.04303v3. The average is over the 19 data sets, not over the groups.
PUBLISHED = {
    'ViL-T, published': (73.6, 83.4, 56.1, 68.3),
    'ViL-S, published': (75.3, 84.3, 58.3, 70.0),
    'ViL-B, published': (76.6, 84.7, 59.1, 70.9),
}


@dataclass(frozen=True)
class Job:
    """One training: of phase 'tune' (train800, evaluated on val200) or 'final' (train800val200,
    evaluated on test).
    """

    dataset: str
    phase: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f'{self.dataset}.{self.phase}.lr{self.lr:g}.seed{self.seed}'

    def __str__(self) -> str:
        return f'{self.dataset} {self.phase} lr {self.lr:g} seed {self.seed}'


class Protocol:
    """What is to be done, given what has been done."""

    def __init__(self, claims, datasets, lrs, seeds):
        self.claims = claims
        self.datasets = datasets
        self.lrs = sorted(lrs)
        self.seeds = range(seeds)
        self.results = {}

    @property
    def size(self) -> int:
        return len(self.datasets) * len(self.seeds) * (len(self.lrs) + 1)

    def tuning(self, dataset):
        return [Job(dataset, 'tune', lr, seed) for lr in self.lrs for seed in self.seeds]

    def runs(self):
        """{run: state} of all runs that are known by now; the learning rate of final runs is known
        when all runs of the search have ended.
        """
        tuning = {dataset: self.tuning(dataset) for dataset in self.datasets}
        known = self._states([job for runs in tuning.values() for job in runs])
        final = []
        for dataset, runs in tuning.items():
            if all(known[job] in ('done', 'failed') for job in runs):
                lr = self.best_lr(dataset)
                if lr is not None:
                    final += [Job(dataset, 'final', lr, seed) for seed in self.seeds]
        known.update(self._states(final))
        # Data set by data set, so that complete rows of the table come early; what has failed
        # before comes last.
        order = {dataset: i for i, dataset in enumerate(self.datasets)}
        return dict(
            sorted(known.items(), key=lambda item: (order[item[0].dataset], item[1] == 'again'))
        )

    def best_lr(self, dataset):
        """The learning rate with the best mean accuracy on val200, of equal ones the smallest. One
        that lacks a seed, because its run failed, is not considered.
        """
        means = {}
        for lr in self.lrs:
            found = [self.accuracy(Job(dataset, 'tune', lr, seed)) for seed in self.seeds]
            if None not in found:
                means[lr] = statistics.mean(found)
        return max(means, key=means.get) if means else None

    def accuracy(self, job):
        """Accuracy that a finished run has reached, else None."""
        if job not in self.results:
            result = self.claims.result(job.name)
            if result is None:
                return None
            self.results[job] = result
        return self.results[job]['accuracy']

    def _states(self, runs):
        states = self.claims.states([job.name for job in runs])
        return {job: states[job.name] for job in runs}


def progress(protocol) -> str:
    """How far all processes together are, and how long it will take."""
    states = protocol.runs()
    count = Counter(states.values())
    for job, state in states.items():
        if state == 'done':
            protocol.accuracy(job)
    left = protocol.size - count['done'] - count['failed']
    seconds = [result['seconds'] for result in protocol.results.values()]
    text = f'{count["done"]} of {protocol.size} runs'
    if count['failed']:
        text += f', {count["failed"]} failed'
    if left and seconds:
        workers = count['running'] + 1
        text += f', about {_duration(left * statistics.mean(seconds) / workers)} left'
        text += f' with {workers} processes' if workers > 1 else ''
    return text


def summarize(protocol, name):
    """Results so far.

    Returns:
        tuple[dict, dict]: {row: {column: number or None}} of the groups, ours and published; and
        {data set: (learning rate, mean on val200, mean on test, standard deviation on test)}.
    """
    details = {}
    for dataset in protocol.datasets:
        lr = protocol.best_lr(dataset)
        if lr is None:
            continue
        final = [protocol.accuracy(Job(dataset, 'final', lr, seed)) for seed in protocol.seeds]
        if None in final:
            continue
        tuned = [protocol.accuracy(Job(dataset, 'tune', lr, seed)) for seed in protocol.seeds]
        spread = statistics.stdev(final) if len(final) > 1 else None
        details[dataset] = lr, statistics.mean(tuned), statistics.mean(final), spread
    test = {dataset: row[2] for dataset, row in details.items()}

    def mean(datasets):
        if not all(dataset in test for dataset in datasets):
            return None
        return statistics.mean(test[dataset] for dataset in datasets)

    ours = {group: mean(datasets) for group, datasets in GROUPS.items()}
    ours['average'] = mean(DATASETS)
    rows = {name: {**ours, **test}}
    for published, numbers in PUBLISHED.items():
        rows[published] = dict(zip((*GROUPS, 'average'), numbers))
    return rows, details


def as_markdown(rows, details) -> str:
    columns = (*GROUPS, 'average')
    lines = ['| VTAB-1K, top-1 accuracy on test in % | ' + ' | '.join(columns) + ' |']
    lines.append('|---|' + '---:|' * len(columns))
    for name, numbers in rows.items():
        lines.append(f'| {name} | ' + ' | '.join(_number(numbers[key]) for key in columns) + ' |')
    if any(rows[name][key] is None for name in rows for key in columns):
        lines += ['', '– : not all data sets of the group are complete.']
    if details:
        lines += ['', '| data set | group | learning rate | val200 | test | std of test |']
        lines.append('|---|---|---:|---:|---:|---:|')
    for group, datasets in GROUPS.items():
        for dataset in filter(details.get, datasets):
            lr, val, test, spread = details[dataset]
            numbers = ' | '.join(map(_number, (val, test, spread)))
            lines.append(f'| {dataset} | {group} | {lr:g} | {numbers} |')
    return '\n'.join(lines) + '\n'


def as_csv(rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ['model', *GROUPS, 'average', *DATASETS], lineterminator='\n')
    writer.writeheader()
    for name, numbers in rows.items():
        shown = {key: f'{value:.2f}' for key, value in numbers.items() if value is not None}
        writer.writerow(dict(model=name, **shown))
    return text.getvalue()


def _number(value) -> str:
    return '–' if value is None else f'{value:.1f}'


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 3600:
        return f'{seconds // 60}:{seconds % 60:02} min'
    return f'{seconds // 3600}:{seconds % 3600 // 60:02} h'
