# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Shared parts of the command lines: arguments, configs, checks, inference, one-line errors.

Importable, so that notebooks and tools of other projects get the same protections. Only
:func:`mmvil.cli.main.run` makes mmengine load checkpoints without running code that they contain;
elsewhere, register the loaders of :mod:`mmvil.checkpoints.safe_load` first.
"""
