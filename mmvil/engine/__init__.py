# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What training adds to mmengine: layer-wise learning rates, runs that resume exactly, several
processes that equal one.
"""

from ..checkpoints.loaders import load_safely_from_now_on
from ..checkpoints.resume import find_good_checkpoint, verify
from ..checkpoints.safe_load import (
    DamagedCheckpointError,
    UntrustedCheckpointError,
    load_safely,
)
from ..losses import GlobalBatchCrossEntropyLoss
from ..metrics import CorruptionError, SubsetAccuracy
from .cpu import CPUAmpOptimWrapper, CPUSyncBatchNorm
from .hooks import AdaptInputChannelsHook, AverageLogHook, IterationSeedHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .nan_guard import NaNGuardHook
from .sampling import SampleError

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
