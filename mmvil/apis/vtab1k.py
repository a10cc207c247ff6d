# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""VTAB-1K: datasets, the published protocol as runs, tables of results."""

import csv
import io
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from mmengine.runner import CheckpointLoader

from ..checkpoints import weights_of
from ..checkpoints.loaders import sha256
from .convert import describe_architecture

GROUPS = dict(
    natural='caltech101 cifar dtd oxford_flowers102 oxford_iiit_pet svhn sun397'.split(),
    specialized='patch_camelyon eurosat resisc45 diabetic_retinopathy'.split(),
    structured=(
        'clevr_count clevr_dist dmlab kitti dsprites_loc dsprites_ori smallnorb_azi smallnorb_ele'
    ).split(),
)
DATASETS = [*itertools.chain(*GROUPS.values())]

# arXiv 2406.04303v3. The average is over the 19 datasets, not over the groups.
PUBLISHED = {
    'ViL-T, published': (73.6, 83.4, 56.1, 68.3),
    'ViL-S, published': (75.3, 84.3, 58.3, 70.0),
    'ViL-B, published': (76.6, 84.7, 59.1, 70.9),
}


@dataclass(frozen=True)
class Job:
    """A training run of the phase 'tune' (train800, evaluated on val200) or 'final'
    (train800val200, evaluated on test).
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
    """Runs of the protocol and their results: for each dataset, every learning rate is tried with
    every seed; the best one is trained again with every seed and evaluated on test.

    Args:
        claims (mmvil.cli.run_queue.Claims): States and results of runs by name.
        datasets (Sequence[str]): Names from ``DATASETS``.
        lrs (Sequence[float]): Learning rates to choose from.
        seeds (int): Number of seeds.
    """

    def __init__(self, claims, datasets: Sequence[str], lrs: Sequence[float], seeds: int) -> None:
        self.claims = claims
        self.datasets = datasets
        self.lrs = sorted(lrs)
        self.seeds = range(seeds)
        self.runs_per_dataset = seeds * (len(lrs) + 1)
        self.size = len(datasets) * self.runs_per_dataset
        self._results = {}

    def runs(self) -> dict[Job, str]:
        """States of all runs known so far. The final runs of a dataset are known once its search
        has ended.
        """
        choices = self.datasets, ('tune', 'final'), self.lrs, self.seeds
        jobs = [Job(*choice) for choice in itertools.product(*choices)]
        states = self.claims.states([job.name for job in jobs])
        searching = {
            job.dataset
            for job in jobs
            if job.phase == 'tune' and states[job.name] not in ('done', 'failed')
        }
        best = {each: self.best_lr(each) for each in self.datasets if each not in searching}
        known = [job for job in jobs if job.phase == 'tune' or job.lr == best.get(job.dataset)]
        # By dataset, so that table rows are completed early; failed runs come last.
        order = {dataset: i for i, dataset in enumerate(self.datasets)}
        known.sort(key=lambda job: (order[job.dataset], states[job.name] == 'again'))
        return {job: states[job.name] for job in known}

    def best_lr(self, dataset: str) -> float | None:
        """Learning rate with the best mean accuracy on val200, the smallest in case of a tie.
        Learning rates with a failed run are not considered.
        """
        found = {lr: self.accuracies(dataset, 'tune', lr) for lr in self.lrs}
        means = {lr: statistics.mean(each) for lr, each in found.items() if None not in each}
        return max(means, key=means.get, default=None)

    def accuracies(self, dataset: str, phase: str, lr: float) -> list[float | None]:
        """Accuracy for each seed; None where the run has not finished."""
        results = [self._result(Job(dataset, phase, lr, seed)) for seed in self.seeds]
        return [result and result['accuracy'] for result in results]

    def progress(self) -> str:
        """Progress of all processes together, with the estimated remaining time."""
        states = self.runs()
        count = Counter(states.values())
        seconds = [self._result(job)['seconds'] for job in states if states[job] == 'done']
        left = self.size - count['done'] - count['failed']
        text = f'{count["done"]} of {self.size} runs'
        if count['failed']:
            text += f', {count["failed"]} failed'
        if left and seconds:
            workers = count['running'] + 1
            time = timedelta(seconds=round(left * statistics.mean(seconds) / workers))
            text += f', about {time} left' + (f' with {workers} processes' if workers > 1 else '')
        return text

    def progress_by_dataset(self) -> list[str]:
        """One line for each dataset."""
        count = Counter((job.dataset, state) for job, state in self.runs().items())
        lines = []
        for dataset in self.datasets:
            line = f'{dataset:22} {count[dataset, "done"]:3} of {self.runs_per_dataset} runs'
            more = [state for state in ('running', 'failed') if count[dataset, state]]
            lines.append(line + ''.join(f', {count[dataset, state]} {state}' for state in more))
        return lines

    def _result(self, job: Job) -> dict | None:
        """Result of a run, read once; None while it has not finished."""
        result = self._results.get(job) or self.claims.result(job.name)
        if result:
            self._results[job] = result
        return result


# -- Checkpoint ------------------------------------------------------------------------------------


def read_architecture(checkpoint: str) -> dict:
    """Read the sizes of the classifier in a checkpoint (file, URL or ``mmvil://NAME``), see
    :func:`mmvil.apis.convert.describe_architecture`. Raises ValueError if there is no classifier.
    """
    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu', logger='silent')
    return describe_architecture(weights_of(loaded), loaded, checkpoint)


def identify(checkpoint: str) -> dict[str, str]:
    """Settings that identify a checkpoint across processes: its address, or its file's SHA-256."""
    if '://' in checkpoint:
        return dict(checkpoint=checkpoint)
    return dict(checkpoint_sha256=sha256(Path(checkpoint)))


# -- Data ------------------------------------------------------------------------------------------


def check_data(folder: str | Path, num_classes: int) -> list[str]:
    """Check that lists and images of a dataset exist and that labels are in range. Return warnings
    for lists whose length differs from the published one.

    Raises:
        FileNotFoundError: If a list, or the first or last image in it, is missing.
        ValueError: If a list cannot be read, or has labels out of range.
    """
    notes = []
    for split, size in dict(train800=800, val200=200, train800val200=1000, test=None).items():
        path = Path(folder, f'{split}.txt')
        if not path.is_file():
            raise FileNotFoundError(f'data not found: {path.absolute()}. See docs/transfer.md.')
        try:
            lines = path.read_text().split('\n')
            rows = [line.rsplit(' ', 1) for line in filter(str.strip, lines)]
            labels = {int(label) for _, label in rows}
        except ValueError:
            raise ValueError(f'{path}: lines must read "images/… label"') from None
        if not rows or min(labels) < 0 or max(labels) >= num_classes:
            raise ValueError(f'{path}: expected labels from 0 to {num_classes - 1}')
        for image in {rows[0][0], rows[-1][0]}:
            if not Path(folder, image).is_file():
                raise FileNotFoundError(f'{path} names {image}, which is not in {folder}')
        if size not in (None, len(rows)):
            notes.append(f'{path} has {len(rows)} images instead of {size}')
    return notes


# -- Results ---------------------------------------------------------------------------------------


def summarize(protocol: Protocol, name: str) -> tuple[dict, dict]:
    """Compute means over seeds and datasets of the finished runs, under the name of the model.

    Returns:
        tuple[dict, dict]: {row: {column: number or None}} of the groups, ours and published; and
        {dataset: (learning rate, mean on val200, mean on test, standard deviation on test)}.
    """
    details = {}
    for dataset in protocol.datasets:
        lr = protocol.best_lr(dataset)
        final = [None] if lr is None else protocol.accuracies(dataset, 'final', lr)
        if None not in final:
            tuned = statistics.mean(protocol.accuracies(dataset, 'tune', lr))
            spread = statistics.stdev(final) if len(final) > 1 else None
            details[dataset] = lr, tuned, statistics.mean(final), spread
    test = {dataset: row[2] for dataset, row in details.items()}

    ours = {
        group: statistics.mean(map(test.get, datasets)) if set(datasets) <= set(test) else None
        for group, datasets in dict(GROUPS, average=DATASETS).items()
    }
    published = {model: dict(zip(ours, numbers)) for model, numbers in PUBLISHED.items()}
    return {name: {**ours, **test}, **published}, details


def as_markdown(rows: dict, details: dict) -> str:
    """Format a summary as two Markdown tables: groups, and datasets."""
    columns = (*GROUPS, 'average')
    lines = [_row('VTAB-1K, top-1 accuracy on test in %', *columns)]
    lines.append('|---|' + '---:|' * len(columns))
    lines += [_row(name, *(numbers[key] for key in columns)) for name, numbers in rows.items()]
    if any(numbers[key] is None for numbers in rows.values() for key in columns):
        lines += ['', '– : the group has incomplete datasets.']
    if details:
        lines += ['', _row('dataset', 'group', 'learning rate', 'val200', 'test', 'std of test')]
        lines.append('|---|---|---:|---:|---:|---:|')
    for group, datasets in GROUPS.items():
        for dataset in filter(details.get, datasets):
            lr, *numbers = details[dataset]
            lines.append(_row(dataset, group, f'{lr:g}', *numbers))
    return '\n'.join(lines) + '\n'


def as_csv(rows: dict) -> str:
    """Format a summary as CSV, one line per model."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ['model', *GROUPS, 'average', *DATASETS], lineterminator='\n')
    writer.writeheader()
    for name, numbers in rows.items():
        shown = {key: f'{value:.2f}' for key, value in numbers.items() if value is not None}
        writer.writerow(dict(model=name, **shown))
    return text.getvalue()


def _row(*cells: str | float | None) -> str:
    shown = ('–' if x is None else x if isinstance(x, str) else f'{x:.1f}' for x in cells)
    return f'| {" | ".join(shown)} |'
