# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What training adds to mmengine: layer-wise learning rates, runs that resume exactly, several
processes that equal one.
"""

from .amp import CPUAmpOptimWrapper
from .distributed import AverageLogHook, CPUSyncBatchNorm, GlobalBatchCrossEntropyLoss
from .hooks import AdaptInputChannelsHook, IterationSeedHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .metrics import CorruptionError, SubsetAccuracy
from .nan_guard import NaNGuardHook
from .safe_checkpoint import (
    DamagedCheckpointError,
    UntrustedCheckpointError,
    find_good_checkpoint,
    load_safely,
    load_safely_from_now_on,
    verify,
)
from .samples import SampleError

__all__ = [
    'AdaptInputChannelsHook',
    'AverageLogHook',
    'CPUAmpOptimWrapper',
    'CPUSyncBatchNorm',
    'CorruptionError',
    'DamagedCheckpointError',
    'GlobalBatchCrossEntropyLoss',
    'IterationSeedHook',
    'LayerDecayOptimWrapperConstructor',
    'NaNGuardHook',
    'SampleError',
    'SubsetAccuracy',
    'UntrustedCheckpointError',
    'find_good_checkpoint',
    'load_safely',
    'load_safely_from_now_on',
    'verify',
]
