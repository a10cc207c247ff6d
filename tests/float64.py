# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Importing this module makes PyTorch compute in float64, for ``custom_imports`` of a config."""

import torch

torch.set_default_dtype(torch.float64)
