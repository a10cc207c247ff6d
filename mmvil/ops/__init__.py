# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Tensors in, tensors out: the mLSTM operator and its oracle. No parameters, no registries."""

from .mlstm import BACKENDS, mlstm
from .reference import mlstm_reference

__all__ = ['BACKENDS', 'mlstm', 'mlstm_reference']
