# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Functions of tensors, without parameters or registries: the mLSTM operator and its oracle."""

from .mlstm import BACKENDS, mlstm
from .reference import mlstm_reference

__all__ = ['BACKENDS', 'mlstm', 'mlstm_reference']
