# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
from .masked_vision_lstm import MaskedVisionLSTM
from .vision_lstm import VisionLSTM

__all__ = ['MaskedVisionLSTM', 'VisionLSTM']
