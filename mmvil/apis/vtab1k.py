# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""VTAB-1K: datasets, the published protocol as runs, tables of results."""

import csv
import io
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from mmengine.runner import CheckpointLoader

from ..checkpoints import infer_architecture, weights_of
from ..checkpoints.loaders import sha256

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

# arXiv 2406.04303v3. The average is over the 19 datasets, not over the groups.
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
    """The protocol: runs, their states, and what follows from their results.

    For each dataset, every learning rate is tuned with every seed; the best one is trained again
    with every seed and evaluated on test.

    Args:
        claims (mmvil.cli.run_queue.Claims): Knows states and results of runs by name.
        datasets (Sequence[str]): Names from ``DATASETS``.
        lrs (Sequence[float]): Learning rates to choose from.
        seeds (int): Number of seeds.
    """

    def __init__(self, claims, datasets: Sequence[str], lrs: Sequence[float], seeds: int) -> None:
        self.claims = claims
        self.datasets = datasets
        self.lrs = sorted(lrs)
        self.seeds = range(seeds)
        self.results = {}

    @property
    def size(self) -> int:
        """Number of runs in all."""
        return len(self.datasets) * self.runs_per_dataset

    @property
    def runs_per_dataset(self) -> int:
        return len(self.seeds) * (len(self.lrs) + 1)

    def runs(self) -> dict[Job, str]:
        """States of all runs that are known by now. The final runs of a dataset are known when its
        search has ended.
        """
        tuning = {
            dataset: [job for lr in self.lrs for job in self._jobs(dataset, 'tune', lr)]
            for dataset in self.datasets
        }
        known = self._states([job for jobs in tuning.values() for job in jobs])
        final = []
        for dataset, jobs in tuning.items():
            if all(known[job] in ('done', 'failed') for job in jobs):
                lr = self.best_lr(dataset)
                final += [] if lr is None else self._jobs(dataset, 'final', lr)
        known.update(self._states(final))
        # By dataset, so that complete rows of the table come early; what has failed before, last.
        order = {dataset: i for i, dataset in enumerate(self.datasets)}
        return dict(
            sorted(known.items(), key=lambda item: (order[item[0].dataset], item[1] == 'again'))
        )

    def best_lr(self, dataset: str) -> float | None:
        """Learning rate with the best mean accuracy on val200, the smallest of equal ones. One that
        lacks a seed, because its run failed, is not considered.
        """
        means = {}
        for lr in self.lrs:
            found = self.accuracies(dataset, 'tune', lr)
            if None not in found:
                means[lr] = statistics.mean(found)
        return max(means, key=means.get) if means else None

    def accuracies(self, dataset: str, phase: str, lr: float) -> list[float | None]:
        """Accuracy for each seed; None where the run has not finished."""
        results = [self._result(job) for job in self._jobs(dataset, phase, lr)]
        return [result and result['accuracy'] for result in results]

    def progress(self) -> str:
        """How far all processes together are, and how long it will take."""
        states = self.runs()
        count = Counter(states.values())
        done = filter(None, [self._result(job) for job, state in states.items() if state == 'done'])
        seconds = [result['seconds'] for result in done]
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

    def _jobs(self, dataset, phase, lr):
        return [Job(dataset, phase, lr, seed) for seed in self.seeds]

    def _result(self, job):
        if job not in self.results:
            result = self.claims.result(job.name)
            if result is None:
                return None
            self.results[job] = result
        return self.results[job]

    def _states(self, jobs):
        states = self.claims.states([job.name for job in jobs])
        return {job: states[job.name] for job in jobs}


# -- Checkpoint ------------------------------------------------------------------------------------


def read_architecture(checkpoint: str) -> dict:
    """Read the sizes of the classifier in a checkpoint, see
    :func:`mmvil.checkpoints.infer_architecture`.

    Args:
        checkpoint (str): File, URL or ``mmvil://NAME``; ours or an official one.

    Raises:
        ValueError: If it holds no Vision-LSTM classifier.
    """
    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu', logger='silent')
    try:
        return infer_architecture(weights_of(loaded))
    except ValueError as error:
        raise ValueError(f'{checkpoint} is no Vision-LSTM classifier: {error}') from error


def identify(checkpoint: str) -> dict[str, str]:
    """Settings by which processes agree on a checkpoint: its address, or its file's SHA-256."""
    if '://' in checkpoint:
        return dict(checkpoint=checkpoint)
    return dict(checkpoint_sha256=sha256(Path(checkpoint)))


# -- Data ------------------------------------------------------------------------------------------


def check_data(folder: str | Path, num_classes: int) -> list[str]:
    """Check that lists and images of a dataset exist and that labels are in range.

    Args:
        folder (str | Path): Folder of the dataset.
        num_classes (int): Number of its classes.

    Returns:
        list[str]: Warnings, of lists whose length is not the published one.

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
    """Compute means over seeds and datasets of what has finished.

    Args:
        protocol (Protocol): Its results.
        name (str): Name of the model in the table.

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
    rows = {name: {**ours, **test}}
    for published, numbers in PUBLISHED.items():
        rows[published] = dict(zip(ours, numbers))
    return rows, details


def as_markdown(rows: dict, details: dict) -> str:
    """Format a summary as two Markdown tables: groups, and datasets."""
    columns = (*GROUPS, 'average')
    lines = ['| VTAB-1K, top-1 accuracy on test in % | ' + ' | '.join(columns) + ' |']
    lines.append('|---|' + '---:|' * len(columns))
    for name, numbers in rows.items():
        lines.append(f'| {name} | ' + ' | '.join(_number(numbers[key]) for key in columns) + ' |')
    if any(rows[name][key] is None for name in rows for key in columns):
        lines += ['', '– : not all datasets of the group are complete.']
    if details:
        lines += ['', '| dataset | group | learning rate | val200 | test | std of test |']
        lines.append('|---|---|---:|---:|---:|---:|')
    for group, datasets in GROUPS.items():
        for dataset in filter(details.get, datasets):
            lr, val, test, spread = details[dataset]
            numbers = ' | '.join(map(_number, (val, test, spread)))
            lines.append(f'| {dataset} | {group} | {lr:g} | {numbers} |')
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


def _number(value) -> str:
    return '–' if value is None else f'{value:.1f}'
