# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""k-nearest neighbours and linear probe on frozen features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = [10.0**exponent for exponent in range(-8, 1)]


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    k: int,
    temperature: float | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Classify by the k training images with the most similar features.

    Args:
        train, test (Tensor): Features, shapes (N, C) and (M, C).
        train_labels (Tensor): Shape (N,).
        k (int): Number of neighbours.
        temperature (float, optional): Neighbours vote with weight exp(cosine / temperature).
            Default: None, equal weights.
        chunk (int): Number of images processed at once. Default: 1024.

    Returns:
        Tensor: Labels, shape (M,).
    """
    classes = int(train_labels.max()) + 1
    train = F.normalize(train, dim=1)
    predictions = []
    for part in F.normalize(test, dim=1).split(chunk):
        cosine, nearest = (part @ train.T).topk(k, dim=1)
        votes = torch.ones_like(cosine)
        if temperature is not None:  # relative to the nearest, so that no exponential overflows
            votes = ((cosine - cosine[:, :1]) / temperature).exp()
        counts = part.new_zeros(len(part), classes).scatter_add(1, train_labels[nearest], votes)
        predictions.append(counts.argmax(1))
    return torch.cat(predictions)


def fit_linear(features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Fit multinomial logistic regression of labels (N,) on features (N, C) with L-BFGS. The mean
    loss is regularized by half the penalty times the squared norm of the weight.

    Returns:
        tuple[Tensor, Tensor]: Weight (C, classes) and bias (classes,).
    """
    classes = int(labels.max()) + 1
    weight = features.new_zeros(features.shape[1], classes, requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn='strong_wolfe'
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, penalties: Sequence[float] = PENALTIES
) -> tuple[Tensor, float]:
    """Classify by logistic regression on standardized features; arguments as in :func:`knn`. The
    weight penalty is selected from ``penalties`` on a held-out fifth of the training images.

    Returns:
        tuple[Tensor, float]: Labels (M,) and the chosen penalty.
    """
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    held_out, rest = order[: len(train) // 5], order[len(train) // 5 :]
    scores = []
    for penalty in penalties:
        weight, bias = fit_linear(train[rest], train_labels[rest], penalty)
        found = (train[held_out] @ weight + bias).argmax(1)
        scores.append((accuracy(found, train_labels[held_out]), penalty))
    _, best = max(scores)
    weight, bias = fit_linear(train, train_labels, best)
    return (test @ weight + bias).argmax(1), best


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Compute the top-1 accuracy in percent."""
    return 100 * (predictions == labels).float().mean().item()
