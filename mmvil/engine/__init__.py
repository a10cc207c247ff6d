# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Extensions of mmengine's training: hooks, layer-wise learning rates, CPU and sharded training.

Losses, metrics and checkpoint functions are also exported here, because configs and users' code
refer to them by this path.
"""

from ..checkpoints import (
    DamagedCheckpointError,
    UntrustedCheckpointError,
    find_good_checkpoint,
    load_safely,
    register_safe_loaders,
    verify,
)
from ..losses import GlobalBatchCrossEntropyLoss
from ..metrics import MeanCorruptionError, SubsetAccuracy
from .cpu import CPUAmpOptimWrapper, CPUSyncBatchNorm
from .hooks import AdaptInputChannelsHook, AverageLogHook, IterationSeedHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .nan_guard import NaNGuardHook
from .sampling import SampleError

# Former names.
CorruptionError = MeanCorruptionError
load_safely_from_now_on = register_safe_loaders

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
    'MeanCorruptionError',
    'NaNGuardHook',
    'SampleError',
    'SubsetAccuracy',
    'UntrustedCheckpointError',
    'find_good_checkpoint',
    'load_safely',
    'load_safely_from_now_on',
    'register_safe_loaders',
    'verify',
]
