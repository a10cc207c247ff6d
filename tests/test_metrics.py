# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS

from mmvil.engine import MeanCorruptionError, SubsetAccuracy


def sample(scores, label, path=''):
    return dict(pred_score=torch.tensor(scores), gt_label=torch.tensor([label]), img_path=path)


def evaluate(metric, samples, classes=None):
    evaluator = Evaluator(metric)
    if classes is not None:
        evaluator.dataset_meta = dict(classes=classes)
    evaluator.process(samples)
    return evaluator.evaluate(len(samples))


def test_former_name_of_the_mean_corruption_error_stays():
    for name in ('MeanCorruptionError', 'CorruptionError'):
        for prefix in ('', 'mmvil.engine.'):
            assert METRICS.get(prefix + name) is MeanCorruptionError


def test_subset_accuracy_chooses_among_the_subset_only():
    # Class 0 of the model always scores best, but the dataset has only 1, 3 and 4.
    samples = [
        sample([0.5, 0.4, 0.0, 0.1, 0.0], 0),  # 1: right
        sample([0.5, 0.1, 0.0, 0.3, 0.1], 1),  # 3: right
        sample([0.5, 0.1, 0.0, 0.3, 0.2], 2),  # 4: second
        sample([0.5, 0.0, 0.2, 0.2, 0.1], 0),  # 1: third
    ]
    metrics = evaluate(SubsetAccuracy(classes=[1, 3, 4], topk=(1, 2, 3)), samples, 'abc')
    assert metrics == {'accuracy/top1': 50, 'accuracy/top2': 75, 'accuracy/top3': 100}


def test_subset_accuracy_counts_nan_as_wrong():
    metrics = evaluate(SubsetAccuracy(classes=[0, 1]), [sample([torch.nan, torch.nan], 0)], 'ab')
    assert metrics['accuracy/top1'] == 0


def test_subset_accuracy_rejects_a_dataset_with_other_classes():
    with pytest.raises(ValueError, match='has 4 classes.*was given 3'):
        evaluate(SubsetAccuracy(classes=[1, 3, 4]), [sample([0.5, 0.5], 0)], 'abcd')


def corrupted(corruption, severity, right, wrong):
    path = f'/data/{corruption}/{severity}/n01440764/x.JPEG'
    return [sample([0.9, 0.1], 0, path)] * right + [sample([0.9, 0.1], 1, path)] * wrong


def test_mean_corruption_error_is_relative_to_the_reference():
    metric = MeanCorruptionError(reference_errors=dict(fog=80.0, snow=50.0), severities=2)
    samples = [
        *corrupted('fog', 1, right=3, wrong=1),
        *corrupted('fog', 2, right=1, wrong=1),  # severities count alike, whatever their images
        *corrupted('snow', 1, right=3, wrong=1),
        *corrupted('snow', 2, right=3, wrong=1),
    ]
    metrics = evaluate(metric, samples)
    assert metrics['corruption/error/fog'] == pytest.approx(37.5)
    assert metrics['corruption/error/snow'] == pytest.approx(25)
    assert metrics['corruption/top1'] == pytest.approx(100 - 31.25)
    assert metrics['corruption/mCE'] == pytest.approx(100 * (37.5 / 80 + 25 / 50) / 2)


@pytest.mark.parametrize('seen', [[('fog', 1), ('fog', 2)], [('fog', 1), ('snow', 1)]])
def test_mean_corruption_error_reports_no_mean_of_a_part(seen):
    metric = MeanCorruptionError(reference_errors=dict(fog=80.0, snow=50.0), severities=2)
    samples = [one for where in seen for one in corrupted(*where, right=1, wrong=1)]
    metrics = evaluate(metric, samples)
    assert metrics['corruption/top1'] == 50 and 'corruption/mCE' not in metrics


def test_mean_corruption_error_rejects_paths_of_another_layout():
    metric = MeanCorruptionError(reference_errors=dict(fog=80.0))
    with pytest.raises(ValueError, match="'mist'.*CORRUPTION/SEVERITY"):
        evaluate(metric, corrupted('mist', 1, 1, 0))
    with pytest.raises(ValueError, match=r'^fog/x\.png has .*expected CORRUPTION/SEVERITY'):
        evaluate(metric, [sample([0.9, 0.1], 0, 'fog/x.png')])
