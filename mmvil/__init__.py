# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Vision-LSTM for OpenMMLab. Importing this package registers its components in mmengine's root
registries.
"""

from .version import __version__, check_versions

check_versions()

from .apis import get_model, list_models, register_models, swap_backbone  # noqa: E402
from .backbones import MaskedVisionLSTM, VisionLSTM  # noqa: E402
from .engine import IterationSeedHook, LayerDecayOptimWrapperConstructor  # noqa: E402

__all__ = [
    'IterationSeedHook',
    'LayerDecayOptimWrapperConstructor',
    'MaskedVisionLSTM',
    'VisionLSTM',
    '__version__',
    'get_model',
    'list_models',
    'register_models',
    'swap_backbone',
]
