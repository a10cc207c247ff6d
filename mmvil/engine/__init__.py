# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What training adds to mmengine: layer-wise learning rates, runs that resume exactly, several
processes that equal one.
"""

from .distributed import AverageLogHook, CPUSyncBatchNorm, GlobalBatchCrossEntropyLoss
from .hooks import IterationSeedHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .metrics import CorruptionError, SubsetAccuracy

__all__ = [
    'AverageLogHook',
    'CPUSyncBatchNorm',
    'CorruptionError',
    'GlobalBatchCrossEntropyLoss',
    'IterationSeedHook',
    'LayerDecayOptimWrapperConstructor',
    'SubsetAccuracy',
]
