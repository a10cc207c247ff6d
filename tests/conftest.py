"""What several tests need."""

from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope

from tests import mmcv_ops  # noqa: F401, before anything imports mmcv's operators

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / 'shared' / 'reference'


@pytest.fixture(autouse=True)
def default_scope_of_its_own():
    """Drop the default scope that a test sets, or the next test would build in it."""
    scopes = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(scopes)


@pytest.fixture
def reference():
    """Load a file of the full reference vectors, which lie outside the repository."""

    def load(name: str) -> dict:
        path = REFERENCE / f'{name}.pt'
        if not path.exists():
            pytest.skip(f'the full reference vectors are not there ({path.name})')
        return torch.load(path, weights_only=True)

    return load


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference relative to that of what is expected."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
