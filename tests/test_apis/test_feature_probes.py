# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import numpy as np
import pytest
import torch

from mmvil.apis.feature_probes import accuracy, fit_linear, knn, linear_probe


@pytest.fixture(scope='module')
def digits():
    """Pixels of the digits of scikit-learn: training features and labels, test ones."""
    data = pytest.importorskip('sklearn.datasets').load_digits()
    order = np.random.default_rng(0).permutation(len(data.data))
    features = torch.tensor(data.data[order], dtype=torch.float64)
    labels = torch.tensor(data.target[order])
    return features[:400], labels[:400], features[400:800], labels[400:800]


@pytest.mark.parametrize('temperature', [None, 0.07])
def test_knn_equals_scikit_learn(digits, temperature):
    from sklearn.neighbors import KNeighborsClassifier

    train, train_labels, test, labels = digits
    weights = 'uniform' if temperature is None else lambda d: np.exp((1 - d) / temperature)
    oracle = KNeighborsClassifier(20, weights=weights, metric='cosine', algorithm='brute')
    expected = torch.tensor(oracle.fit(train, train_labels).predict(test))
    found = knn(train, train_labels, test, 20, temperature, chunk=150)
    assert (found == expected).float().mean() > 0.995  # but for ties
    assert accuracy(found, labels) > 90


def test_knn_weighs_near_neighbours_more():
    train = torch.tensor([[1.0, 0.0], [0.7, 0.7], [0.7, 0.71]])
    labels = torch.tensor([0, 1, 1])
    test = torch.tensor([[1.0, 0.01]])
    assert knn(train, labels, test, 3).item() == 1
    assert knn(train, labels, test, 3, temperature=0.07).item() == 0


def test_fit_linear_equals_scikit_learn(digits):
    from sklearn.linear_model import LogisticRegression

    train, train_labels, test, _ = digits
    train, test, penalty = train / 16, test / 16, 1e-3
    oracle = LogisticRegression(C=1 / (penalty * len(train)), tol=1e-8, max_iter=2000)
    expected = oracle.fit(train, train_labels).predict_proba(test)
    weight, bias = fit_linear(train, train_labels, penalty)
    found = (test @ weight + bias).softmax(1)
    assert np.abs(found.numpy() - expected).max() < 1e-3


def test_linear_probe_chooses_a_penalty_and_survives_constant_features(digits):
    train, train_labels, test, labels = digits  # the corners of digits are always 0
    found, penalty = linear_probe(
        train.float(), train_labels, test.float(), penalties=[1e-8, 1e-2, 1e4]
    )
    assert penalty == 1e-2
    assert accuracy(found, labels) > 90
