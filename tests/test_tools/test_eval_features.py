# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tool_process import call_tool

TOOLS = Path(__file__).parents[2] / 'tools'
sys.path.insert(0, str(TOOLS))

import eval_features  # noqa: E402

CONFIG = """
_base_ = '{configs}/vil_t_imagenet.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, depth=2), img_size=16, patch_size=4)
)
test_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(16, 16)),
            dict(type='PackInputs'),
        ]
    )
)
"""


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
    found = eval_features.knn(train, train_labels, test, 20, temperature, chunk=150)
    assert (found == expected).float().mean() > 0.995  # but for ties
    assert eval_features.accuracy(found, labels) > 90


def test_knn_weighs_near_neighbours_more():
    train = torch.tensor([[1.0, 0.0], [0.7, 0.7], [0.7, 0.71]])
    labels = torch.tensor([0, 1, 1])
    test = torch.tensor([[1.0, 0.01]])
    assert eval_features.knn(train, labels, test, 3).item() == 1
    assert eval_features.knn(train, labels, test, 3, temperature=0.07).item() == 0


def test_fit_linear_equals_scikit_learn(digits):
    from sklearn.linear_model import LogisticRegression

    train, train_labels, test, _ = digits
    train, test, penalty = train / 16, test / 16, 1e-3
    oracle = LogisticRegression(C=1 / (penalty * len(train)), tol=1e-8, max_iter=2000)
    expected = oracle.fit(train, train_labels).predict_proba(test)
    weight, bias = eval_features.fit_linear(train, train_labels, penalty)
    found = (test @ weight + bias).softmax(1)
    assert np.abs(found.numpy() - expected).max() < 1e-3


def test_linear_probe_chooses_a_penalty_and_survives_constant_features(digits):
    train, train_labels, test, labels = digits  # the corners of digits are always 0
    found, penalty = eval_features.linear_probe(
        train.float(), train_labels, test.float(), penalties=[1e-8, 1e-2, 1e4]
    )
    assert penalty == 1e-2
    assert eval_features.accuracy(found, labels) > 90


@pytest.fixture
def folder(tmp_path):
    """Digits as a folder of images per class, a config and a checkpoint in the official layout."""
    pytest.importorskip('mmpretrain')
    import mmvil

    data = pytest.importorskip('sklearn.datasets').load_digits()
    for i in range(400):
        split, name = ('train' if i < 300 else 'val'), f'digit{data.target[i]}'
        (tmp_path / 'data' / split / name).mkdir(parents=True, exist_ok=True)
        image = np.kron(data.images[i] * 15, np.ones((2, 2))).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / 'data' / split / name / f'{i:04}.png')
    (tmp_path / 'config.py').write_text(CONFIG.format(configs=TOOLS.parent / 'configs'))
    torch.manual_seed(0)
    backbone = mmvil.VisionLSTM(
        arch=dict(embed_dims=32, depth=2), img_size=16, patch_size=4, out_type='bilateral_concat'
    )
    state = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'weights.pth')
    return tmp_path


def test_eval_features_on_a_folder_of_images(folder):
    command = (
        *(TOOLS / 'eval_features.py', folder / 'config.py', folder / 'weights.pth'),
        *('--workers', 0, '--features', folder / 'features.pt', '--data-root', folder / 'data'),
    )
    said = call_tool(*command)
    assert '300 training and 100 validation images, 64 features' in said
    found = dict(re.findall(r'(weighted|plain|linear probe): ([\d.]+) %', said))
    assert len(found) == 3
    # Random features of 10 classes tell something, too.
    assert all(float(value) > 30 for value in found.values())

    again = call_tool(*command)  # from the file
    assert found == dict(re.findall(r'(weighted|plain|linear probe): ([\d.]+) %', again))
    said = call_tool(*command[:-1], folder / 'data/..', status=2)
    assert 'was made from' in said
    said = call_tool(*command[:3], '--data-root', folder, status=2)
    assert 'expected' in said and 'train/CLASS/IMAGE' in said
