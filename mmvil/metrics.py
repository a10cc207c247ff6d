# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Metrics for ImageNet classifiers on robustness benchmarks."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath
from statistics import mean
from typing import Any

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class SubsetAccuracy(BaseMetric):
    """Accuracy on a dataset whose classes are a subset of the model's.

    ImageNet-A and ImageNet-R have 200 of the 1000 classes. By definition, the prediction is the
    best-scoring of these 200.

    Args:
        classes (Sequence[int]): Label i of the dataset is class ``classes[i]`` of the model.
        topk (Sequence[int]): Default: (1, 5).
        **kwargs: ``collect_device`` and ``prefix`` of ``mmengine.BaseMetric``.

    Raises:
        ValueError: If the dataset has a different number of classes.
    """

    default_prefix = 'accuracy'

    def __init__(self, classes: Sequence[int], topk: Sequence[int] = (1, 5), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = list(classes)
        self.topk = tuple(topk)

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        """Count for each image the classes of the subset that score higher than the true one."""
        names = (self.dataset_meta or {}).get('classes')
        if names is not None and len(names) != len(self.classes):
            raise ValueError(
                f'The dataset has {len(names)} classes, but SubsetAccuracy was given '
                f'{len(self.classes)}. Does data_root hold one folder per class and nothing else?'
            )
        for sample in data_samples:
            scores = sample['pred_score'][self.classes]
            right = scores[sample['gt_label'].item()]
            self.results.append((~(scores <= right)).sum().item())  # NaN is never right

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        """Compute the percentage of images whose true class is among the top k."""
        return {
            f'top{k}': 100 * sum(rank < k for rank in results) / len(results) for k in self.topk
        }


@METRICS.register_module(name=['MeanCorruptionError', 'CorruptionError'])  # the former name
class MeanCorruptionError(BaseMetric):
    """Mean corruption error (mCE) on ImageNet-C.

    The error of a corruption is its mean over severities, relative to that of a reference model;
    mCE is the mean over corruptions (Hendrycks and Dietterich, ICLR 2019). The corruption of an
    image is read from its path, ``CORRUPTION/SEVERITY/CLASS/IMAGE``.

    Args:
        reference_errors (dict[str, float]): Mean error of the reference model, in percent, for each
            corruption. mCE is reported only if all of them occur at all severities.
        severities (int): Number of severities. Default: 5.
        **kwargs: ``collect_device`` and ``prefix`` of ``mmengine.BaseMetric``.

    Raises:
        ValueError: If an image has a corruption without a reference error.
    """

    default_prefix = 'corruption'

    def __init__(
        self, reference_errors: dict[str, float], severities: int = 5, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.reference_errors = dict(reference_errors)
        self.severities = severities

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        """Record the corruption and severity of each image, and whether it is misclassified."""
        for sample in data_samples:
            corruption, severity = ('', '', '', *PurePath(sample['img_path']).parts)[-4:-2]
            if corruption not in self.reference_errors:
                raise ValueError(
                    f'{sample["img_path"]} has the corruption {corruption!r}; expected '
                    f'CORRUPTION/SEVERITY/CLASS/IMAGE with one of {list(self.reference_errors)}.'
                )
            wrong = sample['pred_score'].argmax().item() != sample['gt_label'].item()
            self.results.append((corruption, severity, wrong))

    def compute_metrics(self, results: list[tuple]) -> dict[str, float]:
        """Compute the mean error of each corruption, mean accuracy, and mCE."""
        wrong = defaultdict(lambda: defaultdict(list))
        for corruption, severity, is_wrong in results:
            wrong[corruption][severity].append(is_wrong)
        errors = {
            name: 100 * mean(map(mean, wrong[name].values()))
            for name in self.reference_errors
            if name in wrong
        }
        metrics = {f'error/{name}': error for name, error in errors.items()}
        metrics['top1'] = 100 - mean(errors.values())
        if all(len(wrong[name]) == self.severities for name in self.reference_errors):
            ratios = [errors[name] / self.reference_errors[name] for name in errors]
            metrics['mCE'] = 100 * mean(ratios)
        return metrics
