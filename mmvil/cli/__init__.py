# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Shared parts of the command lines: arguments, configs, checks, inference, one-line errors.

Importable, so that notebooks and tools of other projects get the same protections. What the user
can put right raises :class:`mmvil.cli.errors.UserError`. Only :func:`mmvil.cli.main.run` makes
mmengine load checkpoints without running code that they contain; elsewhere, call
:func:`mmvil.checkpoints.register_safe_loaders` first.
"""
