# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Former module of :func:`mmvil.engine.fsdp.wrap_classes`, which dumped configs refer to."""

from .fsdp import wrap_classes

__all__ = ['wrap_classes']
