# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
from .vision_lstm import VisionLSTM

__all__ = ['VisionLSTM']
